"""Deployments that requests load: after a restart, within a budget, and through a rollout."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from databases import migrated_database
from rollout_site import CONFIG, Fleet, PuppetBackend, requests, until

from aiorch_server.registry.records import RolloutState


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    made = Fleet(tmp_path, migrated_database("sqlite", tmp_path))
    PuppetBackend.loads.clear()
    yield made
    await made.close()


async def test_a_deployment_on_demand_waits_for_requests_after_a_restart_and_rolls_on(fleet: Fleet) -> None:
    server = await fleet.start()
    rollout = await fleet.wait((await fleet.deploy(await fleet.push(add=3), is_on_demand=True)).id)
    assert rollout.state is RolloutState.SUCCEEDED, rollout.reason
    await fleet.stop(server)
    PuppetBackend.loads.clear()

    server = await fleet.start()
    assert server.controlplane.is_ready()
    assert not PuppetBackend.loads
    assert server.manager.is_ready("m")
    async with requests(server, callers=0) as traffic:
        assert await traffic.ask(1.0) == ("1", 4.0)
    assert PuppetBackend.loads == {("m", 1): 1}

    rollout = await fleet.wait((await fleet.deploy(await fleet.push(add=5), is_on_demand=True)).id)
    assert rollout.state is RolloutState.SUCCEEDED, rollout.reason
    async with requests(server, callers=0) as traffic:
        assert await traffic.ask(1.0) == ("2", 6.0)


async def test_a_rollout_loads_what_no_request_has(fleet: Fleet) -> None:
    server = await fleet.start()
    await fleet.wait((await fleet.deploy(await fleet.push(add=3), is_on_demand=True)).id)
    await fleet.stop(server)
    server = await fleet.start()
    assert server.manager.versions("m") == []
    rollout = await fleet.wait((await fleet.deploy(await fleet.push(add=5), is_on_demand=True)).id)
    assert rollout.state is RolloutState.SUCCEEDED, rollout.reason
    assert server.manager.versions("m") == [2]


async def test_deployments_make_room_for_each_other_but_not_those_that_always_serve(fleet: Fleet) -> None:
    budget = {"memory_budget_bytes": 30 << 20, "residence_secs": 0, "room_timeout_secs": 0.3}
    server = await fleet.start(lifecycle=budget)
    files = {"config.pbtxt": CONFIG, "puppet.json": b'{"add": 3}', "weights": bytes(20 << 20)}
    for name in ("a", "b"):
        version = await fleet.push(name, files=files)
        rollout = await fleet.wait((await fleet.deploy(version, model=name, is_on_demand=True)).id)
        assert rollout.state is RolloutState.SUCCEEDED, rollout.reason
    await until(lambda: server.manager.ready("b") and not server.manager.ready("a"))
    async with requests(server, model="a", callers=0) as traffic:
        assert await traffic.ask(1.0) == ("1", 4.0)
    assert not server.manager.ready("b")
