"""The way from one version to the next, as a table and two pure functions: what the driver does, what a person may do.

::

    PENDING -> LOADING -> RUNNING (step by step) -> PROMOTING -> SUCCEEDED
       |          |          |  ^                       |
       |          |          v  |                       |
       |          |         PAUSED                      |
       `----------+----------+--+-> ROLLING_BACK <------'     -> ROLLED_BACK
                  `-> FAILED           (ABORTED at once, by a person)

A rollout's row says everything: what should run meanwhile follows from it alone (``plan_wish``), so whoever reads it
can go on, whatever died before. In PENDING a few real requests are recorded, to warm the candidate with.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Final

from aiorch_server.deployments.gates import Verdict, judge
from aiorch_server.deployments.samples import StepSamples, Window
from aiorch_server.deployments.wish import DEFAULT_STEPS, Wish, find_share, plan_wish, wish_only, wish_step
from aiorch_server.errors import InternalError, PreconditionFailed
from aiorch_server.registry.records import Rollout, RolloutPlan, RolloutState, Strategy

S = RolloutState
#: Servers whose reasons are told.
_MOST_TOLD: Final = 3
#: A step that begins so much later than now began before the clock was set back.
CLOCK_S: Final = 5.0
_NO_SAMPLES: Final = StepSamples("")

#: Every legal step, with what it means.
TRANSITIONS: Mapping[tuple[RolloutState, RolloutState], str] = MappingProxyType(
    {
        (S.PENDING, S.LOADING): "the candidate is loaded, on all servers",
        (S.PENDING, S.PAUSED): "a person stopped it; the candidate is loaded, and gets nothing",
        (S.LOADING, S.RUNNING): "the candidate is ready on all servers, the first step begins",
        (S.LOADING, S.PAUSED): "a person stopped it; what is being loaded is loaded",
        (S.LOADING, S.PROMOTING): "the candidate is ready on all servers and takes over",
        (S.LOADING, S.FAILED): "the candidate does not load",
        (S.PENDING, S.PROMOTING): "a person left out the steps",
        (S.RUNNING, S.RUNNING): "the next step begins",
        (S.RUNNING, S.PAUSED): "a person stopped it, or is to decide about a breach",
        (S.RUNNING, S.PROMOTING): "the candidate kept to its gates in all steps, or a person left out the rest",
        (S.RUNNING, S.SUCCEEDED): "the comparison is done",
        (S.PAUSED, S.LOADING): "a person let it go on",
        (S.PAUSED, S.RUNNING): "a person let it go on; the step begins anew",
        (S.PAUSED, S.PROMOTING): "a person left out the rest",
        (S.PAUSED, S.FAILED): "the candidate does not load",
        (S.PROMOTING, S.SUCCEEDED): "only the new version is left, on all servers",
        (S.PROMOTING, S.FAILED): "the candidate does not serve, and there was nothing before it",
        (S.ROLLING_BACK, S.ROLLED_BACK): "only the old version is left, on all servers",
        (S.ROLLING_BACK, S.ABORTED): "the model was taken out of service meanwhile",
        **{
            (state, end): meaning
            for state in (S.PENDING, S.LOADING, S.RUNNING, S.PAUSED, S.PROMOTING)
            for end, meaning in (
                (S.ROLLING_BACK, "back to the old version"),
                (S.ABORTED, "a person ended it with the old version, or took the model out of service"),
            )
        },
    }
)


class Command(enum.StrEnum):
    """What a person may ask of a rollout that is under way."""

    PROMOTE = "promote"
    ROLLBACK = "rollback"
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"


#: What commands lead to from where; what is not in the table is refused. The same state: there is nothing to do.
COMMANDS: Mapping[Command, Mapping[RolloutState, RolloutState]] = MappingProxyType(
    {
        Command.PROMOTE: {
            S.PENDING: S.PROMOTING,
            S.LOADING: S.PROMOTING,
            S.RUNNING: S.PROMOTING,
            S.PAUSED: S.PROMOTING,
            S.PROMOTING: S.PROMOTING,
        },
        Command.ROLLBACK: {
            **dict.fromkeys((S.PENDING, S.LOADING, S.RUNNING, S.PAUSED, S.PROMOTING), S.ROLLING_BACK),
            S.ROLLING_BACK: S.ROLLING_BACK,
        },
        Command.ABORT: {
            **dict.fromkeys((S.PENDING, S.LOADING, S.RUNNING, S.PAUSED, S.PROMOTING), S.ABORTED),
            S.ROLLING_BACK: S.ROLLING_BACK,
        },
        Command.PAUSE: dict.fromkeys((S.PENDING, S.LOADING, S.RUNNING, S.PAUSED), S.PAUSED),
        # where it goes on is told by whether a step had begun
        Command.RESUME: {S.PAUSED: S.RUNNING},
    }
)


@dataclass(frozen=True, slots=True)
class Observation:
    """What the servers made of the present wish.

    ``waiting`` have not done it yet, ``silent`` were not heard of for so long that they are left out. ``failures``
    gives the reason of each server on which the candidate does not serve although it has tried. ``n_servers`` counts
    those that are heard of. ``samples`` are of the present step, of all of them.
    """

    n_servers: int = 0
    waiting: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    samples: StepSamples = _NO_SAMPLES

    def window(self, version: int) -> Window:
        """What was measured of a version."""
        return self.samples.windows.get(version, Window())


@dataclass(frozen=True, slots=True)
class Move:
    """The rollout as it is to be written, what should run from now on, and the event's text, "" for none."""

    rollout: Rollout
    wish: Wish
    text: str = ""


