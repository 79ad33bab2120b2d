"""Garbage collection: blobs that no version refers to any more.

A version must not be recorded over a blob that is being deleted: an object store does not tell who puts the same
content between a look at its age and its deletion. So whoever deletes holds a lease meanwhile, and whoever records a
version does it in a transaction that sees whether anything may have been deleted since its blobs were put.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from aiorch_server.errors import StoreUnavailable
from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.leases import acquire_lease, find_lease, release_lease
from aiorch_server.registry.store import ArtefactStore

if TYPE_CHECKING:
    from aiorch_server.registry.database import Database
    from aiorch_server.registry.session import Session

#: Longer than any upload takes from its first blob to its version's record.
GRACE = timedelta(hours=24)
LEASE: Final = "collection"
#: No deletion is begun later than this after the lease was asked for; what is left is deleted the next time.
HOLD_S: Final = 15.0
#: The last deletion has its answer, or has been given up, long before the lease runs out.
LEASE_S: Final = 60.0
#: Whether deletions may still be begun.
MayGoOn = Callable[[], bool]


@contextlib.contextmanager
def undisturbed() -> Iterator[MayGoOn]:
    """For who is alone with a store: nobody uploads."""
    yield lambda: True


@contextlib.contextmanager
def exclude_uploads(database: Database, *, hold_s: float = HOLD_S) -> Iterator[MayGoOn]:
    """No version of this registry is recorded meanwhile; gives that nothing may be deleted where somebody else deletes.

    Where the store fails, the lease is left to run out: a deletion that it did not answer may still happen. Blocks;
    raises what ``Database.run_blocking`` raises.
    """
    ends = time.monotonic() + hold_s
    holder = f"collection {uuid.uuid4().hex}"
    lease = database.run_blocking(lambda session: acquire_lease(session, LEASE, holder, duration_s=LEASE_S))
    if lease is None:
        yield lambda: False
        return
    try:
        yield lambda: time.monotonic() < ends
    except StoreUnavailable:
        raise
    except BaseException:
        database.run_blocking(lambda session: release_lease(session, lease))
        raise
    database.run_blocking(lambda session: release_lease(session, lease))


def read_collections(session: Session) -> int | None:
    """How often blobs were deleted so far; None while they may be.

    Blobs that were put after this gave a number are there for as long as it gives the same one.
    """
    found = find_lease(session, LEASE)
    if found is None:
        return 0
    now = read_clock(session)
    # as leases.py: one that ends later than it could is from before the clock was set back
    return None if now < found.expires_at <= now + timedelta(seconds=LEASE_S) else found.epoch


def collect_garbage(
    store: ArtefactStore,
    list_referenced: Callable[[], Collection[str]],
    *,
    now: datetime,
    grace: timedelta = GRACE,
    begin: Callable[[], AbstractContextManager[MayGoOn]] = undisturbed,
) -> int:
    """Deletes blobs that were put longer than ``grace`` ago and are not referenced; gives the bytes that it freed.

    ``list_referenced`` gives the SHA-256 of every file of every version; it is asked again once ``begin`` keeps
    versions from being recorded. Blocks; several servers may do this at once. Raises RegistryUnavailable, and whatever
    ``list_referenced`` and ``begin`` raise: nothing more is deleted then.
    """
    stored_before = now - grace
    old = [blob for blob in store.blobs() if blob.stored_at < stored_before]
    referenced = frozenset(list_referenced()) if old else frozenset()
    if all(blob.sha256 in referenced for blob in old):
        return 0
    freed = 0
    with begin() as may_go_on:
        referenced = frozenset(list_referenced())
        for blob in old:
            if not may_go_on():
                break
            # an upload that brought the same content again made it new
            if blob.sha256 not in referenced and store.delete_if_older(blob.sha256, stored_before):
                freed += blob.size_bytes
    return freed
