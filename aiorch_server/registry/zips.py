"""Reads zip archives: stored and deflated plain files and folders, all else refused."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, BinaryIO, cast

from aiorch_server.errors import PayloadTooLarge, RequestError
from aiorch_server.registry.paths import show
from aiorch_server.registry.tars import Sink

_CHUNK = 256 << 10
_END = struct.Struct("<4s4H2LH")
_END_MARK = b"PK\5\6"
_UTF8 = 0x800
_ENCRYPTED = 0x1 | 0x40 | 0x2000
#: What one entry of the directory at the end may take on average: three short paths.
_ENTRY_BYTES = 400
_SMALLEST_LIMIT_BYTES = 1 << 20
_MALFORMED = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
)


class _Limited:
    """A file that ``zipfile`` may use: no single read takes more memory than a directory of allowed size needs."""

    def __init__(self, file: BinaryIO, size: int, most: int) -> None:
        self._file = file
        self._size = size
        self._most = most

    def read(self, size: int = -1) -> bytes:
        wanted = min(size if size >= 0 else self._size, self._size - self._file.tell())
        if wanted > self._most:
            raise PayloadTooLarge(
                f"the archive's directory takes more than {self._most} bytes: it lists too many files"
            )
        return self._file.read(max(0, wanted))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise zipfile.BadZipFile("a position before the beginning")
        return self._file.seek(base + offset)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def read_zip(archive: BinaryIO, sink: Sink, *, most_files: int) -> None:
    """Gives all files and folders to ``sink``; RequestError for anything that is not a plain and whole zip archive."""
    size = archive.seek(0, os.SEEK_END)
    limited = _Limited(archive, size, max(_SMALLEST_LIMIT_BYTES, most_files * _ENTRY_BYTES))
    try:
        with zipfile.ZipFile(cast(IO[bytes], limited)) as opened:
            _check_ends(opened, archive, size)
            for entry in opened.infolist():
                _read_entry(opened, entry, sink)
    except _MALFORMED as error:
        raise RequestError(f"the archive is no zip file, or is damaged: {error}") from None


def _check_ends(opened: zipfile.ZipFile, archive: BinaryIO, size: int) -> None:
    """Nothing may stand before the first entry or after the last byte: other programs would see another archive."""
    begin = size - _END.size - len(opened.comment)
    archive.seek(max(0, begin))
    if begin < 0 or archive.read(len(_END_MARK)) != _END_MARK:
        raise RequestError("something follows the end of the archive")
    begins = [entry.header_offset for entry in opened.infolist()]
    if begins and min(begins) > 0:
        raise RequestError("something stands before the beginning of the archive")


def _read_entry(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, sink: Sink) -> None:
    name = entry.orig_filename  # as it is written: ``filename`` is cut off at a NUL
    if not name.isascii() and not entry.flag_bits & _UTF8:
        raise RequestError(f"the archive holds {show(name)}, which is not marked as UTF-8")
    if entry.flag_bits & _ENCRYPTED:
        raise RequestError(f"the archive holds {show(name)} encrypted")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        told = "a symbolic link" if kind == stat.S_IFLNK else "a special file"
        raise RequestError(f"the archive holds {told}, {show(name)}; plain files and folders are taken")
    if name.endswith("/") != (kind == stat.S_IFDIR) and kind:
        raise RequestError(f"the archive holds {show(name)} both as a file and as a folder")
    if name.endswith("/"):
        if entry.file_size or entry.compress_size > 2:  # an empty deflate stream has two bytes
            raise RequestError(f"the archive holds the folder {show(name)} with content")
        sink.folder(name.rstrip("/"))
        return
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise RequestError(f"the archive holds {show(name)} packed by a method other than deflate")
    with opened.open(entry) as content:
        sink.file(name, entry.file_size, _read_pieces(content, sink))


def _read_pieces(content: IO[bytes], sink: Sink) -> Iterator[bytes]:
    while piece := content.read(_CHUNK):
        sink.spend(len(piece))
        yield piece
