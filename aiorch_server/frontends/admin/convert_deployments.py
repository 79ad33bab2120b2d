"""Deployments, traffic and events: records of the registry as messages of the admin API, and traffic back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from aiorch_proto.admin.v1 import deployments_pb2 as pb

from aiorch_server.frontends.admin.convert_rollouts import encode_rollout
from aiorch_server.frontends.admin.fields import (
    WHOLE_SHARE,
    InvalidField,
    decode_share,
    encode_share,
    encode_time,
    show,
    within,
)
from aiorch_server.registry.records import Deployment, Event, Rollout, ServerStatus, TrafficTarget

TAGS: Final = ("", "stable", "candidate")
#: More versions of one model than this never serve at a time.
_MAX_TARGETS: Final = 16
_READY: Final = "READY"
_SETTLED: Final = (_READY, "LOADING", "UNLOADING")


def encode_deployment(
    deployment: Deployment, servers: Sequence[ServerStatus] = (), rollout: Rollout | None = None
) -> pb.Deployment:
    """A deployment with what each server made of it, and the rollout under way or the last one."""
    state, reason = _judge(deployment, servers, rollout)
    message = pb.Deployment(
        model=deployment.model,
        generation=deployment.generation,
        version=deployment.version,
        traffic=[_encode_target(each) for each in deployment.traffic],
        instances=deployment.instances,
        state=state,
        reason=reason,
        servers=[_encode_server(each) for each in servers],
        updated_by=deployment.updated_by,
        previous_version=deployment.previous_version,
        is_on_demand=deployment.is_on_demand,
    )
    if rollout is not None:
        message.rollout.CopyFrom(encode_rollout(rollout))
    encode_time(deployment.updated_at, message.updated_at)
    return message


def _judge(deployment: Deployment, servers: Sequence[ServerStatus], rollout: Rollout | None) -> tuple[Any, str]:
    """How the servers' reports add up; what fails weighs more than what takes its time.

    While a rollout is under way the deployment progresses. Whether its candidate serves is the rollout's to judge,
    where another version serves meanwhile.
    """
    under_way = rollout if rollout is not None and not rollout.state.is_end else None
    if not deployment.loaded:
        told = f": {rollout.reason}" if rollout is not None and rollout.reason else ""
        return pb.DEPLOYMENT_STATE_DEGRADED, f"no version is deployed{told}"
    behind = ""
    for server in servers:
        seen = {each.version: each for each in server.versions}
        is_done = server.observed_generation >= deployment.generation
        for version in deployment.loaded:
            status = seen.get(version)
            where = f"version {version} on {server.server}"
            has_failed = status is not None and status.state not in _SETTLED and bool(status.reason)
            is_tried = under_way is not None and under_way.from_version and version == under_way.to_version
            if status is not None and has_failed and not is_done:
                told = f"{status.state}, of generation {server.observed_generation}: {status.reason}"
                behind = behind or f"{where} is {told}"
            elif status is not None and has_failed and not is_tried and not deployment.is_on_demand:
                return pb.DEPLOYMENT_STATE_DEGRADED, f"{where} is {status.state}: {status.reason}"
            if status is not None and status.state == _READY and status.reason and is_done:  # of another configuration
                return pb.DEPLOYMENT_STATE_DEGRADED, f"{where}: {status.reason}"
            if (status is None or status.state != _READY) and not deployment.is_on_demand:
                behind = behind or f"{where} is {'not loaded yet' if status is None else status.state}"
        if not is_done:
            behind = behind or (
                f"{server.server} has done generation {server.observed_generation} of {deployment.generation}"
            )
    if under_way is not None:
        told = f": {under_way.reason}" if under_way.reason else ""
        text = f"rollout {under_way.id} to version {under_way.to_version} is {under_way.state.value}{told}"
        return pb.DEPLOYMENT_STATE_PROGRESSING, text
    if behind or not servers:
        return pb.DEPLOYMENT_STATE_PROGRESSING, behind or "no server has reported yet"
    return pb.DEPLOYMENT_STATE_READY, ""


def _encode_server(status: ServerStatus) -> pb.ServerStatus:
    message = pb.ServerStatus(server=status.server, observed_generation=status.observed_generation)
    for each in status.versions:
        message.versions.add(version=each.version, state=each.state, reason=each.reason)
    encode_time(status.seen_at, message.seen_at)
    return message


def _encode_target(target: TrafficTarget) -> pb.TrafficTarget:
    return pb.TrafficTarget(version=target.version, percent=encode_share(target.share), tag=target.tag)


def decode_traffic(messages: Iterable[Any]) -> tuple[TrafficTarget, ...]:
    """The shares; InvalidField unless they add up to 100 % over different versions."""
    targets: list[TrafficTarget] = []
    for index, message in enumerate(messages):
        if index == _MAX_TARGETS:
            raise InvalidField("traffic", f"has more than {_MAX_TARGETS} targets")
        with within(f"traffic[{index}]"):
            if message.version < 1 or any(each.version == message.version for each in targets):
                raise InvalidField("version", f"is {message.version}; expected a version, each once")
            if message.tag not in TAGS:
                raise InvalidField("tag", f"is {show(message.tag)}; expected stable, candidate or nothing")
            share = decode_share(message.percent, "percent")
            targets.append(TrafficTarget(message.version, share, message.tag))
    total = sum(each.share for each in targets)
    if total != WHOLE_SHARE:
        raise InvalidField("traffic", f"adds up to {encode_share(total):g} percent; expected 100")
    return tuple(targets)


def encode_event(event: Event) -> pb.Event:
    """Something that happened, as its message."""
    message = pb.Event(
        number=event.number,
        kind=event.kind,
        model=event.model,
        version=event.version,
        rollout=event.rollout,
        actor=event.actor,
        text=event.text,
    )
    encode_time(event.time, message.time)
    return message
