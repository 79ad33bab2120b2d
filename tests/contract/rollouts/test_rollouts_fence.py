"""A driver that stood still, halted between what it read and what it writes: nothing of it counts any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from databases import KINDS, migrated_database
from rollout_site import TIMEOUT_S

from aiorch_server.deployments import service
from aiorch_server.deployments.driver import LEASE, Driver
from aiorch_server.registry.database import Database
from aiorch_server.registry.events import read_events
from aiorch_server.registry.leases import find_lease
from aiorch_server.registry.manifests import make_manifest
from aiorch_server.registry.records import ArtefactFile, Provenance, RolloutState, ServerStatus, VersionStatus
from aiorch_server.registry.rollouts import get_rollout
from aiorch_server.registry.servers import report
from aiorch_server.registry.versions import add_version

LEASE_S = 1.0


class Halting:
    """A database whose user is halted before its next step, as with SIGSTOP, until it is let go on."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.is_armed = False
        self.stands = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.failures: list[Exception] = []

    async def read(self, work: Callable[..., Any]) -> Any:
        return await self._database.read(work)

    async def run(self, work: Callable[..., Any]) -> Any:
        if self.is_armed and "_drive" in work.__qualname__:
            self.stands.set()
            await self.goes_on.wait()
        try:
            return await self._database.run(work)
        except Exception as error:
            self.failures.append(error)
            raise


@pytest.mark.parametrize("kind", KINDS)
async def test_a_driver_that_stood_still_writes_nothing(kind: str, tmp_path: Path) -> None:
    database = Database(migrated_database(kind, tmp_path))
    manifest = make_manifest([ArtefactFile("model.txt", 1, "0" * 64)])

    def begin(session: Any) -> str:
        add_version(session, "m", manifest, Provenance(), actor="ada", create_model=True)
        outcome = service.deploy(session, "m", actor="ada")
        assert outcome.rollout is not None
        return outcome.rollout.id

    def tell(generation: int) -> Callable[[Any], object]:
        status = ServerStatus("s", "m", generation, (VersionStatus(1, "READY"),), None)  # type: ignore[arg-type]
        return lambda session: report(session, "s", [status])

    halting = Halting(database)
    first = Driver(halting, server="first", lease_s=LEASE_S)  # type: ignore[arg-type]
    second = Driver(database, server="second", lease_s=LEASE_S)
    try:
        id = await database.run(begin)
        await database.run(tell(9))
        halting.is_armed = True
        first.start()
        first.notice(True)
        await asyncio.wait_for(halting.stands.wait(), TIMEOUT_S)
        assert first.is_driving
        second.start()
        second.notice(True)

        async def ends() -> None:
            while not (await database.read(lambda session: get_rollout(session, id))).state.is_end:
                second.notice(True)
                await asyncio.sleep(0.05)

        await asyncio.wait_for(ends(), TIMEOUT_S)
        lease = await database.read(lambda session: find_lease(session, LEASE))
        assert lease is not None and lease.epoch == 2 and lease.holder.startswith("second ")
        before = await database.read(read_events)
        halting.goes_on.set()
        async with asyncio.timeout(TIMEOUT_S):
            while not halting.failures:
                await asyncio.sleep(0.01)
        assert "is lost: second " in str(halting.failures[0])
        found = await database.read(lambda session: get_rollout(session, id))
        assert found.state is RolloutState.SUCCEEDED
        assert await database.read(read_events) == before, "nothing was done twice"
    finally:
        halting.goes_on.set()
        await asyncio.gather(first.stop(), second.stop())
        await database.aclose()
