"""The wall clock jumps by an hour: the lease is neither stuck nor held twice, and nobody is promoted early."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from databases import migrated_database
from patience import PATIENCE
from rollout_site import Fleet, poll, until

from aiorch_server.errors import Conflict
from aiorch_server.registry.database import Database
from aiorch_server.registry.leases import Lease, acquire_lease, check_lease
from aiorch_server.registry.records import RolloutPlan, RolloutState, Strategy

HOUR = timedelta(hours=1)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(migrated_database("sqlite", tmp_path))
    yield made
    made.close()


def jump(monkeypatch: pytest.MonkeyPatch, by: timedelta) -> None:
    """From now on the machine's clock, which is SQLite's, is so far off."""
    monkeypatch.setattr("aiorch_server.registry.leases.read_clock", lambda session: datetime.now(UTC) + by)


def take(database: Database, holder: str) -> Lease | None:
    found: Lease | None = database.run_blocking(lambda s: acquire_lease(s, "rollouts", holder, duration_s=6.0))
    return found


def is_held(database: Database, lease: Lease | None) -> bool:
    def check(session: Any) -> None:
        assert lease is not None
        check_lease(session, lease)

    try:
        database.run_blocking(check)
    except Conflict:
        return False
    return True


@pytest.mark.parametrize("by", [HOUR, -HOUR])
def test_who_drove_before_the_jump_does_not_drive_beside_who_drives_after_it(
    database: Database, monkeypatch: pytest.MonkeyPatch, by: timedelta
) -> None:
    first = take(database, "first")
    assert take(database, "second") is None
    jump(monkeypatch, by)
    second = take(database, "second")
    assert second is not None and first is not None and second.epoch > first.epoch, "a dead driver holds nobody up"
    assert not is_held(database, first) and is_held(database, second)
    assert take(database, "first") is None


def test_the_holder_goes_on_after_the_clock_was_set_back(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    take(database, "first")
    jump(monkeypatch, -HOUR)
    renewed = take(database, "first")
    assert is_held(database, renewed)
    assert take(database, "second") is None


@pytest.mark.parametrize("by", [HOUR, -HOUR])
async def test_a_step_lasts_as_long_as_it_should(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, by: timedelta) -> None:
    """Forward it was over at once, back it lasted an hour more."""
    offset = [timedelta()]
    server = await fleet.start()
    await fleet.serve_first()
    for module in ("registry.leases", "registry.servers", "deployments.driver", "deployments.service"):
        monkeypatch.setattr(f"aiorch_server.{module}.read_clock", lambda session: datetime.now(UTC) + offset[0])
    plan = RolloutPlan(Strategy.BLUE_GREEN, bake_s=4.0 * PATIENCE)
    rollout = await fleet.deploy(await fleet.push(), plan)
    await fleet.wait(rollout.id, RolloutState.RUNNING)
    began = time.monotonic()
    offset[0] = by

    async def told() -> bool:
        return any("begins anew, because the clock was set" in event.text for event in await fleet.events())

    await poll(told, lambda: fleet.read(rollout.id))
    ended = await fleet.wait(rollout.id)
    assert ended.state is RolloutState.SUCCEEDED, ended.reason
    assert time.monotonic() - began >= 4.0 * PATIENCE
    await until(lambda: server.manager.versions("m") == [2])


async def test_who_drives_because_the_clock_was_set_promotes_nobody_early(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease ran out by the new clock, and the next driver had never driven."""
    offset = [timedelta()]
    servers = [await fleet.start(name) for name in ("one", "two")]
    await fleet.serve_first()
    for module in ("registry.leases", "registry.servers", "deployments.driver", "deployments.service"):
        monkeypatch.setattr(f"aiorch_server.{module}.read_clock", lambda session: datetime.now(UTC) + offset[0])
    plan = RolloutPlan(Strategy.BLUE_GREEN, bake_s=4.0 * PATIENCE)
    rollout = await fleet.deploy(await fleet.push(), plan)
    await fleet.wait(rollout.id, RolloutState.RUNNING)
    parts = [each.deployments for each in servers if each.deployments is not None]
    driver = next(part for part in parts if part.is_driving)._driver
    assert driver._task is not None
    driver._task.cancel()  # as if it had died: it leaves its lease behind
    driver._lease = None
    began = time.monotonic()
    offset[0] = HOUR
    await until(lambda: any(part.is_driving for part in parts))
    ended = await fleet.wait(rollout.id)
    assert ended.state is RolloutState.SUCCEEDED, ended.reason
    assert time.monotonic() - began >= 4.0 * PATIENCE
    told = [event.text for event in await fleet.events() if "begins anew, because the clock was set" in event.text]
    assert len(told) == 1, told
