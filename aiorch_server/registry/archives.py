"""Archives that come from outside: what is in them, checked, as files that are named by number alone.

No name of an archive ever becomes a path here: its files are written as ``0``, ``1``, ... into one folder, and names
are only kept as text. So whatever an archive says, nothing is written anywhere else.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from aiorch_server.registry.records import Manifest


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

    Raises RequestError for whatever is wrong with the archive, PayloadTooLarge for what passes a bound, CapacityError
    when the disk is full. The folder is the caller's to remove, on success and on failure.
    """
    raise NotImplementedError
