"""Fingerprints of files and folders: from their metadata alone (names, sizes, times and inodes), or their contents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

#: An exported model has tens of files; a folder with more entries than this is something else.
MOST_ENTRIES = 20_000


class TooManyEntries(Exception):
    """A folder holds more entries than a model can have."""


class OutsideRoot(Exception):
    """A link leads out of the repository."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(f"{path} leads out of the repository")


def hash_files(paths: Iterable[Path], root: Path) -> str:
    """The fingerprint of these files; raises OutsideRoot, and OSError for one that cannot be seen."""
    return _hash(_describe(path.name, path, root) for path in sorted(paths))


def hash_folder(folder: Path, root: Path) -> str:
    """The fingerprint of everything below ``folder``, but for hidden entries and Python's byte code.

    ``root`` is the resolved repository root. Links are followed, each folder once, so a circle of links ends. Raises
    OutsideRoot, TooManyEntries, and OSError for what cannot be read.
    """
    return _hash(_describe(name, path, root) for name, path in _walk(folder))


def hash_contents(folder: Path, files: Iterable[Path]) -> str:
    """The fingerprint of what is written in ``files`` and in everything below ``folder``, the same on all machines.

    Passes over what ``hash_folder`` passes over; reads every byte. Raises TooManyEntries and OSError.
    """
    return _hash(
        f"{name}\0{_hash_file(path)}" for name, path in (*((file.name, file) for file in sorted(files)), *_walk(folder))
    )


def stay_inside(path: Path, root: Path) -> Path:
    """``path`` resolved; OutsideRoot if that is not below the resolved ``root``."""
    resolved = path.resolve()
    if not resolved.is_relative_to(root):
        raise OutsideRoot(path)
    return resolved


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    pending, entered, seen = [(folder, "")], set[tuple[int, int]](), 0
    while pending:
        current, prefix = pending.pop()
        status = current.stat()
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(current) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            seen += 1
            if seen > MOST_ENTRIES:
                raise TooManyEntries(f"{folder} holds more than {MOST_ENTRIES} files")
            # What loading a model writes beside it must not look like a new model.
            if entry.name == "__pycache__" or entry.name.startswith("."):
                continue
            path = f"{prefix}{entry.name}"
            yield path, Path(entry.path)
            if entry.is_dir():
                pending.append((Path(entry.path), f"{path}/"))


def _hash_file(path: Path) -> str:
    if path.is_dir():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _describe(name: str, path: Path, root: Path) -> str:
    if path.is_symlink():
        stay_inside(path, root)
    status = path.stat()
    # A folder's own size and time change with entries that are passed over; those that count speak for themselves.
    if path.is_dir():
        return f"{name}\0{status.st_ino}"
    return f"{name}\0{status.st_ino}\0{status.st_size}\0{status.st_mtime_ns}"


def _hash(lines: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()
