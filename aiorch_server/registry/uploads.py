"""Uploads that may break off and go on, also on another server and after a crash: pieces -> archive -> version's files.

State is in two places: the caller keeps the ``Upload`` record (in the database), the store keeps the bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import BinaryIO

from aiorch_server.errors import (
    CapacityError,
    ChecksumMismatch,
    Conflict,
    PayloadTooLarge,
    PreconditionFailed,
    QuotaExceeded,
    RequestError,
)
from aiorch_server.registry.archives import ArchiveBounds, ArchiveFormat, unpack
from aiorch_server.registry.records import Manifest
from aiorch_server.registry.store import ArtefactStore, check_digest

_CHUNK = 1 << 20


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

    @property
    def key(self) -> str:
        """Names the upload in the store; whatever characters its name has."""
        return hashlib.sha256(f"{self.model}\0{self.upload_id}".encode("utf-8", "surrogatepass")).hexdigest()[:40]


@dataclass(frozen=True, slots=True)
class UploadBounds:
    """``archive_bytes`` bounds one archive; ``spare_bytes`` stay free on the disk."""

    archive_bytes: int = 16 << 30
    open_per_principal: int = 8
    lifetime_s: float = 24 * 3600.0
    spare_bytes: int = 64 << 20
    archive: ArchiveBounds = field(default_factory=ArchiveBounds)


@dataclass(frozen=True, slots=True)
class Finished:
    """What an upload came to; all blobs of ``manifest`` are in the store."""

    manifest: Manifest
    has_code: bool


class Uploads:
    """The steps of an upload. All methods block; any thread may call them.

    Two steps of one upload at the same time: the later one is told so by Conflict.
    """

    def __init__(self, store: ArtefactStore, bounds: UploadBounds | None = None) -> None:
        self._store = store
        self._bounds = bounds or UploadBounds()
        self._lock = threading.Lock()
        self._busy: set[str] = set()

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
        bounds = self._bounds
        try:
            check_digest(sha256)
        except ValueError as error:
            raise RequestError(f"the checksum must be a SHA-256 in 64 small hexadecimal digits: {error}") from None
        if size_bytes <= 0:
            raise RequestError(f"the archive's size must be above 0, it is {size_bytes}")
        if size_bytes > bounds.archive_bytes:
            raise PayloadTooLarge(f"the archive has {size_bytes} bytes, at most {bounds.archive_bytes} are taken")
        others = [each for each in open_uploads if (each.model, each.upload_id) != (model, upload_id)]
        if sum(each.expires_at > now for each in others) >= bounds.open_per_principal:
            raise QuotaExceeded(
                f"{principal or 'this caller'} has {bounds.open_per_principal} uploads open already; finish one, or "
                "wait until one expires"
            )
        self._check_room(size_bytes)
        expires_at = now + timedelta(seconds=bounds.lifetime_s)
        return Upload(model, upload_id, principal, format, size_bytes, sha256, expires_at)

    def received_bytes(self, upload: Upload) -> int:
        """Where the next piece belongs."""
        return self._store.pieces(upload.key).received_bytes()

    def append(self, upload: Upload, offset: int, chunk: bytes | memoryview, *, now: datetime) -> int:
        """Adds a piece and gives the bytes received; the same piece may come again.

        PreconditionFailed for a gap or an expired upload, Conflict where other bytes came before, RequestError for more
        than announced, CapacityError when the disk is full (what came stays).
        """
        _check_open(upload, now)
        end = offset + len(chunk)
        if offset < 0 or end > upload.size_bytes:
            raise RequestError(
                f"a piece from {offset} to {end} is outside the archive, which was announced with "
                f"{upload.size_bytes} bytes"
            )
        if not chunk:
            return self.received_bytes(upload)
        with self._exclude_others(upload):
            self._check_room(len(chunk))
            return self._store.pieces(upload.key).append(offset, chunk)

    def finish(self, upload: Upload, *, now: datetime) -> Finished:
        """Checks what came, unpacks it and stores its files; may be repeated until ``drop``.

        PreconditionFailed while bytes are missing; ChecksumMismatch, RequestError and PayloadTooLarge for what can
        never become a version: it is dropped then. CapacityError when the disk is full, RegistryUnavailable.
        """
        _check_open(upload, now)
        with self._exclude_others(upload):
            pieces = self._store.pieces(upload.key)
            received = pieces.received_bytes()
            if received < upload.size_bytes:
                raise PreconditionFailed(f"{received} of {upload.size_bytes} bytes have come; send the others first")
            try:
                with pieces.open() as archive, self._store.workspace() as folder:
                    _verify(archive, upload)
                    unpacked = unpack(archive, upload.format, folder, self._bounds.archive)
                    for file, path in zip(unpacked.manifest.files, unpacked.paths, strict=True):
                        self._store.put(file.sha256, path)
            except Conflict:
                raise  # somebody else is at it
            except RequestError:
                pieces.drop()
                raise
        return Finished(unpacked.manifest, unpacked.has_code)

    def drop(self, upload: Upload) -> None:
        """Forgets the bytes: after the version was recorded, or when nobody wants it any more."""
        self._store.pieces(upload.key).drop()

    def sweep(self, *, now: datetime) -> int:
        """Drops what nobody has added to for longer than an upload may live; says how many."""
        limit = now - timedelta(seconds=self._bounds.lifetime_s)
        old = [key for key, added_at in self._store.upload_keys().items() if added_at < limit]
        for key in old:
            self._store.pieces(key).drop()
        return len(old)

    def _check_room(self, size_bytes: int) -> None:
        free = self._store.free_bytes()
        if free - size_bytes < self._bounds.spare_bytes:
            raise CapacityError(
                f"artefact store {self._store.name} has no room for {size_bytes} bytes: {free} are free, of which "
                f"{self._bounds.spare_bytes} are kept; free some and try again"
            )

    @contextlib.contextmanager
    def _exclude_others(self, upload: Upload) -> Iterator[None]:
        key = upload.key
        with self._lock:
            if key in self._busy:
                raise Conflict("this upload is being written or finished by another call; try again")
            self._busy.add(key)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(key)


def _check_open(upload: Upload, now: datetime) -> None:
    if now >= upload.expires_at:
        raise PreconditionFailed(
            f"upload {upload.upload_id!a} expired at {upload.expires_at:%Y-%m-%d %H:%M:%S} UTC; begin a new one"
        )


def _verify(archive: BinaryIO, upload: Upload) -> None:
    digest, size = hashlib.sha256(), 0
    while chunk := archive.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    if size != upload.size_bytes:
        raise ChecksumMismatch(f"{size} bytes have come, {upload.size_bytes} were announced; begin a new upload")
    if digest.hexdigest() != upload.sha256:
        raise ChecksumMismatch(
            f"the archive's SHA-256 is {digest.hexdigest()}, {upload.sha256} was announced; begin a new upload"
        )
