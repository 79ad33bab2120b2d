"""A server that starts or loads for long is heard of meanwhile, follows changes, and stays ready for what serves."""

from __future__ import annotations

import asyncio
import threading

import pytest
from rollout_site import TIMEOUT_S, Fleet, PuppetBackend, poll, requests, until

from aiorch_server.app import Application
from aiorch_server.backend import LoadContext
from aiorch_server.deployments import service
from aiorch_server.registry.records import RolloutState, TrafficTarget
from aiorch_server.registry.servers import read_servers

S = RolloutState


class Hold:
    """Loads of a version wait until ``release``."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.began, self.may_go_on = threading.Event(), threading.Event()
        PuppetBackend.on_load = self

    def __call__(self, context: LoadContext) -> None:
        if context.model_version == self.version:
            self.began.set()
            assert self.may_go_on.wait(TIMEOUT_S)

    def release(self) -> None:
        self.may_go_on.set()


async def test_a_server_that_loads_for_long_stays_ready(fleet: Fleet) -> None:
    """All servers load a candidate at the same time: a balancer that asks them must not find nobody."""
    server = await fleet.start()
    await fleet.serve_first()
    hold = Hold(2)
    try:
        async with requests(server) as traffic:
            rollout = await fleet.deploy(await fleet.push())
            await asyncio.to_thread(hold.began.wait, TIMEOUT_S)
            assert server.controlplane.is_ready()
            await traffic.wait_for(1, 5)
            hold.release()
            assert (await fleet.wait(rollout.id)).state is S.SUCCEEDED
        assert not traffic.errors
    finally:
        hold.release()


async def test_a_server_that_starts_is_heard_of_and_follows(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it loads takes long: it tells that it is there, and a change that is made meanwhile counts."""
    monkeypatch.setattr("aiorch_server.deployments.reconciler.HEARTBEAT_S", 0.1)
    monkeypatch.setattr("aiorch_server.deployments.reconciler.POLL_S", 0.1)
    first = await fleet.start("first")
    await fleet.serve_first()
    other = await fleet.push(model="other")
    hold = Hold(1)
    starting = asyncio.create_task(fleet.start("late"))
    try:
        await asyncio.to_thread(hold.began.wait, TIMEOUT_S)

        async def find_late() -> list[str]:
            found = await fleet.database.read(read_servers)
            return [name for name in found if name != first.deployments.server]  # type: ignore[union-attr]

        (late,) = await poll(find_late)
        known = await fleet.database.read(read_servers)
        hold.version = 0
        again = await fleet.deploy(other, model="other")

        async def tells() -> None:
            while (await fleet.database.read(read_servers))[late] <= known[late]:
                await asyncio.sleep(0.05)

        await asyncio.wait_for(tells(), TIMEOUT_S)
        assert not starting.done()
        await fleet.ask(service.undeploy, "m")
        hold.release()
        application: Application = await asyncio.wait_for(starting, TIMEOUT_S)
        await until(lambda: application.manager.versions("m") == [])
        assert (await fleet.wait(again.id)).state is S.SUCCEEDED
        assert application.manager.versions("other") == [1]
        assert application.controlplane.is_ready()
    finally:
        hold.release()
        await asyncio.gather(starting, return_exceptions=True)


@pytest.mark.parametrize("is_shared", [False, True])
async def test_what_dies_at_rest_is_loaded_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, is_shared: bool
) -> None:
    """Long after its rollout; also a share by hand that is called candidate, of which no rollout decides."""
    server = await fleet.start()
    version = await fleet.serve_first(**({} if is_shared else {"dies_after": 5}))
    if is_shared:
        version = await fleet.push(dies_after=5)
        shares = [TrafficTarget(1, 5000, "stable"), TrafficTarget(2, 5000, "candidate")]
        await fleet.ask(service.set_traffic, "m", shares)
    await until(lambda: version in server.manager.versions("m"))
    model = server.deployments._reconciler._models["m"]  # type: ignore[union-attr]
    await until(lambda: model._settled.is_set() and not model._news.is_set())
    looks = 0

    def count(is_rolling: bool) -> None:
        nonlocal looks
        looks += not is_rolling

    monkeypatch.setattr(server.deployments._reconciler, "_on_contact", count)  # type: ignore[union-attr]
    fleet.nudge()
    await until(lambda: looks >= 2)
    monkeypatch.setattr("aiorch_server.deployments.deployed.FIRST_RETRY_S", 0.05)
    async with requests(server, callers=1):
        await until(lambda: PuppetBackend.loads["m", version] > 2)
