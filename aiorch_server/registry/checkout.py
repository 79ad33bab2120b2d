"""Versions as folders on this machine: made from the store, verified, kept for the next load within a bound.

One version is ``<folder>/trees/<key>/<model>/``, laid out like a model's folder in a model repository.
"""

from __future__ import annotations

from pathlib import Path

from aiorch_server.registry.records import Manifest
from aiorch_server.registry.store import ArtefactStore


class Tree:
    """A version's files, in use: not evicted until ``release``."""

    #: The model's folder: configuration and labels, and the version's folder by its number.
    directory: Path

    def release(self) -> None:
        """Gives it back; may be called again."""
        raise NotImplementedError


class Checkout:
    """The cache folder of one server. All methods block; any thread may call them."""

    def __init__(self, store: ArtefactStore, folder: Path, *, most_bytes: int = 64 << 30) -> None:
        """Takes the folder for this process alone; InvalidSettings while another one has it."""
        raise NotImplementedError

    def acquire(self, model: str, version: int, manifest: Manifest) -> Tree:
        """The version's files, each verified against its SHA-256; the caller owns the tree.

        ModelLoadError naming the file that is missing in the store, or is not what it was, there or in the cache;
        RegistryUnavailable where the store is away; CapacityError when the disk is full.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Leaves the folder to others; trees in use stay where they are."""
        raise NotImplementedError
