"""Messages of the admin API to the values of this package, and what callers give to messages."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from aiorch_proto.admin.v1 import access_pb2, audit_pb2, deployments_pb2, registry_pb2

from aiorch_client.admin.access_types import (
    ApiKey,
    AuditCheck,
    AuditEntry,
    Identity,
    NewApiKey,
    Permission,
    Quota,
    Role,
    RoleBinding,
)
from aiorch_client.admin.deployment_types import (
    CanaryStep,
    Deployment,
    DeploymentState,
    Event,
    Gates,
    Rollout,
    RolloutPlan,
    RolloutState,
    ServerStatus,
    Strategy,
    TrafficTarget,
    VersionReport,
    VersionStatus,
)
from aiorch_client.admin.tuning_types import Decision, Explanation, Objective
from aiorch_client.admin.types import ArtefactFile, Model, ModelVersion, Provenance, TensorSignature, Upload
from aiorch_client.errors import RequestError

_STRATEGY = "STRATEGY_"
_ROLE = "ROLE_"


def decode_model(message: Any) -> Model:
    """A registered model."""
    return Model(
        name=message.name,
        description=message.description,
        labels=dict(message.labels),
        aliases=dict(message.aliases),
        latest_version=message.latest_version,
        created_at=_read_time(message, "created_at"),
        created_by=message.created_by,
        etag=message.etag,
    )


def decode_version(message: Any) -> ModelVersion:
    """A version with its files."""
    return ModelVersion(
        model=message.model,
        version=message.version,
        digest=message.digest,
        size_bytes=message.size_bytes,
        files=tuple(ArtefactFile(each.path, each.size_bytes, each.sha256) for each in message.files),
        provenance=_decode_provenance(message.provenance),
        aliases=tuple(message.aliases),
        created_at=_read_time(message, "created_at"),
        created_by=message.created_by,
        has_code=message.has_code,
    )


def decode_upload(message: Any) -> Upload:
    """How far an upload is."""
    return Upload(
        model=message.model,
        upload_id=message.upload_id,
        size_bytes=message.size_bytes,
        received_bytes=message.received_bytes,
        expires_at=_read_time(message, "expires_at"),
        version=message.version,
    )


def _decode_provenance(message: Any) -> Provenance:
    return Provenance(
        framework=message.framework,
        framework_version=message.framework_version,
        inputs=_decode_tensors(message.inputs),
        outputs=_decode_tensors(message.outputs),
        metrics=dict(message.metrics),
        data_hash=message.data_hash,
        git_commit=message.git_commit,
        description=message.description,
        labels=dict(message.labels),
    )


def _decode_tensors(messages: Iterable[Any]) -> tuple[TensorSignature, ...]:
    return tuple(TensorSignature(each.name, each.datatype, tuple(each.shape)) for each in messages)


def encode_provenance(provenance: Provenance) -> Any:
    """Where a version comes from, as its message."""
    return registry_pb2.Provenance(
        framework=provenance.framework,
        framework_version=provenance.framework_version,
        inputs=_encode_tensors(provenance.inputs),
        outputs=_encode_tensors(provenance.outputs),
        metrics=provenance.metrics,
        data_hash=provenance.data_hash,
        git_commit=provenance.git_commit,
        description=provenance.description,
        labels=provenance.labels,
    )


def _encode_tensors(tensors: Iterable[TensorSignature]) -> list[Any]:
    return [registry_pb2.TensorSignature(name=each.name, datatype=each.datatype, shape=each.shape) for each in tensors]


def decode_deployment(message: Any) -> Deployment:
    """A deployment with what the servers made of it."""
    return Deployment(
        model=message.model,
        generation=message.generation,
        version=message.version,
        traffic=tuple(TrafficTarget(each.version, each.percent, each.tag) for each in message.traffic),
        instances=message.instances,
        state=DeploymentState(_name(deployments_pb2.DeploymentState, message.state, "DEPLOYMENT_STATE_")),
        reason=message.reason,
        servers=tuple(_decode_server(each) for each in message.servers),
        rollout=decode_rollout(message.rollout) if message.HasField("rollout") else None,
        updated_at=_read_time(message, "updated_at"),
        updated_by=message.updated_by,
        previous_version=message.previous_version,
        is_on_demand=message.is_on_demand,
    )


def _decode_server(message: Any) -> ServerStatus:
    return ServerStatus(
        server=message.server,
        observed_generation=message.observed_generation,
        versions=tuple(VersionStatus(each.version, each.state, each.reason) for each in message.versions),
        seen_at=_read_time(message, "seen_at"),
    )


def decode_rollout(message: Any) -> Rollout:
    """A rollout with what was measured."""
    return Rollout(
        id=message.id,
        model=message.model,
        from_version=message.from_version,
        to_version=message.to_version,
        plan=_decode_plan(message.plan),
        state=RolloutState(_name(deployments_pb2.RolloutState, message.state, "ROLLOUT_STATE_")),
        reason=message.reason,
        step=message.step,
        step_began_at=_read_time(message, "step_began_at"),
        reports=tuple(_decode_report(each) for each in message.reports),
        began_at=_read_time(message, "began_at"),
        ended_at=_read_time(message, "ended_at"),
        began_by=message.began_by,
        disagreements=tuple(message.disagreements),
    )


def _decode_report(message: Any) -> VersionReport:
    return VersionReport(
        version=message.version,
        requests=message.requests,
        errors=message.errors,
        p50_ms=message.p50_ms,
        p99_ms=message.p99_ms,
        compared=message.compared,
        agreed=message.agreed,
    )


def _decode_plan(message: Any) -> RolloutPlan:
    strategy = message.strategy or deployments_pb2.STRATEGY_REPLACE
    gates = message.gates
    return RolloutPlan(
        strategy=Strategy(_name(deployments_pb2.Strategy, strategy, _STRATEGY)),
        steps=tuple(CanaryStep(each.percent, _read_seconds(each.bake_time)) for each in message.steps),
        gates=Gates(
            max_error_rate=max(0.0, gates.max_error_rate) if gates.max_error_rate else None,
            max_p99_ratio=gates.max_p99_ratio or None,
            min_agreement=gates.min_agreement or None,
            agreement_atol=gates.agreement_atol,
            agreement_rtol=gates.agreement_rtol,
            min_samples=gates.min_samples,
            max_wait_s=_read_seconds(gates.max_wait),
        ),
        bake_s=_read_seconds(message.bake_time),
        sample_percent=message.sample_percent,
        candidate_percent=message.candidate_percent,
        is_rollback_manual=message.manual_rollback,
    )


def encode_plan(plan: RolloutPlan) -> Any:
    """A plan as its message."""
    gates = plan.gates
    error_rate = gates.max_error_rate
    message = deployments_pb2.RolloutPlan(
        strategy=deployments_pb2.Strategy.Value(f"{_STRATEGY}{Strategy(plan.strategy).name}"),
        gates=deployments_pb2.Gates(
            # on the wire 0 is a gate that is not used, and what is negative allows no error
            max_error_rate=0.0 if error_rate is None else error_rate or -1.0,
            max_p99_ratio=gates.max_p99_ratio or 0.0,
            min_agreement=gates.min_agreement or 0.0,
            agreement_atol=gates.agreement_atol,
            agreement_rtol=gates.agreement_rtol,
            min_samples=gates.min_samples,
        ),
        sample_percent=plan.sample_percent,
        candidate_percent=plan.candidate_percent,
        manual_rollback=plan.is_rollback_manual,
    )
    for step in plan.steps:
        _write_seconds(step.bake_s, message.steps.add(percent=step.percent).bake_time)
    if gates.max_wait_s:
        _write_seconds(gates.max_wait_s, message.gates.max_wait)
    if plan.bake_s:
        _write_seconds(plan.bake_s, message.bake_time)
    return message


def encode_target(target: TrafficTarget) -> Any:
    """A share as its message."""
    return deployments_pb2.TrafficTarget(version=target.version, percent=target.percent, tag=target.tag)


def decode_event(message: Any) -> Event:
    """Something that happened."""
    return Event(
        number=message.number,
        time=_read_time(message, "time"),
        kind=message.kind,
        model=message.model,
        version=message.version,
        rollout=message.rollout,
        actor=message.actor,
        text=message.text,
    )


def decode_binding(message: Any) -> RoleBinding:
    """A role that somebody has."""
    return RoleBinding(
        id=message.id,
        principal=message.principal,
        role=_decode_role(message.role),
        models=message.models,
        created_at=_read_time(message, "created_at"),
        created_by=message.created_by,
    )


def decode_identity(message: Any) -> Identity:
    """Who the caller is."""
    return Identity(
        principal=message.principal,
        tenant=message.tenant,
        method=message.method,
        bindings=tuple(decode_binding(each) for each in message.bindings),
        groups=tuple(message.groups),
        expires_at=_read_time(message, "expires_at"),
    )


def decode_permission(message: Any) -> Permission:
    """The role that a call needs."""
    return Permission(message.method, _decode_role(message.role))


def encode_role(role: Role) -> Any:
    """The number of a role."""
    return access_pb2.Role.Value(f"{_ROLE}{Role(role).name}")


def _decode_role(number: int) -> Role:
    return Role(_name(access_pb2.Role, number, _ROLE))


def decode_key(message: Any) -> ApiKey:
    """A key without its secret."""
    return ApiKey(
        id=message.id,
        principal=message.principal,
        tenant=message.tenant,
        description=message.description,
        created_at=_read_time(message, "created_at"),
        created_by=message.created_by,
        expires_at=_read_time(message, "expires_at"),
        revoked_at=_read_time(message, "revoked_at"),
    )


def decode_new_key(message: Any) -> NewApiKey:
    """A key with its secret."""
    return NewApiKey(decode_key(message.key), message.secret)


def decode_quota(message: Any) -> Quota:
    """A tenant's bounds."""
    return Quota(message.tenant, message.requests_per_s, message.rows_per_s, message.max_in_flight)


