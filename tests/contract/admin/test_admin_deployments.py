"""Deployments but for events: every rpc, good and bad. What follows from them is the reconciler's and driver's."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from admin_site import Site, refused, speaking_as, status_of
from aiorch_proto.admin.v1 import deployments_pb2 as pb
from databases import on_every_database

from aiorch_server.registry.records import ServerStatus, VersionStatus
from aiorch_server.registry.servers import report
from aiorch_server.security.roles import Role

STATE = pb.RolloutState.Name


@pytest.fixture
async def digits(site: Site) -> Site:
    """A site with three versions of digits."""
    for _ in range(3):
        await site.upload("digits", create_model=True)
    site.deployments = site.stub.Deployments  # type: ignore[attr-defined]
    return site


async def deploy(site: Site, version: int = 0, model: str = "digits", **fields: Any) -> pb.Deployment:
    return await site.stub.Deployments.Deploy(pb.DeployRequest(model=model, version=version, **fields))


async def finish(site: Site) -> None:
    """As the driver would: the rollout that is under way ends well."""
    await site.stub.Deployments.Promote(pb.PromoteRequest(model="digits"))

    def work(session: Any) -> None:
        from dataclasses import replace

        from aiorch_server.deployments.rollout import Observation, advance
        from aiorch_server.deployments.writing import write_move
        from aiorch_server.registry.clock import read_clock
        from aiorch_server.registry.deployments import get_deployment
        from aiorch_server.registry.rollouts import find_open_rollout

        while (found := find_open_rollout(session, "digits")) is not None:
            move = advance(found, replace(Observation(), n_servers=1), read_clock(session))
            assert move.rollout != found
            write_move(session, found, move, get_deployment(session, "digits"), actor="driver")

    await site.database.run(work)


async def test_a_deployment_is_not_ready_before_its_rollout_has_ended(digits: Site) -> None:
    """However the answer is asked for: servers have done all that is wanted of them when a rollout is just begun."""
    stub = digits.stub.Deployments

    async def tell(generation: int, *versions: int) -> None:
        seen = [VersionStatus(each, "READY") for each in versions]
        status = ServerStatus("one", "digits", generation, tuple(seen), None)  # type: ignore[arg-type]
        await digits.database.run(lambda session: report(session, "one", [status]))

    await deploy(digits, 1)
    await finish(digits)
    found = await stub.GetDeployment(pb.GetDeploymentRequest(model="digits"))
    await tell(found.generation, 1)
    found = await stub.GetDeployment(pb.GetDeploymentRequest(model="digits"))
    assert found.state == pb.DEPLOYMENT_STATE_READY
    made = await deploy(digits, 2)
    assert made.state == pb.DEPLOYMENT_STATE_PROGRESSING
    await tell(made.generation, 1)
    listed = (await stub.ListDeployments(pb.ListDeploymentsRequest(read_mask={"paths": ["state"]}))).deployments[0]
    asked = (await stub.GetDeployment(pb.GetDeploymentRequest(model="digits"))).state
    assert (asked, listed.state) == (pb.DEPLOYMENT_STATE_PROGRESSING,) * 2
    await finish(digits)
    found = await stub.GetDeployment(pb.GetDeploymentRequest(model="digits"))
    await tell(found.generation, 2)
    found = await stub.GetDeployment(pb.GetDeploymentRequest(model="digits"))
    assert found.state == pb.DEPLOYMENT_STATE_READY


@on_every_database
async def test_a_deployment_from_its_beginning_to_its_end(digits: Site) -> None:
    stub = digits.stub.Deployments
    made = await deploy(digits, 1, instances=2)
    assert (made.model, made.instances, made.updated_by, made.generation) == ("digits", 2, "anybody", 1)
    assert (made.rollout.to_version, made.rollout.from_version) == (1, 0)
    assert pb.DeploymentState.Name(made.state) == "DEPLOYMENT_STATE_PROGRESSING"
    await finish(digits)
    canary = {"strategy": pb.STRATEGY_CANARY, "steps": [{"percent": 10}], "gates": {"max_error_rate": 0.01}}
    began = await deploy(digits, 2, plan=canary)
    assert began.rollout.plan.strategy == pb.STRATEGY_CANARY
    assert [step.percent for step in began.rollout.plan.steps] == [10]
    rollout = began.rollout
    assert await stub.GetRollout(pb.GetRolloutRequest(id=rollout.id)) == rollout
    assert (await stub.GetRollout(pb.GetRolloutRequest(model="digits"))).id == rollout.id
    paused = await stub.Pause(pb.PauseRequest(model="digits", reason="lunch"))
    assert (STATE(paused.state), "lunch" in paused.reason) == ("ROLLOUT_STATE_PAUSED", True)
    assert STATE((await stub.Resume(pb.ResumeRequest(model="digits"))).state) != "ROLLOUT_STATE_PAUSED"
    aborted = await stub.Abort(pb.AbortRequest(model="digits", reason="no"))
    assert STATE(aborted.state) == "ROLLOUT_STATE_ABORTED"
    assert (await stub.GetDeployment(pb.GetDeploymentRequest(model="digits"))).version == 1
    await deploy(digits, 3)
    await finish(digits)
    back = await stub.Rollback(pb.RollbackRequest(model="digits", reason="worse"))
    assert (back.from_version, back.to_version) == (3, 1)
    await finish(digits)
    scaled = await stub.Scale(pb.ScaleRequest(model="digits", instances=4))
    assert scaled.instances == 4
    shares = [{"version": 1, "percent": 99.5}, {"version": 2, "percent": 0.5, "tag": "candidate"}]
    shared = await stub.SetTraffic(pb.SetTrafficRequest(model="digits", traffic=shares))
    assert [(each.version, each.percent, each.tag) for each in shared.traffic] == [(1, 99.5, ""), (2, 0.5, "candidate")]
    listed = await stub.ListRollouts(pb.ListRolloutsRequest(model="digits", page_size=2))
    assert [each.to_version for each in listed.rollouts] == [1, 3]
    rest = pb.ListRolloutsRequest(model="digits", page_size=2, page_token=listed.next_page_token)
    assert [each.to_version for each in (await stub.ListRollouts(rest)).rollouts] == [2, 1]
    await stub.Undeploy(pb.UndeployRequest(model="digits"))
    assert (await status_of(stub.GetDeployment(pb.GetDeploymentRequest(model="digits"))))[0] == "NOT_FOUND"


async def test_what_servers_made_of_it(digits: Site) -> None:
    await deploy(digits, 1)
    status = ServerStatus("", "digits", 1, (VersionStatus(1, "UNAVAILABLE", "no such backend"),), None)  # type: ignore[arg-type]
    await digits.database.run(lambda session: report(session, "host-1", [status]))
    found = await digits.stub.Deployments.GetDeployment(pb.GetDeploymentRequest(model="digits"))
    assert pb.DeploymentState.Name(found.state) == "DEPLOYMENT_STATE_DEGRADED"
    assert found.reason == "version 1 on host-1 is UNAVAILABLE: no such backend"
    assert [server.server for server in found.servers] == ["host-1"]
    (listed,) = (await digits.stub.Deployments.ListDeployments(pb.ListDeploymentsRequest())).deployments
    assert listed == found


async def test_masks_of_lists(digits: Site) -> None:
    await deploy(digits, 1)
    stub = digits.stub.Deployments
    request = pb.ListDeploymentsRequest(read_mask={"paths": ["model", "rollout.to_version"]})
    (found,) = (await stub.ListDeployments(request)).deployments
    assert found == pb.Deployment(model="digits", rollout={"to_version": 1})
    request = pb.ListDeploymentsRequest(read_mask={"paths": ["model", "colour", "rollout.colour"]})
    _, details = await refused(stub.ListDeployments(request))
    (violation,) = details["BadRequest"].field_violations
    assert violation.field == "read_mask"
    assert violation.description.startswith("names 'colour', 'rollout.colour'; expected some of model, generation,")


async def test_what_does_not_exist(digits: Site) -> None:
    stub = digits.stub.Deployments
    for call in (
        stub.Deploy(pb.DeployRequest(model="nobody")),
        stub.Deploy(pb.DeployRequest(model="digits", version=9)),
        stub.Deploy(pb.DeployRequest(model="digits", alias="prod")),
        stub.GetDeployment(pb.GetDeploymentRequest(model="digits")),
        stub.Undeploy(pb.UndeployRequest(model="digits")),
        stub.Scale(pb.ScaleRequest(model="digits", instances=1)),
        stub.SetTraffic(pb.SetTrafficRequest(model="digits", traffic=[{"version": 1, "percent": 100}])),
        stub.Promote(pb.PromoteRequest(model="digits")),
        stub.Rollback(pb.RollbackRequest(model="digits")),
        stub.Pause(pb.PauseRequest(model="digits")),
        stub.Resume(pb.ResumeRequest(model="digits")),
        stub.Abort(pb.AbortRequest(model="digits")),
        stub.GetRollout(pb.GetRolloutRequest(model="digits")),
        stub.GetRollout(pb.GetRolloutRequest(id="'; DROP TABLE rollouts;--")),
        stub.GetRollout(pb.GetRolloutRequest(id="x" * 10_000)),
        stub.ListRollouts(pb.ListRolloutsRequest(model="nobody")),
    ):
        assert (await status_of(call))[0] == "NOT_FOUND"


@pytest.mark.parametrize(
    "model", ["", "../x", "x" * 10_000, "'; DROP TABLE models;--", "a\0b"], ids=lambda name: name[:9]
)
async def test_names_that_nothing_has(site: Site, model: str) -> None:
    stub = site.stub.Deployments
    for call in (
        stub.Deploy(pb.DeployRequest(model=model)),
        stub.GetDeployment(pb.GetDeploymentRequest(model=model)),
        stub.Undeploy(pb.UndeployRequest(model=model)),
        stub.Scale(pb.ScaleRequest(model=model)),
        stub.SetTraffic(pb.SetTrafficRequest(model=model)),
        stub.Promote(pb.PromoteRequest(model=model)),
        stub.Rollback(pb.RollbackRequest(model=model)),
        stub.Pause(pb.PauseRequest(model=model)),
        stub.Resume(pb.ResumeRequest(model=model)),
        stub.Abort(pb.AbortRequest(model=model)),
        stub.GetRollout(pb.GetRolloutRequest(model=model)),
        stub.ListRollouts(pb.ListRolloutsRequest(model=model)),
    ):
        assert (await status_of(call))[0] == "INVALID_ARGUMENT"


async def test_requests_that_cannot_be(digits: Site) -> None:
    await deploy(digits, 1)
    await finish(digits)
    stub = digits.stub.Deployments
    for call, field in (
        (stub.Deploy(pb.DeployRequest(model="digits", plan={"strategy": 17})), "plan.strategy"),
        (
            stub.Deploy(pb.DeployRequest(model="digits", plan={"gates": {"min_agreement": 2}})),
            "plan.gates.min_agreement",
        ),
        (stub.SetTraffic(pb.SetTrafficRequest(model="digits", traffic=[{"version": 1, "percent": 50}])), "traffic"),
        (stub.SetTraffic(pb.SetTrafficRequest(model="digits")), "traffic"),
        (stub.Deploy(pb.DeployRequest(model="digits", instances=-1)), ""),
        (stub.Deploy(pb.DeployRequest(model="digits", instances=2**31 - 1)), ""),
        (stub.Deploy(pb.DeployRequest(model="digits", version=1, alias="prod")), ""),
        (stub.Scale(pb.ScaleRequest(model="digits", instances=-1)), ""),
        (stub.ListDeployments(pb.ListDeploymentsRequest(page_size=-1)), ""),
        (stub.ListDeployments(pb.ListDeploymentsRequest(page_token="x")), ""),
        (stub.ListRollouts(pb.ListRolloutsRequest(model="digits", page_token="x")), ""),
    ):
        error, details = await refused(call)
        assert error.code().name == "INVALID_ARGUMENT"
        assert details["BadRequest"].field_violations[0].field == field


async def test_what_the_state_does_not_allow(digits: Site) -> None:
    stub = digits.stub.Deployments
    await deploy(digits, 1)
    error, details = await refused(deploy(digits, 2))
    assert (error.code().name, details["ErrorInfo"].reason) == ("FAILED_PRECONDITION", "PRECONDITION_FAILED")
    assert "begun by anybody" in str(error.details())
    assert details["PreconditionFailure"].violations[0].subject == "digits"
    await finish(digits)
    for call in (
        stub.Promote(pb.PromoteRequest(model="digits")),
        stub.Pause(pb.PauseRequest(model="digits")),
        stub.Resume(pb.ResumeRequest(model="digits")),
        stub.Abort(pb.AbortRequest(model="digits")),
        stub.Rollback(pb.RollbackRequest(model="digits")),
    ):
        assert (await status_of(call))[0] == "FAILED_PRECONDITION"


async def test_code_needs_consent(digits: Site) -> None:
    digits.services._servicers["Deployments"]._allow_code = False
    error, _ = await refused(deploy(digits, 1))
    assert (error.code().name, "--allow-code" in str(error.details())) == ("FAILED_PRECONDITION", True)


async def test_shares_by_hand_need_consent_for_code(digits: Site) -> None:
    """What Deploy refuses cannot be had by giving it a share; what serves already can be shared."""
    await deploy(digits, 1)
    await finish(digits)
    digits.services._servicers["Deployments"]._allow_code = False
    shares = [{"version": 1, "percent": 50}, {"version": 2, "percent": 50}]
    error, _ = await refused(digits.stub.Deployments.SetTraffic(pb.SetTrafficRequest(model="digits", traffic=shares)))
    assert (error.code().name, "--allow-code" in str(error.details())) == ("FAILED_PRECONDITION", True)
    whole = pb.SetTrafficRequest(model="digits", traffic=[{"version": 1, "percent": 100}])
    assert [each.version for each in (await digits.stub.Deployments.SetTraffic(whole)).traffic] == [1]


@on_every_database
async def test_two_operators_at_once(digits: Site) -> None:
    """One wins, the other is told by whom it was forestalled."""
    first = await deploy(digits, 1)
    await finish(digits)
    generation = (await digits.stub.Deployments.GetDeployment(pb.GetDeploymentRequest(model="digits"))).generation
    results = await asyncio.gather(deploy(digits, 2), deploy(digits, 3), return_exceptions=True)
    (lost,) = [each for each in results if isinstance(each, grpc.aio.AioRpcError)]
    assert lost.code().name == "FAILED_PRECONDITION"
    assert "is under way" in str(lost.details()) or "begun by anybody" in str(lost.details())
    stale = pb.ScaleRequest(model="digits", instances=3, expected_generation=generation)
    error, details = await refused(digits.stub.Deployments.Scale(stale))
    assert (error.code().name, details["ErrorInfo"].reason) == ("ABORTED", "CONFLICT")
    assert "anybody changed it at" in str(error.details())
    assert first.generation == 1


@on_every_database
async def test_the_same_key_gives_the_same_answer(digits: Site) -> None:
    call = digits.channel.unary_unary("/aiorch.admin.v1.Deployments/Deploy")
    request = pb.DeployRequest(model="digits", version=1, idempotency_key="k1").SerializeToString()
    first = await call(request)
    await finish(digits)
    await digits.stub.Deployments.Scale(pb.ScaleRequest(model="digits", instances=7))
    assert await call(request) == first
    other = pb.DeployRequest(model="digits", version=2, idempotency_key="k1").SerializeToString()
    assert (await refused(call(other)))[1]["ErrorInfo"].reason == "IDEMPOTENCY_KEY_REUSED"


async def test_what_a_caller_may_not_see_is_not_there(digits: Site) -> None:
    rollout = (await deploy(digits, 1)).rollout
    stub = digits.stub.Deployments
    with speaking_as("alice", (Role.ADMIN, "team-a-*")):
        assert not (await stub.ListDeployments(pb.ListDeploymentsRequest())).deployments
        told = set()
        for id in (rollout.id, "0" * len(rollout.id)):
            error, _ = await refused(stub.GetRollout(pb.GetRolloutRequest(id=id)))
            told.add((error.code().name, str(error.details()).replace(id, "ID")))
        assert told == {("NOT_FOUND", "there is no rollout 'ID'")}
        for call in (
            deploy(digits, 1),
            stub.GetDeployment(pb.GetDeploymentRequest(model="digits")),
            stub.GetRollout(pb.GetRolloutRequest(model="digits")),
            stub.ListRollouts(pb.ListRolloutsRequest(model="digits")),
            stub.Undeploy(pb.UndeployRequest(model="digits")),
        ):
            error, _ = await refused(call)
            assert (error.code().name, error.details()) == ("NOT_FOUND", "model 'digits' is not registered")
    with speaking_as("bob", (Role.CLIENT, "*")):
        await stub.GetDeployment(pb.GetDeploymentRequest(model="digits"))
        for call in (deploy(digits, 1), stub.Undeploy(pb.UndeployRequest(model="digits"))):
            assert (await status_of(call))[0] == "PERMISSION_DENIED"