def begin(rollout: Rollout, *, is_urgent: bool = False) -> Move:
    """The first move of a rollout that was just made: the candidate is loaded at once with nothing served before, or
    where it is urgent.
    """
    began = replace(rollout, state=S.PENDING if rollout.from_version and not is_urgent else S.LOADING)
    return Move(began, plan_wish(began), f"{_describe(rollout)} began")


def advance(rollout: Rollout, seen: Observation, now: datetime) -> Move:
    """The next move of a rollout that is under way; the same rollout where there is none.

    A new reason or new reports are a move too, without a text.
    """
    reported = _take_reports(rollout, seen)
    match rollout.state:
        case S.PENDING:
            if not seen.waiting and seen.n_servers:
                return _go(reported, S.LOADING, f"version {rollout.to_version} is being loaded", now)
            return _stay(reported, _tell_waiting("", seen))
        case S.LOADING:
            return _advance_loading(reported, seen, now)
        case S.RUNNING:
            return _advance_step(reported, seen, now)
        case S.PAUSED:
            return _watch_paused(reported, seen, now)
        case S.PROMOTING:
            if seen.failures:
                end = S.ROLLING_BACK if rollout.from_version else S.FAILED
                return _go(reported, end, _tell_failures(rollout, seen), now)
            if not seen.waiting and seen.n_servers:
                text = f"version {rollout.to_version} serves" + _tell_silent(seen)
                return _go(reported, S.SUCCEEDED, text, now)
            return _stay(reported, _tell_waiting(f"version {rollout.to_version} takes over", seen))
        case S.ROLLING_BACK:
            if not seen.waiting and seen.n_servers:
                return _go(reported, S.ROLLED_BACK, rollout.reason, now)
            return Move(reported, plan_wish(reported))
    return Move(rollout, plan_wish(rollout))


def command(rollout: Rollout, verb: Command, now: datetime, *, actor: str, reason: str = "") -> Move:
    """What a person's command makes of a rollout; PreconditionFailed where it is too late for it."""
    target = COMMANDS[verb].get(rollout.state)
    if target is None:
        raise PreconditionFailed(
            f"{_describe(rollout)} is {rollout.state.value}: it cannot {verb.value} from there"
            + (f" ({rollout.reason})" if rollout.reason else "")
        )
    if target is rollout.state:
        return Move(rollout, plan_wish(rollout))
    if verb is Command.RESUME:
        has_begun = rollout.step_began_at is not None
        target = S.RUNNING if has_begun else S.LOADING
        if has_begun:  # what was measured before is told in the events; the candidate gets its whole time again
            rollout = replace(rollout, step_began_at=now, reports=(), disagreements=())
    text = f"{actor}: {verb.value}" + (f" ({reason})" if reason else "")
    return _go(rollout, target, text, now)


def has_begun_before(rollout: Rollout, moment: datetime) -> bool:
    """Whether it is in a step that began before ``moment``."""
    return rollout.state is S.RUNNING and rollout.step_began_at is not None and rollout.step_began_at < moment


