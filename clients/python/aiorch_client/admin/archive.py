"""A model's files as an archive that is read in pieces: the same files give the same bytes, any size in little memory.

A folder or a single file becomes a tar whose entries are sorted and have no owners, times or permissions. Since the
place of every byte is known beforehand, reading can begin anywhere.
"""

from __future__ import annotations

import enum
import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiorch_client.errors import RequestError

PIECE_BYTES: Final = 1 << 20
_END: Final = bytes(2 * tarfile.BLOCKSIZE)
#: Left out of folders beside everything whose name begins with a dot: no server takes them.
_LEFT_OUT: Final = frozenset({"__pycache__"})
_SAVED_MODEL: Final = "model.savedmodel"
#: What a single file is called in the archive, so that its backend finds it.
_ARTEFACT_SUFFIXES: Final = frozenset({".onnx", ".pt2", ".pt", ".keras", ".skops", ".joblib", ".pkl", ".py"})


class ArchiveFormat(enum.StrEnum):
    """How an archive is written."""

    TAR = "tar"
    TAR_GZ = "tar.gz"
    ZIP = "zip"


_ARCHIVES: Final = {
    ".tar": ArchiveFormat.TAR,
    ".tar.gz": ArchiveFormat.TAR_GZ,
    ".tgz": ArchiveFormat.TAR_GZ,
    ".zip": ArchiveFormat.ZIP,
}


@dataclass(frozen=True, slots=True)
class _Segment:
    """Consecutive bytes: those in ``content``, or the ``size_bytes`` of that file."""

    content: bytes | Path
    size_bytes: int


class Archive:
    """What is uploaded; ``names`` are the files in it (empty for an archive that was there already).

    Holds no open file. RequestError where the files cannot be read, or change while they are.
    """

    def __init__(self, format: ArchiveFormat, names: tuple[str, ...], segments: tuple[_Segment, ...]) -> None:
        self.format = format
        self.names = names
        self._segments = segments
        self.size_bytes = sum(each.size_bytes for each in segments)

    def digest(self) -> str:
        """The SHA-256 of all bytes, which are read for it; 64 hexadecimal digits."""
        found = hashlib.sha256()
        for piece in self.read():
            found.update(piece)
        return found.hexdigest()

    def read(self, offset: int = 0) -> Iterator[bytes]:
        """The bytes from ``offset`` on, in pieces of PIECE_BYTES; the last may be shorter."""
        gathered = bytearray()
        for part in self._read_parts(offset):
            gathered += part
            while len(gathered) >= PIECE_BYTES:
                yield bytes(gathered[:PIECE_BYTES])
                del gathered[:PIECE_BYTES]
        if gathered:
            yield bytes(gathered)

    def _read_parts(self, offset: int) -> Iterator[bytes]:
        start = 0
        for segment in self._segments:
            skipped = max(0, offset - start)
            start += segment.size_bytes
            if skipped < segment.size_bytes:
                if isinstance(segment.content, bytes):
                    yield segment.content[skipped:]
                else:
                    yield from _read_file(segment.content, segment.size_bytes, skipped)


def open_archive(path: str | os.PathLike[str]) -> Archive:
    """The archive of a folder, of a single file, or the one that ``path`` is (.tar, .tar.gz, .tgz, .zip).

    A single file is called after its backend's artefact (``digits.onnx`` is ``model.onnx`` in it), and TensorFlow's
    SavedModel folder likewise. Names that begin with a dot and ``__pycache__`` are left out. RequestError for what is
    not there, is empty, or holds links to folders, devices and the like.
    """
    source = Path(path)
    try:
        is_folder = stat.S_ISDIR(source.stat().st_mode)
    except OSError as error:
        raise RequestError(f"'{source}' cannot be read: {error.strerror}") from error
    if is_folder:
        return _pack(_list_folder(source))
    _check_regular(source)
    for suffix, format in _ARCHIVES.items():
        if source.name.lower().endswith(suffix):
            return Archive(format, (), (_Segment(source, _measure(source)),))
    return _pack({f"model{source.suffix}" if source.suffix in _ARTEFACT_SUFFIXES else source.name: source})


def _list_folder(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}

    def add(directory: Path, prefix: str) -> None:
        try:
            entries = sorted(directory.iterdir(), key=lambda entry: entry.name)
        except OSError as error:
            raise RequestError(f"folder '{directory}' cannot be read: {error.strerror}") from error
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.name.startswith(".") or entry.name in _LEFT_OUT:
                continue
            if entry.is_dir():
                if entry.is_symlink():
                    raise RequestError(f"'{entry}' is a link to a folder, which is not followed; put the folder there")
                add(entry, f"{name}/")
            else:
                _check_regular(entry)
                files[name] = entry

    add(folder, "")
    if not files:
        raise RequestError(f"folder '{folder}' holds no files; expected model.onnx or another backend's artefact")
    if "saved_model.pb" in files:
        files = {f"{_SAVED_MODEL}/{name}": path for name, path in files.items()}
    return files


def _pack(files: dict[str, Path]) -> Archive:
    segments: list[_Segment] = []
    for name in sorted(files):
        size = _measure(files[name])
        header = _write_header(name, size)
        padding = -size % tarfile.BLOCKSIZE
        segments += (_Segment(header, len(header)), _Segment(files[name], size), _Segment(bytes(padding), padding))
    segments.append(_Segment(_END, len(_END)))
    return Archive(ArchiveFormat.TAR, tuple(sorted(files)), tuple(segments))


def _write_header(name: str, size: int) -> bytes:
    try:
        name.encode()
    except UnicodeEncodeError:  # tarfile would write it in a form that no server takes
        raise RequestError(f"the file name {name!a} is not UTF-8; rename it") from None
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def _check_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise RequestError(f"'{path}' cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise RequestError(f"'{path}' is neither a file nor a folder")


def _measure(path: Path) -> int:
    return path.stat().st_size


def _read_file(path: Path, size: int, skipped: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                raise RequestError(f"'{path}' has changed since the upload began; begin again when it is finished")
            file.seek(skipped)
            left = size - skipped
            while left:
                part = file.read(min(left, PIECE_BYTES))
                if not part:
                    raise RequestError(f"'{path}' became shorter while it was read; begin again when it is finished")
                left -= len(part)
                yield part
    except OSError as error:
        raise RequestError(f"'{path}' cannot be read: {error.strerror}") from error
