"""What a rollout wants to run, from its row alone: which versions, with which shares, samples and copies; pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aiorch_server.registry.records import CanaryStep, Rollout, RolloutPlan, RolloutState, Strategy, TrafficTarget
from aiorch_server.routing import WHOLE

S = RolloutState
#: What a canary without steps does.
DEFAULT_STEPS: Final = (CanaryStep(1.0, 60.0), CanaryStep(10.0, 60.0), CanaryStep(50.0, 60.0))
#: The share of requests from which a few are recorded before a rollout, in hundredths of a percent.
RECORDED: Final = 20
STABLE, CANDIDATE = "stable", "candidate"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a rollout wants to run: the part of a Deployment that it decides about."""

    loaded: tuple[int, ...] = ()
    traffic: tuple[TrafficTarget, ...] = ()
    is_sticky: bool = False
    shadow: int = 0
    sampled: int = 0


def plan_wish(rollout: Rollout) -> Wish:
    """What should run in the rollout's state; of one that has succeeded, the new version, unless it was a shadow."""
    old, new, plan = rollout.from_version, rollout.to_version, rollout.plan
    match rollout.state:
        case S.PENDING:
            return Wish((old,), (TrafficTarget(old, WHOLE, STABLE),), sampled=RECORDED)
        case S.LOADING:
            return _wish_loading(old, new)
        case S.PAUSED if rollout.step_began_at is None:
            return _wish_loading(old, new)
        case S.RUNNING | S.PAUSED:
            return wish_step(plan, rollout.step, old, new)
        case S.PROMOTING:
            return wish_only(new)
        case S.SUCCEEDED:
            return wish_only(new)
    return wish_only(old)


def wish_step(plan: RolloutPlan, step: int, old: int, new: int) -> Wish:
    """What runs while a step of ``plan`` lasts."""
    is_compared = plan.strategy is Strategy.SHADOW or plan.gates.min_agreement is not None
    return Wish(
        loaded=(old, new),
        traffic=_share(old, new, find_share(plan, step)),
        is_sticky=plan.strategy is Strategy.AB,
        shadow=new if is_compared else 0,
        sampled=round(plan.sample_percent * 100) if is_compared else 0,
    )


def wish_only(version: int) -> Wish:
    """The version alone, with all requests; nothing for 0."""
    return Wish((version,), (TrafficTarget(version, WHOLE),)) if version else Wish()


def find_share(plan: RolloutPlan, step: int) -> int:
    """The candidate's share of the requests in a step, in hundredths of a percent."""
    match plan.strategy:
        case Strategy.CANARY:
            steps = plan.steps or DEFAULT_STEPS
            return round(steps[min(step, len(steps) - 1)].percent * 100)
        case Strategy.SHADOW:
            return 0
        case Strategy.AB:
            return round(plan.candidate_percent * 100)
    return WHOLE


def _wish_loading(old: int, new: int) -> Wish:
    return Wish((old, new), _share(old, new, 0), sampled=RECORDED) if old else wish_only(new)


def _share(old: int, new: int, share: int) -> tuple[TrafficTarget, ...]:
    return (TrafficTarget(old, WHOLE - share, STABLE), TrafficTarget(new, share, CANDIDATE))