def begin_anew(rollout: Rollout, now: datetime) -> Move:
    """The present step from its beginning, for the clock was set: how long it has lasted, nobody knows any more."""
    if rollout.state is not S.RUNNING or rollout.step_began_at is None:
        return Move(rollout, plan_wish(rollout))
    began = replace(rollout, step_began_at=now, reports=(), disagreements=())
    return _go(began, S.RUNNING, f"{describe_step(began)} begins anew, because the clock was set", now)


def abandon(rollout: Rollout, reason: str, now: datetime) -> Rollout:
    """A rollout whose deployment was taken away: nothing is left that could be wanted."""
    _check_step(rollout.state, S.ABORTED)
    return replace(rollout, state=S.ABORTED, reason=reason, ended_at=now)


def _advance_loading(rollout: Rollout, seen: Observation, now: datetime) -> Move:
    if seen.failures:
        return _go(rollout, S.FAILED, _tell_failures(rollout, seen), now)
    if seen.waiting or not seen.n_servers:
        return _stay(rollout, _tell_waiting(f"version {rollout.to_version} is being loaded", seen))
    if rollout.plan.strategy is Strategy.REPLACE or not rollout.from_version:
        text = f"version {rollout.to_version} is ready and takes over" + _tell_silent(seen)
        return _go(rollout, S.PROMOTING, text, now)
    return _begin_step(rollout, 0, now, seen, "")


def _begin_step(rollout: Rollout, step: int, now: datetime, seen: Observation, note: str) -> Move:
    began = replace(rollout, step=step, step_began_at=now, reports=(), disagreements=())
    return _go(began, S.RUNNING, f"{describe_step(began)} begins{_tell_silent(seen)}{note}", now)


def _advance_step(rollout: Rollout, seen: Observation, now: datetime) -> Move:
    if seen.failures:
        return _go(rollout, S.ROLLING_BACK, _tell_failures(rollout, seen), now)
    plan = rollout.plan
    bake_s, is_endless = _find_bake(plan, rollout.step)
    over_s = (now - _began(rollout)).total_seconds() - bake_s
    is_over = over_s >= 0 and not seen.waiting
    is_final = is_over and not is_endless
    is_given_up = is_final and 0.0 < plan.gates.max_wait_s <= over_s
    verdict = _judge(rollout, seen, is_final=is_final, is_given_up=is_given_up)
    if verdict.breach:
        target = S.PAUSED if plan.is_rollback_manual else S.ROLLING_BACK
        return _go(rollout, target, f"{describe_step(rollout)}: {verdict.breach}", now)
    if (_began(rollout) - now).total_seconds() > CLOCK_S:
        return begin_anew(rollout, now)
    if is_endless or not is_over:
        return _stay(rollout, _tell_waiting(describe_step(rollout), seen))
    note = ""
    if verdict.missing:
        if not is_given_up or verdict.is_stuck:
            return _stay(rollout, f"{describe_step(rollout)} waits: {verdict.missing}{_tell_silent(seen)}")
        note = f"; went on after {plan.gates.max_wait_s:g} s although {verdict.missing}"
    if plan.strategy is Strategy.SHADOW:
        return _go(rollout, S.SUCCEEDED, f"the comparison is done, nothing was promoted{_sum_up(rollout)}{note}", now)
    if plan.strategy is Strategy.CANARY and rollout.step + 1 < len(plan.steps or DEFAULT_STEPS):
        return _begin_step(rollout, rollout.step + 1, now, seen, note)
    return _go(rollout, S.PROMOTING, f"version {rollout.to_version} kept to its gates and takes over{note}", now)


def _watch_paused(rollout: Rollout, seen: Observation, now: datetime) -> Move:
    has_begun = rollout.step_began_at is not None
    if seen.failures:
        return _go(rollout, S.ROLLING_BACK if has_begun else S.FAILED, _tell_failures(rollout, seen), now)
    breach = _judge(rollout, seen, is_final=False).breach if has_begun else ""
    if breach and not rollout.plan.is_rollback_manual:
        return _go(rollout, S.ROLLING_BACK, f"{describe_step(rollout)}, paused: {breach}", now)
    return _stay(rollout, rollout.reason)


