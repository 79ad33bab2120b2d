"""Who may drive: by the database's clock, fenced by an epoch."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from sqlalchemy import update

from aiorch_server.errors import Conflict
from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.database import Database
from aiorch_server.registry.leases import Lease, acquire_lease, check_lease, find_lease, release_lease, renew_lease
from aiorch_server.registry.schema import leases


def acquire(database: Database, holder: str, duration_s: float = 60.0) -> Lease | None:
    return database.run_blocking(lambda session: acquire_lease(session, "driver", holder, duration_s=duration_s))


def expire(database: Database) -> None:
    """Lets the time pass that the lease had, for the database."""
    database.run_blocking(
        lambda s: s.execute(update(leases).values(expires_at=read_clock(s) - timedelta(microseconds=1)))
    )


def test_one_holder_at_a_time(database: Database) -> None:
    first = acquire(database, "a")
    assert first is not None and first.epoch == 1
    assert acquire(database, "b") is None
    again = acquire(database, "a")
    assert again is not None and again.epoch == 1 and again.expires_at > first.expires_at
    renewed = database.run_blocking(lambda session: renew_lease(session, again, duration_s=120.0))
    assert renewed.expires_at > again.expires_at and renewed.epoch == 1
    assert database.read_blocking(lambda session: find_lease(session, "driver")) == renewed


def test_a_holder_that_stood_still_is_fenced_off(database: Database) -> None:
    old = acquire(database, "a")
    assert old is not None
    expire(database)
    for call in (check_lease, lambda session, lease: renew_lease(session, lease, duration_s=60.0)):
        with pytest.raises(Conflict, match="lease 'driver' of a ran out at"):
            database.run_blocking(lambda session, call=call: call(session, old))
    new = acquire(database, "b")
    assert new is not None and (new.holder, new.epoch) == ("b", 2)
    with pytest.raises(Conflict, match="lease 'driver' of a is lost: b has it"):
        database.run_blocking(lambda session: check_lease(session, old))
    database.run_blocking(lambda session: release_lease(session, old))  # too late, and harmless
    database.run_blocking(lambda session: check_lease(session, new))


def test_the_same_holder_after_a_gap_is_in_another_epoch(database: Database) -> None:
    old = acquire(database, "a")
    assert old is not None
    expire(database)
    new = acquire(database, "a")
    assert new is not None and new.epoch == 2
    with pytest.raises(Conflict, match="is lost"):
        database.run_blocking(lambda session: check_lease(session, old))


def test_a_lease_that_is_given_back_is_free_at_once(database: Database) -> None:
    old = acquire(database, "a")
    assert old is not None
    database.run_blocking(lambda session: release_lease(session, old))
    new = acquire(database, "b")
    assert new is not None and new.epoch == 2


def test_a_lease_runs_out_by_itself(database: Database) -> None:
    assert acquire(database, "a", duration_s=0.3) is not None
    begin, new = time.monotonic(), None
    while new is None and time.monotonic() < begin + 30:
        new = acquire(database, "b")
    assert new is not None and time.monotonic() - begin > 0.15


def test_the_clock_is_the_databases_and_goes_on_within_a_transaction(database: Database) -> None:
    first, second = database.run_blocking(lambda session: (read_clock(session), read_clock(session)))
    assert first.utcoffset() == timedelta(0) and first < second < first + timedelta(seconds=30)
