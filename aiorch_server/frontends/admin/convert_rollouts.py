"""Rollouts and their plans: records of the registry as messages of the admin API, and plans back.

In messages 0 stands for what is not used or not said, as deployments.proto tells for each field; records have None, or
the value that it stands for.
"""

from __future__ import annotations

import math
from typing import Any, Final

from aiorch_proto.admin.v1 import deployments_pb2 as pb

from aiorch_server.deployments.wish import DEFAULT_STEPS
from aiorch_server.frontends.admin.fields import (
    InvalidField,
    check_range,
    decode_share,
    encode_seconds,
    encode_share,
    encode_time,
    read_seconds,
    within,
)
from aiorch_server.registry.records import (
    CanaryStep,
    Gates,
    Rollout,
    RolloutPlan,
    RolloutState,
    Strategy,
    VersionReport,
)

_STRATEGIES: Final = {
    Strategy.REPLACE: pb.STRATEGY_REPLACE,
    Strategy.BLUE_GREEN: pb.STRATEGY_BLUE_GREEN,
    Strategy.CANARY: pb.STRATEGY_CANARY,
    Strategy.SHADOW: pb.STRATEGY_SHADOW,
    Strategy.AB: pb.STRATEGY_AB,
}
_BY_NUMBER: Final = {number: strategy for strategy, number in _STRATEGIES.items()}
_STATES: Final = {
    state: pb.RolloutState.Value(f"ROLLOUT_STATE_{state.value.upper().replace('-', '_')}") for state in RolloutState
}
_MAX_STEPS: Final = 100


def encode_rollout(rollout: Rollout) -> pb.Rollout:
    """A rollout with what was measured, as its message."""
    message = pb.Rollout(
        id=rollout.id,
        model=rollout.model,
        from_version=rollout.from_version,
        to_version=rollout.to_version,
        plan=encode_plan(rollout.plan),
        state=_STATES[rollout.state],
        reason=rollout.reason,
        step=rollout.step,
        reports=[_encode_report(each) for each in rollout.reports],
        began_by=rollout.began_by,
        disagreements=rollout.disagreements,
    )
    encode_time(rollout.step_began_at, message.step_began_at)
    encode_time(rollout.began_at, message.began_at)
    encode_time(rollout.ended_at, message.ended_at)
    return message


def _encode_report(report: VersionReport) -> pb.VersionReport:
    return pb.VersionReport(
        version=report.version,
        requests=report.requests,
        errors=report.errors,
        p50_ms=report.p50_ms,
        p99_ms=report.p99_ms,
        compared=report.compared,
        agreed=report.agreed,
    )


def encode_plan(plan: RolloutPlan) -> pb.RolloutPlan:
    """A plan with all its numbers, as its message."""
    message = pb.RolloutPlan(
        strategy=_STRATEGIES[plan.strategy],
        gates=_encode_gates(plan.gates),
        sample_percent=plan.sample_percent,
        candidate_percent=plan.candidate_percent,
        manual_rollback=plan.is_rollback_manual,
    )
    for step in plan.steps:
        encode_seconds(step.bake_s, message.steps.add(percent=step.percent).bake_time)
    encode_seconds(plan.bake_s, message.bake_time)
    return message


def decode_plan(message: Any) -> RolloutPlan:
    """A plan with the defaults filled in; InvalidField for what no rollout can keep to."""
    strategy = _BY_NUMBER.get(message.strategy or pb.STRATEGY_REPLACE)
    if strategy is None:
        names = ", ".join(pb.Strategy.Name(number) for number in _BY_NUMBER)
        raise InvalidField("strategy", f"is {message.strategy}; expected one of {names}")
    steps = _decode_steps(message.steps)
    if steps and strategy is not Strategy.CANARY:
        raise InvalidField("steps", f"are for STRATEGY_CANARY; the plan's is {pb.Strategy.Name(message.strategy)}")
    if strategy is Strategy.CANARY:
        steps = steps or DEFAULT_STEPS
    with within("gates"):
        gates = _decode_gates(message.gates)
    return RolloutPlan(
        strategy=strategy,
        steps=steps,
        gates=gates,
        bake_s=read_seconds(message, "bake_time"),
        sample_percent=encode_share(decode_share(message.sample_percent, "sample_percent")) or 10.0,
        candidate_percent=encode_share(decode_share(message.candidate_percent, "candidate_percent")) or 50.0,
        is_rollback_manual=message.manual_rollback,
    )


def _decode_steps(messages: Any) -> tuple[CanaryStep, ...]:
    if len(messages) > _MAX_STEPS:
        raise InvalidField("steps", f"are {len(messages)}; expected at most {_MAX_STEPS}")
    steps: list[CanaryStep] = []
    for index, message in enumerate(messages):
        with within(f"steps[{index}]"):
            percent = encode_share(decode_share(message.percent, "percent"))
            before = steps[-1].percent if steps else 0.0
            if percent <= before:
                raise InvalidField("percent", f"is {percent:g}; expected more than {before:g}, each step goes further")
            steps.append(CanaryStep(percent, read_seconds(message, "bake_time")))
    return tuple(steps)


def _encode_gates(gates: Gates) -> pb.Gates:
    error_rate = gates.max_error_rate
    message = pb.Gates(
        max_error_rate=0.0 if error_rate is None else error_rate or -1.0,
        max_p99_ratio=gates.max_p99_ratio or 0.0,
        min_agreement=gates.min_agreement or 0.0,
        agreement_atol=gates.agreement_atol,
        agreement_rtol=gates.agreement_rtol,
        min_samples=gates.min_samples,
    )
    encode_seconds(gates.max_wait_s, message.max_wait)
    return message


def _decode_gates(message: Any) -> Gates:
    error_rate = check_range(message.max_error_rate, "max_error_rate", -math.inf, 1)
    return Gates(
        max_error_rate=max(0.0, error_rate) if error_rate else None,
        max_p99_ratio=check_range(message.max_p99_ratio, "max_p99_ratio", 0) or None,
        min_agreement=check_range(message.min_agreement, "min_agreement", 0, 1) or None,
        agreement_atol=check_range(message.agreement_atol, "agreement_atol", 0),
        agreement_rtol=check_range(message.agreement_rtol, "agreement_rtol", 0),
        min_samples=int(check_range(message.min_samples, "min_samples", 0)) or Gates().min_samples,
        max_wait_s=read_seconds(message, "max_wait"),
    )
