"""Canaries: a good one is promoted, one that errs, is slow, differs or dies is taken back, all without a person."""

from __future__ import annotations

import pytest
from rollout_site import Fleet, PuppetBackend, requests, until

from aiorch_server.deployments.rollout import Command
from aiorch_server.errors import PreconditionFailed
from aiorch_server.registry.deployments import get_deployment
from aiorch_server.registry.records import CanaryStep, Gates, RolloutPlan, RolloutState, Strategy

S = RolloutState
STEPS = (CanaryStep(20.0, 1.0), CanaryStep(50.0, 1.0))
#: its gates compare latencies
pytestmark = pytest.mark.alone
GATES = Gates(max_error_rate=0.02, max_p99_ratio=4.0, min_agreement=0.9, min_samples=50)
CANARY = RolloutPlan(Strategy.CANARY, STEPS, GATES, sample_percent=20.0)


def long(gates: Gates = GATES, **options: object) -> RolloutPlan:
    """A canary that would bake for long."""
    return RolloutPlan(Strategy.CANARY, (CanaryStep(20.0, 600.0),), gates, sample_percent=20.0, **options)  # type: ignore[arg-type]


async def test_a_good_canary_is_promoted_step_by_step(fleet: Fleet) -> None:
    server = await fleet.start()
    await fleet.serve_first(delay_ms=1)
    async with requests(server) as traffic:
        version = await fleet.push(delay_ms=1)
        rollout = await fleet.deploy(version, CANARY)
        found = await fleet.wait(rollout.id, S.RUNNING)
        before = traffic.answers.total(), traffic.answers["2"]
        found = await fleet.wait(rollout.id)
        assert found.state is S.SUCCEEDED, found.reason
        await traffic.wait_for(version, 10)
    assert not traffic.errors
    assert before[1] < 0.5 * before[0]
    stable, candidate = found.reports
    assert candidate.requests >= 50 and candidate.errors == 0 and candidate.agreed == candidate.compared > 5
    assert 0.5 < candidate.p50_ms <= candidate.p99_ms and stable.requests > 0
    told = [event.text for event in await fleet.events() if event.rollout == rollout.id]
    assert [text for text in told if "step 1 of 2 (20 % to version 2) begins" in text]
    assert [text for text in told if "step 2 of 2 (50 % to version 2) begins" in text]
    assert server.manager.versions("m") == [2]


@pytest.mark.parametrize(
    ("manners", "words"),
    [
        ({"fail": True}, "requests failed"),
        ({"delay_ms": 60}, "its p99 is"),
        ({"add": 1}, "compared answers agree"),
        ({"dies_after": 20}, "version 2 does not serve on"),
    ],
)
async def test_a_bad_canary_is_rolled_back_before_its_time_is_over(
    fleet: Fleet, manners: dict[str, float], words: str
) -> None:
    server = await fleet.start()
    await fleet.serve_first(delay_ms=1)
    async with requests(server, callers=8) as traffic:
        await traffic.wait_for(1, 10)
        version = await fleet.push(**{"delay_ms": 1, **manners})
        rollout = await fleet.wait((await fleet.deploy(version, long())).id)
        assert rollout.state is S.ROLLED_BACK and words in rollout.reason, rollout.reason
        await until(lambda: server.manager.versions("m") == [1])
        await traffic.wait_for(1, 20)
    if "add" in manners:
        assert any(text.startswith("a request: ") and "became" in text for text in rollout.disagreements)
    if not manners.keys() & {"fail", "dies_after"}:
        assert not traffic.errors
    ended = (await fleet.events())[-1]
    assert (ended.kind, ended.version) == ("rollout.ended", 2) and words in ended.text
    deployment = await fleet.database.read(lambda session: get_deployment(session, "m"))
    assert (deployment.version, deployment.loaded, deployment.sampled) == (1, (1,), 0)


async def test_a_breach_may_be_left_to_a_person(fleet: Fleet) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    async with requests(server) as traffic:
        version = await fleet.push(fail=True)
        plan = long(Gates(max_error_rate=0.02, min_samples=10), is_rollback_manual=True)
        rollout = await fleet.deploy(version, plan)
        paused = await fleet.wait(rollout.id, S.PAUSED)
        assert "requests failed" in paused.reason
        assert server.manager.versions("m") == [1, 2]
        outcome = await fleet.direct(Command.ROLLBACK, "as seen")
        assert outcome.rollout and outcome.rollout.state is S.ROLLING_BACK
        found = await fleet.wait(rollout.id)
        assert (found.state, found.reason) == (S.ROLLED_BACK, "ada: rollback (as seen)")
        await traffic.wait_for(1, 10)


