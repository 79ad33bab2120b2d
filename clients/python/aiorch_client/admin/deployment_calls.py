"""The calls of the service Deployments."""

from __future__ import annotations

from collections.abc import Iterable

from aiorch_proto.admin.v1 import deployments_pb2 as pb

from aiorch_client.admin.calls import Call, ListCall, forget
from aiorch_client.admin.deployment_types import Deployment, Rollout, RolloutPlan, TrafficTarget
from aiorch_client.admin.messages import decode_deployment, decode_rollout, encode_plan, encode_target


def deploy(
    model: str,
    version: int,
    alias: str,
    plan: RolloutPlan | None,
    instances: int,
    is_on_demand: bool,
    expected_generation: int,
) -> Call[Deployment]:
    """Serves a version."""
    request = pb.DeployRequest(
        model=model,
        version=version,
        alias=alias,
        plan=None if plan is None else encode_plan(plan),
        instances=instances,
        is_on_demand=is_on_demand,
        expected_generation=expected_generation,
    )
    return Call("Deployments.Deploy", request, decode_deployment)


def undeploy(model: str) -> Call[None]:
    """Takes a model out of service."""
    return Call("Deployments.Undeploy", pb.UndeployRequest(model=model), forget)


def get_deployment(model: str) -> Call[Deployment]:
    """One deployment."""
    return Call("Deployments.GetDeployment", pb.GetDeploymentRequest(model=model), decode_deployment)


def list_deployments() -> ListCall[Deployment]:
    """Deployments by model."""
    request = pb.ListDeploymentsRequest()
    return ListCall("Deployments.ListDeployments", request, "deployments", decode_deployment)


def scale(model: str, instances: int, expected_generation: int) -> Call[Deployment]:
    """Changes the number of instances."""
    request = pb.ScaleRequest(model=model, instances=instances, expected_generation=expected_generation)
    return Call("Deployments.Scale", request, decode_deployment)


def set_traffic(model: str, traffic: Iterable[TrafficTarget], expected_generation: int) -> Call[Deployment]:
    """Sets the shares."""
    targets = [encode_target(each) for each in traffic]
    request = pb.SetTrafficRequest(model=model, traffic=targets, expected_generation=expected_generation)
    return Call("Deployments.SetTraffic", request, decode_deployment)


def promote(model: str) -> Call[Rollout]:
    """Ends a rollout with the new version."""
    return Call("Deployments.Promote", pb.PromoteRequest(model=model), decode_rollout)


def rollback(model: str, reason: str) -> Call[Rollout]:
    """Goes back to the old version."""
    return Call("Deployments.Rollback", pb.RollbackRequest(model=model, reason=reason), decode_rollout)


def pause(model: str, reason: str) -> Call[Rollout]:
    """Stays at the present step."""
    return Call("Deployments.Pause", pb.PauseRequest(model=model, reason=reason), decode_rollout)


def resume(model: str) -> Call[Rollout]:
    """Goes on."""
    return Call("Deployments.Resume", pb.ResumeRequest(model=model), decode_rollout)


def abort(model: str, reason: str) -> Call[Rollout]:
    """Ends a rollout that is under way with the old version."""
    return Call("Deployments.Abort", pb.AbortRequest(model=model, reason=reason), decode_rollout)


def get_rollout(id: str, model: str) -> Call[Rollout]:
    """One rollout by id, or a model's newest."""
    return Call("Deployments.GetRollout", pb.GetRolloutRequest(id=id, model=model), decode_rollout)


def list_rollouts(model: str) -> ListCall[Rollout]:
    """Rollouts, the newest first."""
    return ListCall("Deployments.ListRollouts", pb.ListRolloutsRequest(model=model), "rollouts", decode_rollout)
