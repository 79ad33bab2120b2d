"""Archives that come from outside: what is in them, checked, as files that are named by number alone.

No name of an archive ever becomes a path here: its files are written as ``0``, ``1``, ... into one folder, and names
are only kept as text. So whatever an archive says, nothing is written anywhere else.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from aiorch_server.config.files import CONFIG_FILES, LARGEST_CONFIG_BYTES
from aiorch_server.errors import PayloadTooLarge, RequestError
from aiorch_server.registry.code import MARK_BYTES, has_code, read_config
from aiorch_server.registry.manifests import make_manifest
from aiorch_server.registry.paths import VERSION_FOLDER, Paths, check_path, find_version_folder, show
from aiorch_server.registry.records import ArtefactFile, Manifest
from aiorch_server.registry.scratch import telling, write_all
from aiorch_server.registry.tars import read_tar
from aiorch_server.registry.zips import read_zip

_DISK = "the disk for unpacking"


class ArchiveFormat(enum.StrEnum):
    """How an archive is written."""

    TAR = "tar"
    TAR_GZ = "tar.gz"
    ZIP = "zip"


@dataclass(frozen=True, slots=True)
class ArchiveBounds:
    """How far an archive may go. ``expansion_ratio`` is asked for beyond the first ``free_expansion_bytes``."""

    expanded_bytes: int = 16 << 30
    expansion_ratio: float = 100.0
    free_expansion_bytes: int = 64 << 20
    files: int = 10_000
    path_bytes: int = 1024
    depth: int = 16


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What was in an archive: ``paths[i]`` is where the content of ``manifest.files[i]`` lies."""

    manifest: Manifest
    paths: tuple[Path, ...]
    has_code: bool


def unpack(archive: BinaryIO, format: ArchiveFormat, folder: Path, bounds: ArchiveBounds) -> Unpacked:
    """Writes the files of ``archive`` into the empty ``folder``; nothing else is ever written.

    An archive holds a version's files (``model.onnx``, and beside it ``config.pbtxt`` or ``config.yaml``, labels), or a
    model's folder with one version in it (``config.pbtxt``, ``7/model.onnx``), whose number counts for nothing.
    Raises RequestError for whatever is wrong with the archive, PayloadTooLarge for what passes a bound, CapacityError
    when the disk is full. The folder is the caller's to remove, on success and on failure.
    """
    size = archive.seek(0, os.SEEK_END)
    archive.seek(0)
    collector = _Collector(folder, bounds, size)
    if format is ArchiveFormat.ZIP:
        read_zip(archive, collector, most_files=bounds.files)
    else:
        read_tar(archive, collector, is_gzip=format is ArchiveFormat.TAR_GZ)
    return collector.finish()


@dataclass(slots=True)
class _Written:
    path: str
    size_bytes: int
    sha256: str
    place: Path
    beginning: bytes


class _Collector:
    """Writes what comes, within the bounds."""

    def __init__(self, folder: Path, bounds: ArchiveBounds, archive_bytes: int) -> None:
        self._folder = folder
        self._bounds = bounds
        self._most_bytes = min(
            bounds.expanded_bytes, int(max(bounds.free_expansion_bytes, archive_bytes * bounds.expansion_ratio))
        )
        self._spent = 0
        self._entries = 0
        self._paths = Paths()
        self._files: list[_Written] = []

    def spend(self, size_bytes: int) -> None:
        """See Sink.spend."""
        self._spent += size_bytes
        self._check_expansion(self._spent)

    def folder(self, name: str) -> None:
        """See Sink.folder."""
        if path := self._check(name):
            self._paths.add(path, is_folder=True)

    def file(self, name: str, size_bytes: int, pieces: Iterator[bytes]) -> None:
        """See Sink.file."""
        path = self._check(name)
        if not path:
            raise RequestError(f"the archive holds {show(name)}, which is no name of a file")
        self._paths.add(path, is_folder=False)
        self._check_expansion(size_bytes)
        place = self._folder / str(len(self._files))
        digest, written, beginning = hashlib.sha256(), 0, b""
        with self._create(place) as descriptor:
            for piece in pieces:
                beginning = beginning or piece[:MARK_BYTES]
                digest.update(piece)
                with telling(_DISK, doing="unpacking"):
                    write_all(descriptor, piece, written)
                written += len(piece)
                if written > size_bytes:
                    break
        if written != size_bytes:
            raise RequestError(f"the archive announces {show(path)} with {size_bytes} bytes, and holds others")
        self._files.append(_Written(path, written, digest.hexdigest(), place, beginning))

    def finish(self) -> Unpacked:
        """What came; RequestError where that is no version."""
        if not self._files:
            raise RequestError("the archive holds no file")
        former = find_version_folder(each.path for each in self._files)
        if former:
            for each in self._files:
                first, separator, rest = each.path.partition("/")
                if first == former and separator:
                    each.path = f"{VERSION_FOLDER}/{rest}"
        configs = [each for each in self._files if each.path in CONFIG_FILES]
        if len(configs) > 1:
            raise RequestError(f"the archive holds {' and '.join(CONFIG_FILES)}; keep one of them")
        config = self._read_config(configs[0]) if configs else {}
        ordered = sorted(self._files, key=lambda each: each.path)
        prefix = f"{VERSION_FOLDER}/" if former else ""
        return Unpacked(
            make_manifest(ArtefactFile(each.path, each.size_bytes, each.sha256) for each in ordered),
            tuple(each.place for each in ordered),
            has_code(config, ((each.path.removeprefix(prefix), each.beginning) for each in ordered)),
        )

    def _read_config(self, written: _Written) -> Mapping[str, Any]:
        with telling(_DISK, doing="reading what was unpacked"), written.place.open("rb") as file:
            content = file.read(LARGEST_CONFIG_BYTES + 1)
        return read_config(written.path, content)

    def _check(self, name: str) -> str:
        self._entries += 1
        if self._entries > 2 * self._bounds.files or len(self._files) >= self._bounds.files:
            raise PayloadTooLarge(f"the archive holds more than {self._bounds.files} files")
        return check_path(name, longest_bytes=self._bounds.path_bytes, deepest=self._bounds.depth)

    def _check_expansion(self, size_bytes: int) -> None:
        if size_bytes > self._bounds.expanded_bytes:
            raise PayloadTooLarge(f"the archive unpacks to more than {self._bounds.expanded_bytes} bytes")
        if size_bytes > self._most_bytes:
            raise PayloadTooLarge(
                f"the archive unpacks to more than {self._bounds.expansion_ratio:g} times its size, which looks like a "
                "decompression bomb"
            )

    @staticmethod
    @contextlib.contextmanager
    def _create(place: Path) -> Iterator[int]:
        with telling(_DISK, doing="unpacking"):
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
