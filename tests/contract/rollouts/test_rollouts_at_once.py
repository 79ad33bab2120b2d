"""What takes a version out of the traffic takes effect at once, whatever is being loaded meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import grpc
import pytest
from patience import PATIENCE
from rollout_site import TIMEOUT_S, Fleet, PuppetBackend, Traffic, requests, until

from aiorch_server.backend import LoadContext
from aiorch_server.deployments import service
from aiorch_server.deployments.rollout import Command
from aiorch_server.registry.records import CanaryStep, Gates, RolloutPlan, RolloutState, Strategy, TrafficTarget

S = RolloutState
LONG = RolloutPlan(Strategy.CANARY, (CanaryStep(50.0, 600.0),), Gates())


class SlowLoads:
    """Every load stands still from now on, until ``end``."""

    def __init__(self) -> None:
        self._goes_on = threading.Event()
        self.standing: list[int] = []

    def __call__(self, context: LoadContext) -> None:
        self.standing.append(context.model_version)
        assert self._goes_on.wait(2 * TIMEOUT_S)

    def end(self) -> None:
        self._goes_on.set()


@pytest.fixture
def slow() -> Iterator[SlowLoads]:
    made = SlowLoads()
    yield made
    made.end()


async def share_two(fleet: Fleet) -> str:
    """Two versions share the traffic, in a canary."""
    await fleet.serve_first()
    rollout = await fleet.deploy(await fleet.push(), LONG)
    await fleet.wait(rollout.id, S.RUNNING)
    return rollout.id


async def only_first(traffic: Traffic) -> None:
    """Until 20 requests in a row were all answered by version 1, which is soon."""
    async with asyncio.timeout(5.0 * PATIENCE):
        while {(await traffic.ask())[0] for _ in range(20)} != {"1"}:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("verb", [Command.ABORT, Command.ROLLBACK])
async def test_the_end_of_a_canary_does_not_wait_for_a_scaling(fleet: Fleet, slow: SlowLoads, verb: Command) -> None:
    server = await fleet.start()
    id = await share_two(fleet)
    async with requests(server) as traffic:
        await traffic.wait_for(2, 5)
        PuppetBackend.on_load = slow
        await fleet.ask(service.scale, "m", 2)
        await until(lambda: bool(slow.standing))
        await fleet.direct(verb, "it is bad")
        await only_first(traffic)
        assert server.manager.versions("m") == [1, 2], "what is loaded is still so"
        slow.end()
        await until(lambda: server.manager.versions("m") == [1])
        assert (await fleet.wait(id)).state in (S.ABORTED, S.ROLLED_BACK)
        await only_first(traffic)
    assert not traffic.errors


async def test_shares_by_hand_do_not_wait_for_another_version(fleet: Fleet, slow: SlowLoads) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    second, third = await fleet.push(), await fleet.push()

    def half(other: int, share: int = 5_000) -> list[TrafficTarget]:
        return [TrafficTarget(1, 10_000 - share), TrafficTarget(other, share)]

    async with requests(server) as traffic:
        await fleet.ask(service.set_traffic, "m", half(second))
        await traffic.wait_for(second, 5)
        PuppetBackend.on_load = slow
        await fleet.ask(
            service.set_traffic, "m", [TrafficTarget(1, 2000), TrafficTarget(2, 4000), TrafficTarget(3, 4000)]
        )
        await until(lambda: slow.standing == [third])
        await fleet.ask(service.set_traffic, "m", [TrafficTarget(1, 10_000)])
        await only_first(traffic)
        slow.end()
        await until(lambda: server.manager.versions("m") == [1])
        await only_first(traffic)
    assert not traffic.errors


async def test_shares_that_change_meanwhile_are_not_set_back_by_what_was_loaded(fleet: Fleet, slow: SlowLoads) -> None:
    """The load that was under way ends after the change: it must not bring its own shares with it."""
    server = await fleet.start()
    await share_two(fleet)
    told = []
    async with requests(server) as traffic:
        PuppetBackend.on_load = slow
        await fleet.ask(service.scale, "m", 2)
        await until(lambda: bool(slow.standing))
        await fleet.direct(Command.ABORT)
        await only_first(traffic)
        found = server.manager.set_traffic

        def note(name: str, shares: object) -> None:
            told.append(shares)
            found(name, shares)  # type: ignore[arg-type]

        server.manager.set_traffic = note  # type: ignore[method-assign]
        slow.end()
        await until(lambda: server.manager.versions("m") == [1])
    assert all("version=2" not in str(shares) for shares in told), told


async def test_an_undeploy_takes_effect_while_a_version_is_loaded(fleet: Fleet, slow: SlowLoads) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    async with requests(server, callers=0) as traffic:
        PuppetBackend.on_load = slow
        await fleet.ask(service.scale, "m", 2)
        await until(lambda: bool(slow.standing))
        assert await traffic.ask() == ("1", 1.0)
        await fleet.ask(service.undeploy, "m")
        async with asyncio.timeout(5.0 * PATIENCE):
            with pytest.raises(grpc.aio.AioRpcError, match="has no available versions"):
                while True:
                    await traffic.ask()
        again = await fleet.deploy(1)
        async with asyncio.timeout(5.0 * PATIENCE):
            while server.manager.list_choices("m") == []:
                await asyncio.sleep(0.02)
        assert await traffic.ask() == ("1", 1.0), "it was still loaded"
        await fleet.ask(service.undeploy, "m")
        slow.end()
        await until(lambda: server.manager.index_model("m") == [])
        assert (await fleet.read(again.id)).state is S.ABORTED
        PuppetBackend.on_load = None
        await fleet.wait((await fleet.deploy(1)).id)
        assert await traffic.ask() == ("1", 1.0)


async def test_what_is_promoted_while_it_loads_is_warm_before_it_serves(
    fleet: Fleet, slow: SlowLoads, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "aiorch_server.deployments.deployed")
    server = await fleet.start()
    await fleet.serve_first()
    async with requests(server) as traffic:
        await traffic.wait_for(1, 20)
        PuppetBackend.on_load = slow
        rollout = await fleet.deploy(await fleet.push())
        await until(lambda: slow.standing == [2])
        wanted = server.deployments._reconciler._models["m"]  # type: ignore[union-attr]
        await fleet.direct(Command.PROMOTE)
        await until(lambda: wanted.wanted is not None and wanted.wanted.deployment.loaded == (2,))
        slow.end()
        assert (await fleet.wait(rollout.id)).state is S.SUCCEEDED
        await traffic.wait_for(2, 5)
    assert "'m' version 2: warm with" in caplog.text
    assert not traffic.errors
