"""Garbage collection: blobs that no version refers to any more."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime, timedelta

from aiorch_server.registry.store import ArtefactStore

#: Longer than any upload takes from its first blob to its version's record.
GRACE = timedelta(hours=24)


def collect_garbage(
    store: ArtefactStore, list_referenced: Callable[[], Collection[str]], *, now: datetime, grace: timedelta = GRACE
) -> int:
    """Deletes blobs that were put longer than ``grace`` ago and are not referenced; gives the bytes that it freed.

    ``list_referenced`` gives the SHA-256 of every file of every version; it is asked after the store was listed, so
    that what is committed meanwhile counts. Blocks; several servers may do this at once. Raises RegistryUnavailable,
    and whatever ``list_referenced`` raises: nothing more is deleted then.
    """
    stored_before = now - grace
    old = [blob for blob in store.blobs() if blob.stored_at < stored_before]
    if not old:
        return 0
    referenced = frozenset(list_referenced())
    return sum(
        blob.size_bytes
        for blob in old
        # an upload that brought the same content again made it new
        if blob.sha256 not in referenced and store.delete_if_older(blob.sha256, stored_before)
    )
