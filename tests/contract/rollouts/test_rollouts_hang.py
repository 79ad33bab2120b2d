"""A candidate that hangs tells of no error: what does not come back counts against it, and is not promoted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import grpc
import pytest
from patience import PATIENCE
from rollout_site import Fleet, PuppetBackend, Traffic, requests, until

from aiorch_server.registry.records import CanaryStep, Gates, RolloutPlan, RolloutState, Strategy

S = RolloutState
GATES = Gates(max_error_rate=0.02, min_samples=50, max_wait_s=0.5)


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """What hangs goes on when this is set, at the latest at the test's end."""
    goes_on = PuppetBackend.goes_on = threading.Event()
    yield goes_on
    goes_on.set()


async def ask_all(traffic: Traffic, count: int, timeout_s: float) -> list[str]:
    """How so many requests at a time end, with little patience."""

    async def ask() -> str:
        try:
            return (await traffic.ask(timeout_s=timeout_s))[0]
        except grpc.aio.AioRpcError as error:
            return error.code().name

    return await asyncio.gather(*(ask() for _ in range(count)))


def canary(bake_s: float, gates: Gates = GATES) -> RolloutPlan:
    return RolloutPlan(Strategy.CANARY, (CanaryStep(50.0, bake_s),), gates)


async def test_a_candidate_that_answers_nothing_is_not_promoted_at_max_wait(
    fleet: Fleet, hanging: threading.Event
) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    version = await fleet.push(hangs=True)
    async with requests(server, callers=0) as traffic:
        rollout = await fleet.deploy(version, canary(0.3))
        await fleet.wait(rollout.id, S.RUNNING)
        await until(lambda: server.manager.versions("m") == [1, 2])
        ends = await ask_all(traffic, 40, 0.3)
        assert "DEADLINE_EXCEEDED" in ends and "1" in ends
        found = await fleet.wait(rollout.id, S.ROLLING_BACK)
        assert "was answered" in found.reason or "not answered" in found.reason, found.reason
        await until(lambda: server.manager.versions("m") == [1])
        assert set(await ask_all(traffic, 8, 5.0)) == {"1"}
        hanging.set()
        assert (await fleet.wait(rollout.id)).state is S.ROLLED_BACK


@pytest.mark.parametrize("gates", [Gates(), Gates(max_p99_ratio=3.0, min_samples=5, max_wait_s=0.1)])
async def test_a_candidate_that_hangs_is_taken_back_while_its_callers_still_wait(
    fleet: Fleet, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch, gates: Gates
) -> None:
    """Nobody has given up: nothing is counted yet, but how long nothing came back."""
    monkeypatch.setattr("aiorch_server.deployments.gates.STUCK_S", 2.0)
    server = await fleet.start()
    await fleet.serve_first()
    version = await fleet.push(hangs=True)
    async with requests(server, callers=0) as traffic:
        rollout = await fleet.deploy(version, canary(3.0 * PATIENCE, gates))
        await fleet.wait(rollout.id, S.RUNNING)
        await until(lambda: server.manager.versions("m") == [1, 2])
        waiting = asyncio.create_task(ask_all(traffic, 10, 60.0))
        found = await fleet.wait(rollout.id, S.ROLLING_BACK)
        assert "it hangs: nothing has come back for" in found.reason, found.reason
        await until(lambda: server.manager.versions("m") == [1])
        assert set(await ask_all(traffic, 8, 5.0)) == {"1"}
        hanging.set()
        assert (await fleet.wait(rollout.id)).state is S.ROLLED_BACK
        assert set(await waiting) == {"1", "2"}, "who waited is answered"


async def test_a_candidate_that_loses_some_is_taken_back(fleet: Fleet, hanging: threading.Event) -> None:
    """It answers, but not everything in time; the stable version does."""
    server = await fleet.start()
    await fleet.serve_first()
    version = await fleet.push(delay_ms=40)
    async with requests(server, callers=0) as traffic:
        rollout = await fleet.deploy(version, canary(600.0, Gates(min_agreement=0.5, min_samples=5000)))
        await fleet.wait(rollout.id, S.RUNNING)
        await until(lambda: server.manager.versions("m") == [1, 2])

        async def load() -> None:
            while True:
                await ask_all(traffic, 64, 0.06)

        task = asyncio.create_task(load())
        found = await fleet.wait(rollout.id)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert found.state is S.ROLLED_BACK and "requests were not answered" in found.reason, found.reason
