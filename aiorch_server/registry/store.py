"""Where artefacts lie: content by its SHA-256, in a local folder or in an object store, and the pieces of uploads.

A blob is there whole or not at all, at any moment and after any crash; it never changes. All methods block on files or
a network: call them off the event loop. Any thread, and several servers at once, may use one store.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from aiorch_server.errors import AiorchError, InvalidSettings


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

    Every method raises RegistryUnavailable when the store cannot be reached, with no secret of its settings in the text,
    and CapacityError when it is full.
    """

    #: For texts: the address without credentials.
    name: str

    @abc.abstractmethod
    def put(self, sha256: str, path: Path) -> None:
        """Stores the local file ``path``, whose content hashes to ``sha256``; durable once this returns.

        The file may be moved away: the caller gives it up. A blob that is there already is made as new for ``collect``.
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
        """An empty local folder that is gone afterwards, from which ``put`` is cheapest; a crash leaves nothing for long."""

    @abc.abstractmethod
    def free_bytes(self) -> int:
        """How much may still be written for uploads on this machine."""

    @abc.abstractmethod
    def pieces(self, key: str) -> UploadPieces:
        """The pieces of the upload with this key (letters, digits, ``-`` and ``_`` alone); made with the first append."""

    @abc.abstractmethod
    def upload_keys(self) -> Mapping[str, datetime]:
        """The uploads of which something lies here, with the time of their last piece."""

    def close(self) -> None:  # noqa: B027 - a folder holds little
        """Gives back connections; may be called again."""


def open_store(url: str, *, scratch: Path | None = None, options: Mapping[str, Any] | None = None) -> ArtefactStore:
    """The store at ``url``: a local folder (plain path or ``file://``), or an address for fsspec such as ``s3://bucket/path``.

    ``scratch`` is a local folder for unpacking, needed by object stores. ``options`` are fsspec's storage options
    (``endpoint_url``, ``key``, ``secret``, ...). Makes and sweeps the folder. InvalidSettings for what cannot work.
    """
    raise InvalidSettings(f"no store for {url}")
