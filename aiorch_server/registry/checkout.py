"""Versions as folders on this machine: made from the store, verified, kept for the next load within a bound.

One version is ``<folder>/trees/<key>/<model>/``, laid out like a model's folder in a model repository. What an earlier
process made is read through once before it is used; what this process made or read is compared by size, time of change
and inode, and read through where those differ.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aiorch_server.config.names import check_name
from aiorch_server.errors import CapacityError, InvalidSettings, ModelLoadError
from aiorch_server.pauses import pause
from aiorch_server.registry.layout import Layout
from aiorch_server.registry.records import ArtefactFile, Manifest
from aiorch_server.registry.scratch import Scratch, sync_folder, telling, write_all
from aiorch_server.registry.store import ArtefactStore, BlobMissing

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_Mark = tuple[int, int, int]


@dataclass(slots=True, eq=False)
class _Entry:
    """One tree. ``changing`` is held while its files are made or looked at; the rest is under the cache's lock."""

    key: str
    directory: Path
    size_bytes: int
    is_made: bool = False
    #: Not to be used again; it goes when nobody uses it any more.
    is_retired: bool = False
    users: int = 0
    used: int = 0
    #: What each file looked like when its content was known to be right.
    marks: dict[str, _Mark] = field(default_factory=dict)
    changing: threading.Lock = field(default_factory=threading.Lock)


