"""Where artefacts lie: content by its SHA-256, in a local folder or in an object store, and the pieces of uploads.

A blob is there whole or not at all, at any moment and after any crash; it never changes. All methods block on files or
a network: call them off the event loop. Any thread, and several servers at once, may use one store.
"""

from __future__ import annotations

import abc
import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from aiorch_server.errors import AiorchError, InvalidSettings

_DIGEST = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,200}")


class BlobMissing(AiorchError):
    """The store answers, and does not have what was asked for; the text names it."""


@dataclass(frozen=True, slots=True)
class Blob:
    """One blob as the store lists it; ``stored_at`` is when it was last put."""

    sha256: str
    size_bytes: int
    stored_at: datetime


class UploadPieces(abc.ABC):
    """The bytes of one upload that have come so far, kept by the store under a key."""

    @abc.abstractmethod
    def received_bytes(self) -> int:
        """How many bytes, from the first one on without a gap, are safe from a crash of this process."""

    @abc.abstractmethod
    def append(self, offset: int, chunk: bytes | memoryview) -> int:
        """Adds ``chunk`` at ``offset`` and gives ``received_bytes``.

        What is there already is compared, not written again. PreconditionFailed for a gap, Conflict where other bytes
        are there already, CapacityError when the disk is full.
        """

    @abc.abstractmethod
    def open(self) -> contextlib.AbstractContextManager[BinaryIO]:
        """All of it as one seekable local file. Nobody else may append or open meanwhile (Conflict)."""

    @abc.abstractmethod
    def drop(self) -> None:
        """Forgets all of it; nothing happens where there is nothing."""


class ArtefactStore(abc.ABC):
    """Blobs by SHA-256 in hex, and the pieces of uploads by key.

    Every method raises RegistryUnavailable when the store cannot be reached, and CapacityError when it is full; no
    secret of its settings is in the text.
    """

    #: For texts: the address without credentials.
    name: str

    @abc.abstractmethod
    def put(self, sha256: str, path: Path) -> None:
        """Stores the local file ``path``, whose content hashes to ``sha256``; durable once this returns.

        The file may be moved away: the caller gives it up. A blob that is there already is replaced, and counts as new.
        """

    @abc.abstractmethod
    def open(self, sha256: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """The content for reading, not verified; BlobMissing."""

    @abc.abstractmethod
    def find(self, sha256: str) -> Blob | None:
        """What is known about one blob; None where it is missing."""

    @abc.abstractmethod
    def blobs(self) -> Iterator[Blob]:
        """All blobs, in no order; what is put meanwhile may be left out."""

    @abc.abstractmethod
    def delete_if_older(self, sha256: str, stored_before: datetime) -> bool:
        """Deletes a blob unless it was put again since; whether it did."""

    @abc.abstractmethod
    def workspace(self) -> contextlib.AbstractContextManager[Path]:
        """An empty local folder that is gone afterwards, from which ``put`` is cheapest; a crash is swept up after."""

    @abc.abstractmethod
    def free_bytes(self) -> int:
        """How much may still be written for uploads on this machine."""

    @abc.abstractmethod
    def pieces(self, key: str) -> UploadPieces:
        """The pieces of the upload with this key (letters, digits, ``-``, ``_``); made with the first append."""

    @abc.abstractmethod
    def upload_keys(self) -> Mapping[str, datetime]:
        """The uploads of which something lies here, with the time of their last piece."""

    def close(self) -> None:  # noqa: B027 - a folder holds little
        """Gives back connections; may be called again."""


def check_digest(sha256: str) -> str:
    """Gives ``sha256`` back if it is 64 hexadecimal digits in lower case; ValueError: it would become a path."""
    if not _DIGEST.fullmatch(sha256):
        raise ValueError(f"{sha256[:80]!r} is not a SHA-256 in hexadecimal digits")
    return sha256


def check_key(key: str) -> str:
    """Gives ``key`` back if it may become a file's name; ValueError."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key[:80]!r} is not the key of an upload")
    return key


def open_store(url: str, *, scratch: Path | None = None, options: Mapping[str, Any] | None = None) -> ArtefactStore:
    """The store at ``url``: a folder (a path or ``file://``), or an address for fsspec such as ``s3://bucket/path``.

    ``scratch`` is a local folder for unpacking, which object stores need. ``options`` are fsspec's storage options
    (``endpoint_url``, ``key``, ``secret``, ...). Makes and sweeps the folders. InvalidSettings for what cannot work,
    RegistryUnavailable where a folder cannot be made; a network is not touched.
    """
    scheme, separator, rest = url.partition("://")
    if not url:
        raise InvalidSettings("the artefact store is not set: a folder, or an address such as s3://bucket/path")
    if not separator or scheme == "file":
        from aiorch_server.registry.folder_store import FolderStore

        if options:
            raise InvalidSettings(f"artefact store '{url}' is a folder, which takes no storage options")
        return FolderStore(Path(rest if separator else url).expanduser().absolute())
    if scratch is None:
        raise InvalidSettings(f"artefact store '{scheme}://' needs a local folder for unpacking as well")
    # fsspec and its kind are only loaded where they are used
    from aiorch_server.registry.object_store import ObjectStore

    return ObjectStore(url, scratch, options or {})
