"""Replace: the first version at once, the next one without a lost request, a bad one not at all."""

from __future__ import annotations

import pytest
from rollout_site import Fleet, PuppetBackend, requests, until

from aiorch_server.backend import LoadContext
from aiorch_server.deployments import service
from aiorch_server.deployments.desired import Wanted
from aiorch_server.deployments.reconciler import Reconciler
from aiorch_server.deployments.rollout import Command
from aiorch_server.errors import Conflict, ModelLoadError, PreconditionFailed, UnknownVersion
from aiorch_server.registry.deployments import get_deployment
from aiorch_server.registry.records import CanaryStep, RolloutPlan, RolloutState, Strategy, TrafficTarget

S = RolloutState


async def test_the_first_version_serves_at_once(fleet: Fleet) -> None:
    server = await fleet.start()
    assert server.controlplane.is_ready()
    version = await fleet.push(add=3)
    rollout = await fleet.wait((await fleet.deploy(version)).id)
    assert (rollout.state, rollout.from_version, rollout.reason) == (S.SUCCEEDED, 0, "version 1 serves")
    async with requests(server, callers=0) as traffic:
        assert await traffic.ask(1.0) == ("1", 4.0)
    deployment = await fleet.database.read(lambda session: get_deployment(session, "m"))
    assert (deployment.version, deployment.previous_version, deployment.loaded) == (1, 0, (1,))
    assert [event.kind for event in await fleet.events()] == ["rollout.began", "rollout.step", "rollout.ended"]


async def test_replace_under_load_loses_nothing(fleet: Fleet) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    async with requests(server) as traffic:
        await traffic.wait_for(1, 100)
        for _ in range(3):
            version = await fleet.push(add=1)
            rollout = await fleet.wait((await fleet.deploy(version)).id)
            assert rollout.state is S.SUCCEEDED
            await traffic.wait_for(version, 50)
    assert not traffic.errors
    assert server.manager.versions("m") == [4]
    assert not server.manager.problems()
    back = await fleet.direct(Command.ROLLBACK, "it was better")
    assert back.rollout and (back.rollout.from_version, back.rollout.to_version) == (4, 3)
    assert (await fleet.wait(back.rollout.id)).state is S.SUCCEEDED
    assert server.manager.versions("m") == [3]
    deployment = await fleet.database.read(lambda session: get_deployment(session, "m"))
    assert (deployment.version, deployment.previous_version) == (3, 4)


async def test_the_new_version_is_warmed_with_recorded_requests(fleet: Fleet) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    async with requests(server) as traffic:
        await traffic.wait_for(1, 100)
        version = await fleet.push()
        rollout = await fleet.deploy(version)
        await fleet.wait(rollout.id, S.PROMOTING, S.SUCCEEDED)
        await traffic.wait_for(version, 1)
    assert not traffic.errors
    assert PuppetBackend.rows["m", 2] > traffic.answers["2"], "it answered more than was asked of it"


async def test_a_version_that_does_not_load_changes_nothing(fleet: Fleet) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    async with requests(server) as traffic:
        version = await fleet.push(refuses="no legs")
        rollout = await fleet.wait((await fleet.deploy(version)).id)
        assert rollout.state is S.FAILED
        assert "version 2 does not serve on " in rollout.reason and "no legs" in rollout.reason
        await traffic.wait_for(1, 20)
        assert server.controlplane.is_ready()
        again = await fleet.wait((await fleet.deploy(version)).id)
        assert again.state is S.FAILED and PuppetBackend.loads["m", 2] == 2, "it was tried again"
        good = await fleet.push()
        assert (await fleet.wait((await fleet.deploy(good)).id)).state is S.SUCCEEDED
        await traffic.wait_for(good, 20)
    assert not traffic.errors
    assert server.manager.versions("m") == [3]


async def test_a_first_version_that_does_not_load(fleet: Fleet) -> None:
    server = await fleet.start()
    version = await fleet.push(refuses="no legs")
    rollout = await fleet.wait((await fleet.deploy(version)).id)
    assert rollout.state is S.FAILED and "no legs" in rollout.reason
    assert server.controlplane.is_ready(), "a deployment that failed does not take the server away from the others"
    good = await fleet.push()
    assert (await fleet.wait((await fleet.deploy(good)).id)).state is S.SUCCEEDED
    assert server.manager.versions("m") == [2]


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_second_try_is_a_try(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, is_first: bool) -> None:
    """Also where the server never saw what was wanted between the two: the old failure says nothing about the new."""
    want, failing = Reconciler._want, [True]

    def skip(self: Reconciler, found: dict[str, Wanted]) -> None:
        has_ended = any(each.rollout is None for each in found.values())
        if not (failing[0] and self._models and has_ended):
            want(self, found)

    def refuse(context: LoadContext) -> None:
        if context.model_version == version and failing[0]:
            raise ModelLoadError("the disk is full")

    server = await fleet.start()
    if not is_first:
        await fleet.serve_first()
    version = await fleet.push()
    monkeypatch.setattr(Reconciler, "_want", skip)
    monkeypatch.setattr(PuppetBackend, "on_load", refuse)
    rollout = await fleet.wait((await fleet.deploy(version)).id)
    assert rollout.state is S.FAILED and "the disk is full" in rollout.reason
    again = await fleet.deploy(version)
    failing[0] = False
    rollout = await fleet.wait(again.id)
    assert rollout.state is S.SUCCEEDED, rollout.reason
    await until(lambda: server.manager.versions("m") == [version])


