"""An artefact store in a local folder.

``blobs/<two digits>/<sha256>`` hold content, ``uploads/<key>`` what has come of an upload, ``staging/`` what is not
finished. A blob is written and synced elsewhere, then renamed: it is never there in half.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from aiorch_server.errors import Conflict, PreconditionFailed
from aiorch_server.registry.scratch import Scratch, locked, sync_folder, telling, write_all
from aiorch_server.registry.store import ArtefactStore, Blob, BlobMissing, UploadPieces, check_digest, check_key

_FAN_OUT = re.compile(r"[0-9a-f]{2}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_COMPARED_BYTES = 1 << 20


class FolderStore(ArtefactStore):
    """Blobs on a disk that this server, and perhaps others, have in reach."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder where it is missing, and sweeps what killed processes left. RegistryUnavailable."""
        self.name = str(folder)
        self._blobs = folder / "blobs"
        self._uploads = folder / "uploads"
        self._scratch = Scratch(folder)
        with self._telling("preparing it"):
            for made in (self._blobs, self._uploads):
                made.mkdir(exist_ok=True, mode=0o700)
            sync_folder(folder)

    def put(self, sha256: str, path: Path) -> None:
        """See ArtefactStore.put."""
        target = self._path(sha256)
        with self._telling("storing a file"):
            if path.stat().st_dev != self._blobs.stat().st_dev:
                with self._scratch.workspace() as folder:
                    near = folder / sha256
                    shutil.copyfile(path, near)
                    self._move(near, target)
            else:
                self._move(path, target)

    def _move(self, path: Path, target: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fchmod(descriptor, 0o400)
            os.utime(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not target.parent.is_dir():
            target.parent.mkdir(exist_ok=True, mode=0o700)
            sync_folder(self._blobs)
        with locked(self._scratch.lock, shared=True):
            path.rename(target)
        sync_folder(target.parent)

    @contextlib.contextmanager
    def open(self, sha256: str) -> Iterator[BinaryIO]:
        """See ArtefactStore.open."""
        with self._telling("reading a file"):
            try:
                file = self._path(sha256).open("rb")
            except FileNotFoundError:
                raise BlobMissing(f"{self.name} has no blob {sha256}") from None
            with file:
                yield file

    def find(self, sha256: str) -> Blob | None:
        """See ArtefactStore.find."""
        with self._telling("looking for a file"):
            try:
                return _describe(self._path(sha256))
            except FileNotFoundError:
                return None

    def blobs(self) -> Iterator[Blob]:
        """See ArtefactStore.blobs."""
        with self._telling("listing files"):
            for folder in sorted(self._blobs.iterdir()):
                if not _FAN_OUT.fullmatch(folder.name):
                    continue
                for path in folder.iterdir():
                    if _DIGEST.fullmatch(path.name):
                        with contextlib.suppress(FileNotFoundError):
                            yield _describe(path)

    def delete_if_older(self, sha256: str, stored_before: datetime) -> bool:
        """See ArtefactStore.delete_if_older."""
        path = self._path(sha256)
        with self._telling("deleting a file"), locked(self._scratch.lock):
            try:
                if _describe(path).stored_at >= stored_before:
                    return False
                path.unlink()
            except FileNotFoundError:
                return False
        return True

    def workspace(self) -> contextlib.AbstractContextManager[Path]:
        """See ArtefactStore.workspace."""
        return self._scratch.workspace()

    def free_bytes(self) -> int:
        """See ArtefactStore.free_bytes."""
        return self._scratch.free_bytes()

    def pieces(self, key: str) -> UploadPieces:
        """See ArtefactStore.pieces."""
        return _FilePieces(self._uploads / check_key(key), f"artefact store {self.name}")

    def upload_keys(self) -> Mapping[str, datetime]:
        """See ArtefactStore.upload_keys."""
        found: dict[str, datetime] = {}
        with self._telling("listing uploads"):
            for path in self._uploads.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found[path.name] = _describe(path).stored_at
        return found

    def close(self) -> None:
        """See ArtefactStore.close."""
        self._scratch.close()

    def _path(self, sha256: str) -> Path:
        return self._blobs / check_digest(sha256)[:2] / sha256

    def _telling(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return telling(f"artefact store {self.name}", doing=doing)


class _FilePieces(UploadPieces):
    """One file that grows; whoever writes or reads it holds its lock, in this process or another."""

    def __init__(self, path: Path, place: str) -> None:
        self._path = path
        self._place = place

    def received_bytes(self) -> int:
        """See UploadPieces.received_bytes."""
        with telling(self._place, doing="looking for an upload"):
            try:
                return self._path.stat().st_size
            except FileNotFoundError:
                return 0

    def append(self, offset: int, chunk: bytes | memoryview) -> int:
        """See UploadPieces.append."""
        with self._hold(os.O_RDWR | os.O_CREAT) as descriptor:
            size = os.fstat(descriptor).st_size
            if offset > size:
                raise PreconditionFailed(f"a piece at offset {offset} leaves a gap: {size} bytes have come")
            known = min(len(chunk), size - offset)
            if not _is_same(descriptor, offset, memoryview(chunk)[:known]):
                raise Conflict(f"other bytes have come at offset {offset} already; begin a new upload")
            write_all(descriptor, memoryview(chunk)[known:], size)
            return max(size, offset + len(chunk))

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """See UploadPieces.open."""
        with self._hold(os.O_RDWR | os.O_CREAT) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file

    def drop(self) -> None:
        """See UploadPieces.drop."""
        with telling(self._place, doing="dropping an upload"):
            self._path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _hold(self, flags: int) -> Iterator[int]:
        with telling(self._place, doing="keeping an upload"):
            descriptor = os.open(self._path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise Conflict("this upload is being written or finished by another call; try again") from None
                yield descriptor
            finally:
                os.close(descriptor)


def _is_same(descriptor: int, offset: int, expected: memoryview) -> bool:
    while expected:
        found = os.pread(descriptor, min(len(expected), _COMPARED_BYTES), offset)
        if not found or found != expected[: len(found)]:
            return False
        expected, offset = expected[len(found) :], offset + len(found)
    return True


def _describe(path: Path) -> Blob:
    status = path.stat()
    return Blob(path.name, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))