def decode_audit_entry(message: Any) -> AuditEntry:
    """What was done."""
    return AuditEntry(
        number=message.number,
        time=_read_time(message, "time"),
        principal=message.principal,
        method=message.method,
        model=message.model,
        outcome=message.outcome,
        detail=message.detail,
        hash=message.hash,
        server=message.server,
    )


def decode_audit_check(message: audit_pb2.VerifyAuditResponse) -> AuditCheck:
    """Whether the chain holds."""
    return AuditCheck(message.is_intact, message.entries, message.broken_at, message.head_hash, message.reason)


def decode_objective(message: Any) -> Objective:
    """What a model should keep to."""
    return Objective(
        model=message.model,
        percentile=message.percentile,
        latency_us=message.latency_us,
        error_budget=message.error_budget,
        min_instances=message.min_instances,
        max_instances=message.max_instances,
        max_batch_size=message.max_batch_size,
        priority=message.priority,
        instance_cost=message.instance_cost,
    )


def decode_explanation(message: Any) -> Explanation:
    """Why knobs stand where they stand."""
    decisions = (
        Decision(_read_time(each, "time"), each.knob, each.before, each.after, each.reason, each.effect)
        for each in message.decisions
    )
    objective = decode_objective(message.objective) if message.HasField("objective") else None
    return Explanation(message.model, objective, dict(message.knobs), tuple(decisions))


def write_time(time: datetime, message: Any) -> None:
    """Writes ``time`` into a Timestamp; RequestError for a time without a zone."""
    if time.tzinfo is None:
        raise RequestError(f"{time} has no time zone: give it one, as datetime.now(UTC) has")
    message.FromDatetime(time.astimezone(UTC))


def _read_time(message: Any, field: str) -> datetime | None:
    return getattr(message, field).ToDatetime(tzinfo=UTC) if message.HasField(field) else None


def _write_seconds(seconds: float, message: Any) -> None:
    message.FromNanoseconds(round(seconds * 1e9))


def _read_seconds(message: Any) -> float:
    return float(message.ToNanoseconds() / 1e9)


def _name(enum: Any, number: int, prefix: str) -> str:
    """The name of an enum's value as this package writes it; a number that a newer server sends is unspecified."""
    if number not in enum.values():
        return "unspecified"
    return str(enum.Name(number).removeprefix(prefix).lower().replace("_", "-"))