def _judge(rollout: Rollout, seen: Observation, *, is_final: bool, is_given_up: bool = False) -> Verdict:
    wish = wish_step(rollout.plan, rollout.step, rollout.from_version, rollout.to_version)
    return judge(
        rollout.plan.gates,
        seen.window(rollout.from_version),
        seen.window(rollout.to_version),
        is_final=is_final,
        is_given_up=is_given_up,
        can_stable_grow=any(each.version == rollout.from_version and each.share for each in wish.traffic),
        sampled=wish.sampled,
    )


def _go(rollout: Rollout, state: RolloutState, reason: str, now: datetime) -> Move:
    _check_step(rollout.state, state)
    gone = replace(rollout, state=state, reason=reason, ended_at=now if state.is_end else None)
    is_shadow_over = state is S.SUCCEEDED and rollout.state is S.RUNNING
    wish = wish_only(rollout.from_version) if is_shadow_over else plan_wish(gone)
    return Move(gone, wish, f"{_describe(rollout)} is {state.value}: {reason}")


def _check_step(before: RolloutState, after: RolloutState) -> None:
    if (before, after) not in TRANSITIONS:
        raise InternalError(f"a rollout cannot go from {before.value} to {after.value}")


def _stay(rollout: Rollout, reason: str) -> Move:
    same = replace(rollout, reason=reason)
    return Move(same, plan_wish(same))


def _take_reports(rollout: Rollout, seen: Observation) -> Rollout:
    """With what was measured in its present step; after the last step, what was measured there stays."""
    if rollout.step_began_at is None or rollout.state not in (S.RUNNING, S.PAUSED):
        return rollout
    reports = tuple(seen.window(each).report(each) for each in (rollout.from_version, rollout.to_version) if each)
    return replace(rollout, reports=reports, disagreements=seen.samples.disagreements)


def _began(rollout: Rollout) -> datetime:
    return rollout.step_began_at or rollout.began_at


def _find_bake(plan: RolloutPlan, step: int) -> tuple[float, bool]:
    """How long a step lasts in seconds, and whether only a person ends it."""
    if plan.strategy is Strategy.CANARY:
        steps = plan.steps or DEFAULT_STEPS
        return steps[min(step, len(steps) - 1)].bake_s, False
    is_endless = plan.strategy is Strategy.AB or (plan.strategy is Strategy.SHADOW and not plan.bake_s)
    return plan.bake_s, is_endless


def describe_step(rollout: Rollout) -> str:
    """The present step in words."""
    plan, share = rollout.plan, find_share(rollout.plan, rollout.step) / 100
    match plan.strategy:
        case Strategy.CANARY:
            count = len(plan.steps or DEFAULT_STEPS)
            return f"step {rollout.step + 1} of {count} ({share:g} % to version {rollout.to_version})"
        case Strategy.SHADOW:
            return f"the comparison with copies of {plan.sample_percent:g} % of the requests"
        case Strategy.AB:
            return f"the comparison with {share:g} % of the keys on version {rollout.to_version}"
    return f"the time with all requests on version {rollout.to_version}"


def _describe(rollout: Rollout) -> str:
    way = f"from version {rollout.from_version} to {rollout.to_version}"
    if not rollout.from_version:  # nothing served before
        way = f"to version {rollout.to_version}"
    return f"rollout {rollout.id} of '{rollout.model}' {way} ({rollout.plan.strategy.value})"


def _tell_waiting(text: str, seen: Observation) -> str:
    parts = [text] if text else []
    if seen.waiting:
        parts.append(f"waits for {', '.join(seen.waiting)}")
    elif not seen.n_servers:
        parts.append("no server has been heard of lately")
    return "; ".join(parts) + _tell_silent(seen)


def _tell_silent(seen: Observation) -> str:
    return f"; not waited for, because not heard of: {', '.join(seen.silent)}" if seen.silent else ""


def _tell_failures(rollout: Rollout, seen: Observation) -> str:
    told = [f"on {server}: {reason}" for server, reason in seen.failures.items()]
    more = [f"and on {len(told) - _MOST_TOLD} more"] if len(told) > _MOST_TOLD else []
    return f"version {rollout.to_version} does not serve {'; '.join(told[:_MOST_TOLD] + more)}"


def _sum_up(rollout: Rollout) -> str:
    found = next((each for each in rollout.reports if each.version == rollout.to_version), None)
    if found is None or not found.compared:
        return "; no answer was compared"
    return f"; {found.agreed} of {found.compared} answers agree ({found.agreed / found.compared:.2%})"