class Tree:
    """A version's files, in use: they stay until ``release``."""

    def __init__(self, directory: Path, give_back: Callable[[], None]) -> None:
        #: The model's folder: configuration and labels, and the version's folder by its number.
        self.directory = directory
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        """Gives it back; may be called again."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


class Checkout:
    """The cache folder of one server. All methods block; any thread may call them."""

    def __init__(self, store: ArtefactStore, folder: Path, *, most_bytes: int = 64 << 30) -> None:
        """Takes the folder for this process alone; InvalidSettings while another one has it."""
        self._store = store
        self._folder = folder.absolute()
        self._trees = self._folder / "trees"
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._uses = 0
        self._descriptor = -1
        with self._telling("preparing it"):
            self._trees.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self._folder / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise InvalidSettings(
                    f"folder {self._folder} is the artefact cache of another server that runs; give each its own"
                ) from None
            self._descriptor = descriptor
            self._scratch = Scratch(self._folder)
            self._entries: dict[str, _Entry] = {}
            self._find_entries()

    def acquire(self, model: str, version: int, manifest: Manifest) -> Tree:
        """The version's files, each verified against its SHA-256; the caller owns the tree.

        ModelLoadError naming the file that is missing in the store, or is not what it was, there or in the cache;
        RegistryUnavailable where the store is away; CapacityError when the disk is full.
        """
        layout = Layout(check_name(model), version, manifest)
        key = hashlib.sha256(f"{model}\0{version}\0{manifest.digest}".encode()).hexdigest()[:32]
        while True:
            entry = self._take(key, layout)
            tree = Tree(entry.directory, lambda entry=entry: self._give_back(entry))  # type: ignore[misc]
            is_right = False
            try:
                with entry.changing:
                    is_right = not entry.is_retired and self._prepare(entry, layout)
            finally:
                if not is_right:
                    self._retire(entry)
                    tree.release()
            if is_right:
                return tree

    def close(self) -> None:
        """Leaves the folder to others; trees in use stay where they are."""
        if self._descriptor >= 0:
            self._scratch.close()
            os.close(self._descriptor)
            self._descriptor = -1

    # who uses what

    def _take(self, key: str, layout: Layout) -> _Entry:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                directory = self._trees / f"{key}-{uuid.uuid4().hex[:8]}" / layout.model
                entry = self._entries[key] = _Entry(key, directory, layout.manifest.size_bytes)
            entry.users += 1
            self._note_use(entry)
            return entry

    def _give_back(self, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1
            self._note_use(entry)
            if entry.users or not entry.is_retired:
                return
        self._discard(entry.directory.parent)

    def _retire(self, entry: _Entry) -> None:
        with self._lock:
            entry.is_retired = True
            if self._entries.get(entry.key) is entry:
                del self._entries[entry.key]

    def _note_use(self, entry: _Entry) -> None:
        self._uses += 1
        entry.used = self._uses
        now = time.time_ns()
        with contextlib.suppress(OSError):
            os.utime(entry.directory.parent, ns=(now, now))  # tells the order after a restart

    def _make_room(self, needed: int) -> None:
        """Removes what was not used for longest until the cache is within its bound, or all that is left is in use."""
        while True:
            with self._lock:
                total = sum(entry.size_bytes for entry in self._entries.values())
                idle = [entry for entry in self._entries.values() if not entry.users]
                is_enough = total <= self._most_bytes and self._scratch.free_bytes() > needed
                if is_enough or not idle:
                    break
                oldest = min(idle, key=lambda entry: entry.used)
                oldest.is_retired = True
                del self._entries[oldest.key]
            self._discard(oldest.directory.parent)
        free = self._scratch.free_bytes()
        if free <= needed:
            raise CapacityError(
                f"artefact cache {self._folder} has no room for {needed} bytes: {free} are free; free some"
            )

    def _discard(self, folder: Path) -> None:
        grave = self._scratch.folder / f"dropped-{uuid.uuid4().hex}"
        with self._telling("dropping a folder"), contextlib.suppress(FileNotFoundError):
            folder.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)

    def _find_entries(self) -> None:
        found = []
        for tree in self._trees.iterdir():
            models = list(tree.iterdir()) if tree.is_dir() else []
            if len(models) != 1:
                self._discard(tree)
                continue
            sizes = (path.lstat().st_size for path in models[0].rglob("*") if path.is_file() and not path.is_symlink())
            key = tree.name.partition("-")[0]
            found.append((tree.stat().st_mtime_ns, _Entry(key, models[0], sum(sizes), is_made=True)))
        for _, entry in sorted(found, key=lambda each: each[0]):
            former = self._entries.pop(entry.key, None)
            if former is not None:
                self._discard(former.directory.parent)
            self._entries[entry.key] = entry
            self._uses += 1
            entry.used = self._uses

    # what is in it

    def _prepare(self, entry: _Entry, layout: Layout) -> bool:
        """Makes or checks the tree; False where it has to be made anew."""
        if not entry.is_made:
            self._make_room(layout.manifest.size_bytes)
            entry.marks = self._make(entry.directory, layout)
            entry.is_made = True
            return True
        with self._telling("checking files"):
            strangers = layout.find_strangers(entry.directory)
            if not entry.directory.is_dir() or strangers:
                logger.warning(
                    "%s is made anew: %s does not belong there, or is missing",
                    entry.directory,
                    ", ".join(strangers[:8]) or "all of it",
                )
                return False
            for file in layout.manifest.files:
                self._check(entry, layout, file)
        return True

    def _check(self, entry: _Entry, layout: Layout, file: ArtefactFile) -> None:
        path = entry.directory / layout.place(file)
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            mark = _mark(status)
            if mark == entry.marks.get(file.path):
                return
            if stat.S_ISREG(status.st_mode) and status.st_size == file.size_bytes and _hash(path) == file.sha256:
                entry.marks[file.path] = mark
                return
        raise ModelLoadError(
            f"file '{file.path}' of version {layout.version} of model '{layout.model}' is not what was uploaded: it "
            f"was changed or removed in the artefact cache {self._folder}. That copy is dropped; load the version "
            "again to get a new one from the store"
        )

    def _make(self, directory: Path, layout: Layout) -> dict[str, _Mark]:
        marks: dict[str, _Mark] = {}
        with self._scratch.workspace() as folder:
            tree = folder / "tree"
            made = tree / layout.model
            with self._telling("making a folder"):
                layout.make_folders(made)
            for file in layout.manifest.files:
                path = made / layout.place(file)
                self._copy(file, layout, path)
                marks[file.path] = _mark(path.lstat())
                pause()
            with self._telling("finishing a folder"):
                for current, _, _ in os.walk(tree):
                    sync_folder(Path(current))
                tree.rename(directory.parent)
                sync_folder(self._trees)
        return marks

    def _copy(self, file: ArtefactFile, layout: Layout, path: Path) -> None:
        told = f"file '{file.path}' of version {layout.version} of model '{layout.model}'"
        digest, size = hashlib.sha256(), 0
        try:
            with self._store.open(file.sha256) as source, self._create(path) as descriptor:
                # one byte more than there should be tells as well
                while size <= file.size_bytes and (chunk := source.read(_CHUNK)):
                    digest.update(chunk)
                    with self._telling("copying files"):
                        write_all(descriptor, chunk, size)
                    size += len(chunk)
                with self._telling("copying files"):
                    os.fsync(descriptor)
        except BlobMissing:
            raise ModelLoadError(
                f"{told} is missing in artefact store {self._store.name} (blob {file.sha256}); restore it, or upload "
                "the same files again"
            ) from None
        if size != file.size_bytes or digest.hexdigest() != file.sha256:
            raise ModelLoadError(
                f"{told} is not what was uploaded: blob {file.sha256} in artefact store {self._store.name} was changed "
                "or cut off; restore it, or upload the same files again"
            )

    @contextlib.contextmanager
    def _create(self, path: Path) -> Iterator[int]:
        with self._telling("making a file"):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _telling(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return telling(f"artefact cache {self._folder}", doing=doing)


def _mark(status: os.stat_result) -> _Mark:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