async def test_deploying_what_is_deployed_does_nothing_and_says_so(fleet: Fleet) -> None:
    await fleet.start()
    version = await fleet.serve_first()
    outcome = await fleet.ask(service.deploy, "m", version=version)
    assert (outcome.has_changed, outcome.text) == (False, "version 1 of 'm' is deployed already")
    assert PuppetBackend.loads["m", 1] == 1


async def test_two_operators(fleet: Fleet) -> None:
    await fleet.start()
    await fleet.serve_first()
    second, third = await fleet.push(), await fleet.push()
    generation = (await fleet.database.read(lambda session: get_deployment(session, "m"))).generation
    plan = RolloutPlan(Strategy.CANARY, (CanaryStep(10.0, 600.0),))
    first = await fleet.deploy(second, plan, expected_generation=generation)
    with pytest.raises(PreconditionFailed, match=f"rollout {first.id} of 'm' to version 2 is .*, begun by ada at"):
        await fleet.deploy(third)
    with pytest.raises(Conflict, match=r"at generation \d+ by now, not \d+: ada changed it at"):
        await fleet.deploy(third, expected_generation=generation)
    with pytest.raises(PreconditionFailed, match=first.id):
        await fleet.ask(service.set_traffic, "m", [TrafficTarget(1, 10_000)])
    with pytest.raises(UnknownVersion):
        await fleet.deploy(99)
    await fleet.direct(Command.PROMOTE)
    assert (await fleet.wait(first.id)).state is S.SUCCEEDED


async def test_scale_and_shares_by_hand_and_undeploy(fleet: Fleet) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    second = await fleet.push(add=1)
    async with requests(server) as traffic:
        await traffic.wait_for(1, 10)
        outcome = await fleet.ask(service.scale, "m", 3)
        assert outcome.text == "'m': 3 instances per server instead of those"
        await until(lambda: any(each.instances.alive == 3 for each in server.manager.servables()))
        await traffic.wait_for(1, 10)
        shares = [TrafficTarget(1, 5_000), TrafficTarget(second, 5_000)]
        await fleet.ask(service.set_traffic, "m", shares)
        await traffic.wait_for(second, 10)
        assert not traffic.errors
        rollout = await fleet.wait((await fleet.deploy(second)).id)
        assert (rollout.state, rollout.from_version) == (S.SUCCEEDED, 1)
        await until(lambda: server.manager.versions("m") == [2])
        assert not traffic.errors
        await fleet.ask(service.undeploy, "m")
        await until(lambda: not server.manager.is_known("m"))
        await until(lambda: bool(traffic.errors))
    third = await fleet.push()
    assert (await fleet.wait((await fleet.deploy(third)).id)).state is S.SUCCEEDED, "and it may come back"


async def test_what_is_undeployed_leaves_the_index(fleet: Fleet) -> None:
    server = await fleet.start()
    await fleet.serve_first()
    await server.manager.poll()  # it is seen in the repository, as a model of a folder is
    assert [(entry.name, entry.state.value) for entry in server.manager.index()] == [("m", "READY")]
    await fleet.ask(service.undeploy, "m")
    await until(lambda: not server.manager.index())
    await server.manager.poll()
    assert not server.manager.index()


async def test_code_needs_consent(fleet: Fleet) -> None:
    server = await fleet.start()
    files = {
        "model.py": b"class Model:\n    inputs = outputs = [('X', 'FP32', [1])]\n    def execute(self, i): return i\n"
    }
    version = await fleet.push(files=files)
    with pytest.raises(PreconditionFailed, match="start it with --allow-code"):
        await fleet.deploy(version, allow_code=False)
    rollout = await fleet.wait((await fleet.deploy(version)).id)
    assert rollout.state is S.FAILED
    assert "which is not allowed here (allow_code is off)" in rollout.reason
    assert server.controlplane.is_ready()


async def test_a_folder_of_the_same_name_is_left_alone(fleet: Fleet) -> None:
    folder = fleet.folder / "one" / "models" / "m"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "puppet.json").write_text('{"add": 7}')
    server = await fleet.start()
    version = await fleet.push()
    rollout = await fleet.wait((await fleet.deploy(version)).id)
    assert rollout.state is S.FAILED and "the model repository's folder holds a model of this name" in rollout.reason
    async with requests(server, callers=0) as traffic:
        assert await traffic.ask(1.0) == ("1", 8.0)