async def test_pause_resume_abort_promote(fleet: Fleet) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    async with requests(server) as traffic:
        second = await fleet.push()
        rollout = await fleet.deploy(second, RolloutPlan(Strategy.CANARY, (CanaryStep(30.0, 0.5),)))
        await fleet.wait(rollout.id, S.RUNNING)
        assert (await fleet.direct(Command.PAUSE, "lunch")).text
        assert not (await fleet.direct(Command.PAUSE)).has_changed
        paused = await fleet.read(rollout.id)
        assert (paused.state, paused.reason) == (S.PAUSED, "ada: pause (lunch)")
        await traffic.wait_for(2, 50)
        assert (await fleet.read(rollout.id)).state is S.PAUSED
        await fleet.direct(Command.RESUME)
        assert (await fleet.wait(rollout.id)).state is S.SUCCEEDED

        third = await fleet.push()
        rollout = await fleet.deploy(third, long(Gates()))
        await fleet.wait(rollout.id, S.RUNNING)
        await fleet.direct(Command.ABORT, "enough")
        assert (await fleet.read(rollout.id)).state is S.ABORTED
        await until(lambda: server.manager.versions("m") == [2])
        with pytest.raises(PreconditionFailed, match=f"nothing to abort; the last one, {rollout.id}, is aborted"):
            await fleet.direct(Command.ABORT)

        rollout = await fleet.deploy(third, long(Gates()))
        await fleet.wait(rollout.id, S.RUNNING)
        await fleet.direct(Command.PROMOTE)
        assert (await fleet.wait(rollout.id)).state is S.SUCCEEDED
        await until(lambda: server.manager.versions("m") == [3])
        await traffic.wait_for(3, 10)
    assert not traffic.errors


async def test_too_few_samples_wait_and_say_so(fleet: Fleet) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    version = await fleet.push()
    plan = RolloutPlan(Strategy.CANARY, (CanaryStep(50.0, 0.2),), Gates(max_error_rate=0.1, min_samples=10))
    rollout = await fleet.deploy(version, plan)

    async with requests(server, callers=0) as traffic:
        await fleet.wait(rollout.id, S.RUNNING)
        for _ in range(4):
            await traffic.ask()
        from rollout_site import poll

        async def look() -> bool:
            return "waits: the candidate has answered 2 of the 10" in (await fleet.read(rollout.id)).reason

        await poll(look)
        for _ in range(16):
            await traffic.ask()
    assert (await fleet.wait(rollout.id)).state is S.SUCCEEDED


async def test_blue_green(fleet: Fleet) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    async with requests(server) as traffic:
        await traffic.wait_for(1, 100)
        bad = await fleet.push(fail=True)
        plan = RolloutPlan(Strategy.BLUE_GREEN, gates=Gates(max_error_rate=0.1, min_samples=20), bake_s=600.0)
        rollout = await fleet.wait((await fleet.deploy(bad, plan)).id)
        assert rollout.state is S.ROLLED_BACK and "requests failed" in rollout.reason
        await traffic.wait_for(1, 10)
        good = await fleet.push()
        plan = RolloutPlan(Strategy.BLUE_GREEN, gates=Gates(max_p99_ratio=50.0, min_samples=20), bake_s=0.5)
        rollout = await fleet.deploy(good, plan)
        await fleet.wait(rollout.id, S.RUNNING)
        await traffic.wait_for(3, 10)
        assert server.manager.versions("m") == [1, 3]
        assert (await fleet.wait(rollout.id)).state is S.SUCCEEDED
        await until(lambda: server.manager.versions("m") == [3])


async def test_shadow_compares_and_promotes_nothing(fleet: Fleet) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    async with requests(server) as traffic:
        version = await fleet.push(add=1)
        plan = RolloutPlan(Strategy.SHADOW, gates=Gates(agreement_atol=0.5), bake_s=1.5, sample_percent=50.0)
        rollout = await fleet.wait((await fleet.deploy(version, plan)).id)
        assert rollout.state is S.SUCCEEDED and "nothing was promoted; 0 of" in rollout.reason
        assert rollout.reports[1].compared > 10 and rollout.disagreements
        await until(lambda: server.manager.versions("m") == [1])
        same = await fleet.push(add=0.1)
        rollout = await fleet.wait((await fleet.deploy(same, plan)).id)
        assert "(100.00%)" in rollout.reason
    assert not traffic.errors and set(traffic.answers) == {"1"}, "the answers of the copies go to nobody"
    assert PuppetBackend.rows["m", 2] > 10


async def test_ab_is_sticky(fleet: Fleet) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    version = await fleet.push(add=1)
    rollout = await fleet.deploy(version, RolloutPlan(Strategy.AB, candidate_percent=40.0))
    await fleet.wait(rollout.id, S.RUNNING)
    async with requests(server, callers=0) as traffic:
        await until(lambda: server.manager.versions("m") == [1, 2])
        chosen = {f"user {i}": (await traffic.ask(key=f"user {i}"))[0] for i in range(100)}
        assert 20 <= sum(each == "2" for each in chosen.values()) <= 60
        for key, where in chosen.items():
            assert (await traffic.ask(key=key))[0] == where
        assert (await fleet.read(rollout.id)).state is S.RUNNING, "it ends by a person alone"
        await fleet.direct(Command.PROMOTE)
        assert (await fleet.wait(rollout.id)).state is S.SUCCEEDED
