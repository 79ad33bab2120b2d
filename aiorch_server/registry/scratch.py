"""Working folders of one process on a disk that several may share; the next one sweeps what a killed one left."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from aiorch_server.errors import CapacityError, StoreUnavailable

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextlib.contextmanager
def telling(place: str, *, doing: str) -> Iterator[None]:
    """Turns an OSError into what the caller should hear: CapacityError for a full disk, else StoreUnavailable."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            text = f"{place} is full: {doing} needs more room ({error.strerror}); free some and try again"
            raise CapacityError(text) from None
        raise StoreUnavailable(f"{place} does not answer: {doing} failed ({error.strerror or error})") from error


def sync_folder(folder: Path) -> None:
    """Makes what was made, renamed or removed in ``folder`` last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock that the file ``path`` stands for; waits for others, also in other processes."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Scratch:
    """A folder of this process below ``<root>/staging``, held by a lock that ends with the process. Thread-safe."""

    def __init__(self, root: Path) -> None:
        """Makes ``root`` where it is missing, and removes what processes that are no more left there."""
        self._descriptor = -1
        self.root = root
        self.lock = root / "lock"
        staging = root / "staging"
        with telling(f"folder {root}", doing="preparing it"):
            staging.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Both within one lock: a folder that is made and not yet held must not look like a left one.
            with locked(self.lock):
                for found in staging.iterdir():
                    _sweep(found)
                self.folder = staging / uuid.uuid4().hex
                self.folder.mkdir(mode=0o700)
                self._descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """An empty folder that is gone afterwards."""
        with telling(f"folder {self.root}", doing="making a working folder"):
            folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def free_bytes(self) -> int:
        """What an ordinary user may still write to this disk."""
        with telling(f"folder {self.root}", doing="looking for room"):
            status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    def close(self) -> None:
        """Removes the folder; may be called again."""
        if self._descriptor >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._descriptor)
            self._descriptor = -1


def _sweep(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # its process lives
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Writes everything, or raises OSError with a part written."""
    rest = memoryview(content)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
