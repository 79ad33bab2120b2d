"""Uploads that may break off and go on, also on another server and after a crash: pieces -> archive -> version's files.

State is in two places: the caller keeps the ``Upload`` record (in the database), the store keeps the bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from aiorch_server.registry.archives import ArchiveBounds, ArchiveFormat
from aiorch_server.registry.records import Manifest
from aiorch_server.registry.store import ArtefactStore


@dataclass(frozen=True, slots=True)
class Upload:
    """What was announced when an upload began; never changes. ``principal`` is who may go on with it."""

    model: str
    upload_id: str
    principal: str
    format: ArchiveFormat
    size_bytes: int
    sha256: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class UploadBounds:
    """``archive_bytes`` bounds one archive; ``spare_bytes`` stay free on the disk."""

    archive_bytes: int = 16 << 30
    open_per_principal: int = 8
    lifetime_s: float = 24 * 3600.0
    spare_bytes: int = 64 << 20
    archive: ArchiveBounds = ArchiveBounds()


@dataclass(frozen=True, slots=True)
class Finished:
    """What an upload came to; all blobs of ``manifest`` are in the store."""

    manifest: Manifest
    has_code: bool


class Uploads:
    """The steps of an upload. All methods block; any thread may call them, one upload's steps exclude each other."""

    def __init__(self, store: ArtefactStore, bounds: UploadBounds | None = None) -> None:
        raise NotImplementedError

    def begin(
        self,
        *,
        model: str,
        upload_id: str,
        principal: str,
        format: ArchiveFormat,
        size_bytes: int,
        sha256: str,
        now: datetime,
        open_uploads: Collection[Upload] = (),
    ) -> Upload:
        """The record for the caller to keep; writes nothing.

        ``open_uploads`` are those of the principal that have no version yet. RequestError for what was announced wrong,
        PayloadTooLarge, QuotaExceeded for too many open uploads, CapacityError where the disk has no room for it.
        """
        raise NotImplementedError

    def received_bytes(self, upload: Upload) -> int:
        """Where the next piece belongs."""
        raise NotImplementedError

    def append(self, upload: Upload, offset: int, chunk: bytes | memoryview, *, now: datetime) -> int:
        """Adds a piece and gives the bytes received; the same piece may come again.

        PreconditionFailed for a gap or an expired upload, Conflict where other bytes came before, RequestError for more
        than announced, CapacityError when the disk is full (what came stays).
        """
        raise NotImplementedError

    def finish(self, upload: Upload, *, now: datetime) -> Finished:
        """Checks what came, unpacks it and stores its files; may be repeated until ``drop``.

        PreconditionFailed while bytes are missing; ChecksumMismatch, RequestError and PayloadTooLarge for what can never
        become a version: it is dropped then. CapacityError when the disk is full, RegistryUnavailable.
        """
        raise NotImplementedError

    def drop(self, upload: Upload) -> None:
        """Forgets the bytes: after the version was recorded, or when nobody wants it any more."""
        raise NotImplementedError

    def sweep(self, *, now: datetime) -> int:
        """Drops what nobody has added to for longer than an upload may live; says how many."""
        raise NotImplementedError
