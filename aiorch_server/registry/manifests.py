"""The list of files of an artefact, and the one digest that stands for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from aiorch_server.registry.records import ArtefactFile, Manifest


def make_manifest(files: Iterable[ArtefactFile]) -> Manifest:
    """The manifest of these files, ordered by path; the same files give the same digest, whatever their order."""
    ordered = tuple(sorted(files, key=lambda file: file.path))
    digest = hashlib.sha256()
    for file in ordered:
        digest.update(f"{file.sha256} {file.size_bytes} {file.path}\n".encode())
    return Manifest(digest.hexdigest(), ordered)
