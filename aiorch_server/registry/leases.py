"""Who may do what only one server may do; by the database's clock. See models.py for what these functions share.

A holder that stood still does not know that its lease ran out: it calls ``check_lease`` in each transaction in which it
makes use of it. A lease that was given to somebody else has another epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from aiorch_server.errors import Conflict
from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.names import check_short
from aiorch_server.registry.rows import put_row
from aiorch_server.registry.schema import leases


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as its holder got it; ``epoch`` grows each time that it is given anew."""

    name: str
    holder: str
    epoch: int
    expires_at: datetime


def acquire_lease(session: Session, name: str, holder: str, *, duration_s: float) -> Lease | None:
    """The lease, if nobody else holds it; whoever holds it already goes on with it, in the same epoch.

    ``holder`` is a name that no other process has, also not one that runs later; all ask for the same ``duration_s``.
    """
    check_short(holder, "a lease's holder")
    now = read_clock(session)
    found = find_lease(session, name)
    # One that ends later than it could if it were given now is from before the clock was set back.
    is_held = found is not None and now < found.expires_at <= now + timedelta(seconds=duration_s)
    if found is not None and is_held and found.holder != holder:
        return None
    epoch = 1 if found is None else found.epoch if is_held else found.epoch + 1
    return _put(session, Lease(name, holder, epoch, now + timedelta(seconds=duration_s)))


def renew_lease(session: Session, lease: Lease, *, duration_s: float) -> Lease:
    """The same lease for longer; Conflict where it has run out or is somebody else's."""
    now = check_lease(session, lease)
    return _put(session, Lease(lease.name, lease.holder, lease.epoch, now + timedelta(seconds=duration_s)))


def check_lease(session: Session, lease: Lease) -> datetime:
    """The time now, which is in the lease's; Conflict where it has run out or is somebody else's."""
    now = read_clock(session)
    found = find_lease(session, lease.name)
    if found is None or (found.holder, found.epoch) != (lease.holder, lease.epoch):
        holder = "nobody" if found is None else found.holder
        raise Conflict(f"lease {lease.name!r} of {lease.holder} is lost: {holder} has it")
    if found.expires_at <= now:
        raise Conflict(f"lease {lease.name!r} of {lease.holder} ran out at {found.expires_at.isoformat()}")
    return now


def release_lease(session: Session, lease: Lease) -> None:
    """Somebody else may have it at once; nothing happens where it is lost already."""
    found = find_lease(session, lease.name)
    if found is not None and (found.holder, found.epoch) == (lease.holder, lease.epoch):
        # The row stays: the next epoch must be another one.
        _put(session, Lease(found.name, found.holder, found.epoch, read_clock(session)))


def find_lease(session: Session, name: str) -> Lease | None:
    """The lease as it was given last, run out or not."""
    row = session.execute(select(leases).where(leases.c.name == name)).first()
    return None if row is None else Lease(**row._mapping)


def _put(session: Session, lease: Lease) -> Lease:
    values = {"holder": lease.holder, "epoch": lease.epoch, "expires_at": lease.expires_at}
    put_row(session, leases, {"name": lease.name}, values)
    return lease
