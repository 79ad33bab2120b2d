"""Archives for tests, also such as no decent program writes."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping

Change = Callable[[tarfile.TarInfo], None]


def make_tar(files: Mapping[str, bytes], *, change: Change | None = None, format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar file of ``files``; ``change`` may spoil each header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in files.items():
            add(archive, name, content, change=change)
    return buffer.getvalue()


def add(
    archive: tarfile.TarFile,
    name: str,
    content: bytes = b"",
    *,
    type: bytes = tarfile.REGTYPE,
    change: Change | None = None,
) -> None:
    """One more entry."""
    info = tarfile.TarInfo(name)
    info.type, info.size = type, len(content)
    if change is not None:
        change(info)
    archive.addfile(info, io.BytesIO(content))


def make_tar_with(*entries: tuple[str, bytes, bytes, Change | None]) -> bytes:
    """A tar file of (name, type, content, change)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, type_, content, change in entries:
            add(archive, name, content, type=type_, change=change)
    return buffer.getvalue()


def make_header(name: bytes, size: int, type_: bytes = b"0", *, field: bytes = b"") -> bytes:
    """One raw ustar header with a right checksum; ``field`` is written for the size as it is."""
    header = bytearray(512)
    header[0 : len(name)] = name
    header[100:108], header[108:116], header[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    header[124:136] = field or b"%011o\0" % size
    header[136:148] = b"00000000000\0"
    header[156:157] = type_
    header[257:265] = b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pad(content: bytes) -> bytes:
    """``content`` to a whole number of tar's blocks."""
    return content + bytes(-len(content) % 512)


def pack(tar: bytes) -> bytes:
    """As gzip writes it, the same each time."""
    return gzip.compress(tar, mtime=0)


def make_zip(files: Mapping[str, bytes], *, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip file of ``files``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()
