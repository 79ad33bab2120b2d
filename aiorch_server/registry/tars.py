"""Reads tar archives as a stream: ustar, GNU and pax as far as plain files and folders need, all else refused.

The header blocks are parsed by ``tarfile``; the walk is ours, because ``tarfile`` reads whatever size a pax header
announces into memory, and takes a broken header for the end.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Protocol

from aiorch_server.errors import PayloadTooLarge, RequestError
from aiorch_server.registry.paths import show

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 256 << 10
_LARGEST_EXTENSION_BYTES = 64 << 10
_GZIP = 31
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_REFUSED = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGLINK: "a link",
}


class Sink(Protocol):
    """Takes what is found in an archive; raises RequestError for what it refuses."""

    def spend(self, size_bytes: int) -> None:
        """Counts bytes that came out of the archive, before they are used."""

    def file(self, name: str, size_bytes: int, pieces: Iterator[bytes]) -> None:
        """One file; takes all pieces."""

    def folder(self, name: str) -> None:
        """One folder."""


class _Stream:
    """The bytes of the tar file: every one is counted before it is used."""

    def __init__(self, archive: BinaryIO, sink: Sink, *, is_gzip: bool) -> None:
        self._archive = archive
        self._sink = sink
        self._inflater = zlib.decompressobj(_GZIP) if is_gzip else None

    def read(self, most: int) -> bytes:
        """Some bytes, b"" at the end."""
        found = self._archive.read(most) if self._inflater is None else self._inflate(most)
        self._sink.spend(len(found))
        return found

    def read_exactly(self, size: int) -> bytes:
        """That many bytes; few enough to be kept in memory."""
        parts = list(self.read_pieces(size))
        return b"".join(parts)

    def read_pieces(self, size: int) -> Iterator[bytes]:
        """That many bytes in pieces."""
        while size:
            piece = self.read(min(size, _CHUNK))
            if not piece:
                raise RequestError("the archive is cut off")
            size -= len(piece)
            yield piece

    def _inflate(self, most: int) -> bytes:
        inflater = self._inflater
        assert inflater is not None
        while not inflater.eof:
            fed = inflater.unconsumed_tail or self._archive.read(_CHUNK)
            try:
                found = inflater.decompress(fed, most)
            except zlib.error as error:
                raise RequestError(f"the archive is not what gzip writes: {error}") from None
            if found:
                return found
            if not fed:
                raise RequestError("the archive is cut off")
        if inflater.unused_data or self._archive.read(1):
            raise RequestError("something follows the end of the archive's gzip stream")
        return b""


def read_tar(archive: BinaryIO, sink: Sink, *, is_gzip: bool) -> None:
    """Gives all files and folders to ``sink``; RequestError for anything that is not a plain and whole tar archive."""
    stream = _Stream(archive, sink, is_gzip=is_gzip)
    overrides: dict[str, str] = {}
    while any(block := stream.read_exactly(_BLOCK)):
        header = _parse(block)
        name = overrides.get("path", header.name)
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            overrides.update(_parse_pax(_read_extension(stream, header)))
            continue
        if header.type == tarfile.XGLTYPE:
            if {"path", "size"} & _parse_pax(_read_extension(stream, header)).keys():
                raise RequestError("the archive's global pax header gives one path or size to all files")
            continue
        if header.type == tarfile.GNUTYPE_LONGNAME:
            overrides["path"] = _decode(_read_extension(stream, header).rstrip(b"\0"))
            continue
        size = _parse_size(overrides["size"]) if "size" in overrides else header.size
        overrides = {}
        if header.type == tarfile.DIRTYPE:
            if size:
                raise RequestError(f"the archive holds the folder {show(name)} with content")
            sink.folder(name.rstrip("/"))
        elif header.type in _FILES:
            sink.file(name, size, stream.read_pieces(size))
            stream.read_exactly(-size % _BLOCK)
        else:
            kind = _REFUSED.get(header.type, f"something of type {header.type!r}")
            raise RequestError(f"the archive holds {kind}, {show(name)}; plain files and folders are taken")
    while rest := stream.read(_CHUNK):
        if any(rest):
            raise RequestError("something follows the end of the archive")


def _parse(block: bytes) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except UnicodeDecodeError:
        raise RequestError("the archive holds a name that is not UTF-8") from None
    except (tarfile.HeaderError, ValueError, OverflowError) as error:
        raise RequestError(f"the archive is no tar file, or is damaged: {error}") from None
    if header.size < 0:
        raise RequestError(f"the archive holds {show(header.name)} with a size below 0")
    return header


def _read_extension(stream: _Stream, header: tarfile.TarInfo) -> bytes:
    if header.size > _LARGEST_EXTENSION_BYTES:
        raise PayloadTooLarge(
            f"the archive holds an extended header of {header.size} bytes, {_LARGEST_EXTENSION_BYTES} are taken"
        )
    content = stream.read_exactly(header.size)
    stream.read_exactly(-header.size % _BLOCK)
    return content


def _parse_pax(content: bytes) -> dict[str, str]:
    """The records that matter here; RequestError for what is no list of records, and for sparse files."""
    found: dict[str, str] = {}
    while content:
        digits, separator, _ = content[:10].partition(b" ")
        length = int(digits) if separator and digits.isdigit() else 0
        record = content[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if length > len(content) or not equals or not value.endswith(b"\n"):
            raise RequestError("the archive holds a pax header that is damaged")
        if key.startswith(b"GNU.sparse."):
            raise RequestError("the archive holds a sparse file; plain files and folders are taken")
        if key in (b"path", b"size"):
            found[key.decode()] = _decode(value[:-1])
        content = content[length:]
    return found


def _parse_size(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise RequestError(f"the archive holds a pax header with the size {show(text)}")
    return int(text)


def _decode(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise RequestError("the archive holds a name that is not UTF-8") from None
