"""One live model version under a tuner: what is seen of it, learnt from it, and moved at it."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from aiorch_server.config.objective import Objective
from aiorch_server.errors import AiorchError
from aiorch_server.lifecycle.threads import run_blocking
from aiorch_server.optimizer.budget import Claim
from aiorch_server.optimizer.burstiness import Traffic
from aiorch_server.optimizer.knee import CHEAPER, KneeTuner, find_knee
from aiorch_server.optimizer.predict import Demand, Knobs, Scenario, Surroundings
from aiorch_server.optimizer.service_time import ServiceTime
from aiorch_server.optimizer.sight import Sight
from aiorch_server.optimizer.tuner import Bounds, Move, Outlook, Situation, State, Tuner
from aiorch_server.optimizer.window import Window
from aiorch_server.types import BatchingPolicy, SchedulerObservation

#: Decisions that are remembered of each version.
MAX_DECISIONS: Final = 100
#: A curve is handed on when a point of it moved by more than this part.
_CURVE_CHANGE: Final = 0.03
#: A longer stretch tells of a pause rather than of the traffic; and where there is no target, a look lasts so long.
_PAUSE_S, _PLAIN_LOOK_S = 10.0, 5.0
#: Of the target, kept free for what the curve does not know; and no more of it than this in one run.
_MARGIN, _LONGEST_RUN = 0.05, 0.5
_REQUESTS, _REPETITIONS = 2000, 3
#: That the simulation knows.
_MOST_INSTANCES: Final = 64


class Levers(Protocol):
    """What a tuner can move of a live version, and what it sees of it."""

    @property
    def largest_rows(self) -> int:
        """Of the model."""
        ...

    @property
    def serving(self) -> int:
        """Instances that take batches."""
        ...

    @property
    def can_grow(self) -> bool:
        """Whether instances may come and go."""
        ...

    def observe(self) -> SchedulerObservation:
        """What the scheduler has counted."""
        ...

    def policy(self) -> BatchingPolicy:
        """How it batches now."""
        ...

    def set_policy(
        self,
        *,
        max_rows: int | None = None,
        delay_us: int | None = None,
        target_us: int | None = None,
        margin_us: int | None = None,
        is_deferring: bool | None = None,
        is_shedding: bool | None = None,
        curve: tuple[tuple[int, int], ...] | None = None,
    ) -> None:
        """Changes what is given."""
        ...

    async def set_instances(self, count: int) -> None:
        """Loads or lets go until there are so many; raises an AiorchError where one cannot be had."""
        ...


@dataclass(slots=True)
class Decision:
    """A move, when it was made (seconds since 1970), and what came of it; ``effect`` is "" until it is judged."""

    at_s: float
    knob: str
    before: float
    after: float
    reason: str
    effect: str = ""


class TunedVersion:
    """Ticks about once a second, on the event loop. ``cores``: those that instances share."""

    def __init__(
        self,
        name: str,
        version: int,
        levers: Levers,
        objective: Objective,
        *,
        cores: int,
        written_instances: int,
        now_s: Callable[[], float] = time.monotonic,
        on_decision: Callable[[TunedVersion, Decision], None] = lambda version, decision: None,
    ) -> None:
        self.name, self.version, self.objective = name, version, objective
        self.decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self.window: Window | None = None
        #: Decisions by their knob and what became of them: kept, undone or failed.
        self.outcomes: Counter[tuple[str, str]] = Counter()
        #: Processor time that looking and deciding took.
        self.cpu_s = 0.0
        self._levers, self._now_s, self._on_decision = levers, now_s, on_decision
        self.cores = cores
        written = levers.policy()
        limit = min(levers.largest_rows, objective.max_batch_size or levers.largest_rows)
        fewest, most = _bound_instances(objective, written_instances if levers.can_grow else levers.serving, cores)
        longest_us = objective.max_delay_us or written.delay_us or objective.latency_us // 2
        self.bounds = Bounds(limit, longest_us, fewest, most)
        self._has_target = has_target = bool(objective.latency_us)
        knobs = Knobs(
            max_rows=min(limit, written.max_rows),
            delay_us=min(written.delay_us, longest_us),
            is_deferring=has_target,
            is_shedding=has_target,
            instances=levers.serving,
        )
        self.tuner = (
            Tuner(
                knobs,
                self.bounds,
                allowed_misses=objective.allowed_misses,
                target_us=objective.latency_us,
                instance_cost=objective.cost,
            )
            if has_target
            else KneeTuner(knobs, self.bounds)
        )
        self.service_time = ServiceTime(levers.largest_rows, cores=float(cores))
        self.traffic = Traffic()
        self._curve: tuple[tuple[int, int], ...] = ()
        self._before: SchedulerObservation | None = None
        self._looks_at_s = 0.0
        levers.set_policy(
            target_us=objective.latency_us,
            margin_us=round(objective.latency_us * _MARGIN),
            is_shedding=has_target,
            is_deferring=has_target,
            max_rows=knobs.max_rows,
        )

    @property
    def state(self) -> str:
        """What its tuner waits for."""
        return self.tuner.state.value

    @property
    def rate(self) -> float:
        """Requests/s lately."""
        return self.traffic.rate

    @property
    def knobs(self) -> dict[str, float]:
        """Where they stand, by the names of decisions."""
        return {
            "max_batch_size": self.tuner.knobs.max_rows,
            "delay_us": self.tuner.knobs.delay_us,
            "instances": self._levers.serving,
        }

    @property
    def seen(self) -> SchedulerObservation | None:
        """What the scheduler had counted at the last look."""
        return self._before

    @property
    def measured_us(self) -> float:
        """The objective's percentile of what was answered between the last two looks; infinite where nothing was."""
        found = self.window.percentile(self.objective.percentile / 100.0) if self.window is not None else None
        return found.value_ns / 1e3 if found is not None else math.inf

    @property
    def predicted_us(self) -> float:
        """The same percentile as the last look for a move foretold it; infinite before there was one."""
        promised = self.tuner.promised
        return promised.percentile_us if promised is not None else math.inf

    @property
    def claim(self) -> Claim:
        """What it has of the machine, and what it could do with; of one that is moving, what it will have."""
        tuner, bounds = self.tuner, self.bounds
        is_short = tuner.state is State.STEADY and tuner.is_missing
        count = max(tuner.knobs.instances, self._levers.serving)
        return Claim(self.objective.priority, count, bounds.min_instances, bounds.max_instances, is_short)

    def limit_instances(self, most: int) -> None:
        """From now on it may have so many; who has more keeps them."""
        most = max(most, self.tuner.knobs.instances)
        self.tuner.bounds = replace(self.bounds, max_instances=min(most, self.bounds.max_instances))

    async def give_up_instance(self, to: str) -> None:
        """One goes, whatever that does to its own latency; nothing while a move is being judged."""
        if self.tuner.state is not State.STEADY:
            return
        before = self.tuner.knobs
        self.tuner.knobs = after = replace(before, instances=before.instances - 1)
        await self._make(Move("instances", before, after, f"'{to}' misses its objective and has a higher priority"))

    async def tick(self) -> None:
        """Looks, learns, and makes the move that is due, if any; returns when it is made."""
        count = min(max(self._levers.serving, self.bounds.min_instances), self.bounds.max_instances)
        if count != self._levers.serving and self.tuner.state is State.LEARNING:
            await self._levers.set_instances(count)
        now_s = self._now_s()
        if not self._has_target and self.tuner.state in (State.LEARNING, State.STEADY) and now_s < self._looks_at_s:
            return
        self._looks_at_s = now_s + _PLAIN_LOOK_S
        began_s = time.thread_time()
        observation = self._levers.observe()
        self.cpu_s += time.thread_time() - began_s
        before, self._before = self._before, observation
        if before is None or not 0 < observation.at_ns - before.at_ns <= _PAUSE_S * 1e9:
            return
        # in a thread: what is simulated for a decision takes some 50 ms
        move = await run_blocking(f"tune {self.name}:{self.version}", lambda: self._think(before, observation))
        if move is not None:
            await self._make(move)

    def _think(self, before: SchedulerObservation, observation: SchedulerObservation) -> Move | None:
        began_s = time.thread_time()
        try:
            return self._decide(before, observation)
        finally:
            self.cpu_s += time.thread_time() - began_s

    def _decide(self, before: SchedulerObservation, observation: SchedulerObservation) -> Move | None:
        self.window = window = Window.between(before, observation)
        self.service_time.observe(window.runs, instances=max(1, window.instances), now_s=window.end_s)
        self.traffic.observe(window.slots)
        self._hand_on_curve()
        now_s = self._now_s()
        # instances may have died, or come late: moves begin where things stand
        if self.tuner.state in (State.LEARNING, State.STEADY):
            self.tuner.knobs = replace(self.tuner.knobs, instances=self._levers.serving)
        verdict = self.tuner.verdict
        move = self.tuner.step(now_s, self._describe(window), self._situate(window))
        # a new move empties the verdict of the one before, which stays told
        if self.tuner.verdict not in (verdict, "") and self.decisions:
            self.decisions[-1].effect = self.tuner.verdict
            is_undone = move is not None and move.is_undone
            self.outcomes[self.decisions[-1].knob, "undone" if is_undone else "kept"] += 1
        return move

    def _hand_on_curve(self) -> None:
        if not self.service_time.is_known or not self._has_target:
            return
        curve = self.service_time.curve()
        is_moved = len(curve) != len(self._curve) or any(
            abs(new - old) > _CURVE_CHANGE * old for (_, new), (_, old) in zip(curve, self._curve, strict=True)
        )
        # refusals by run times that are guessed would keep those sizes from ever being seen
        if is_moved and self.service_time.is_trusted(1):
            self._levers.set_policy(curve=curve)
            self._curve = curve

    def _describe(self, window: Window) -> Sight:
        found = window.percentile(self.objective.percentile / 100.0)
        return Sight(
            window.length_s,
            window.arrivals,
            window.answered,
            window.late,
            window.lost,
            found.value_ns / 1e3 if found is not None else 0.0,
            sum(run.rows * run.executions for run in window.runs),
            sum(run.sum_ns for run in window.runs) / 1e3,
        )

    def _situate(self, window: Window) -> Situation:
        cap = self.tuner.knobs.max_rows
        if not self._has_target and self.service_time.is_known:
            estimates, seen = self.service_time.estimates(), self.service_time.largest_seen
            knee = find_knee(estimates, cap=cap, largest_seen=seen, most=self.bounds.max_rows)
            return Situation(estimates[0].mean_ns / 1e3, _promise_nothing, knee=knee)
        if not self.service_time.is_known or not self.service_time.is_trusted(min(cap, self._usual_rows())):
            return Situation(None, _promise_nothing)
        run_us = self.service_time.estimate(min(cap, self._usual_rows())).mean_ns / 1e3
        suggested = replace(self.tuner.knobs, max_rows=self._find_cap())
        return Situation(run_us, _Predictor(self, window.rows_per_request), (suggested,))

    def _usual_rows(self) -> int:
        seen = self.window.runs if self.window is not None else ()
        executions = sum(run.executions for run in seen)
        return max(1, round(sum(run.rows * run.executions for run in seen) / executions)) if executions else 1

    def _find_cap(self) -> int:
        """The smallest batch beyond which rows get no cheaper, and which leaves room in the target for waiting."""
        known = [each for each in self.service_time.estimates() if each.rows <= self.bounds.max_rows]
        estimates = [each for each in known if each.is_trusted] or known
        longest_ns = self.objective.latency_us * 1000 * _LONGEST_RUN or float("inf")
        fitting = [each for each in estimates if each.mean_ns <= longest_ns] or estimates[:1]
        cheapest = min(each.mean_ns / each.rows for each in fitting)
        return next(each.rows for each in fitting if each.mean_ns / each.rows <= (1 + CHEAPER) * cheapest)

    async def _make(self, move: Move) -> None:
        before, after = move.before, move.after
        decision = Decision(time.time(), move.knob, _read(move.knob, before), _read(move.knob, after), move.reason)
        self.decisions.append(decision)
        self._on_decision(self, decision)
        try:
            if after.instances != before.instances:
                await self._levers.set_instances(after.instances)
            self._levers.set_policy(max_rows=after.max_rows, delay_us=after.delay_us)
        except (AiorchError, ValueError) as error:
            decision.effect = f"it could not be made: {error}"
            self.outcomes[move.knob, "failed"] += 1
            self.tuner.reject(self._now_s(), decision.effect)

    def give_back(self, written: BatchingPolicy) -> None:
        """Lets the version batch as it was written."""
        self._levers.set_policy(
            max_rows=written.max_rows,
            delay_us=written.delay_us,
            target_us=written.target_us,
            margin_us=written.margin_us,
            is_deferring=written.is_deferring,
            is_shedding=written.is_shedding,
            curve=(),
        )


class _Predictor:
    """What knobs promise now; the scenario is drawn when it is first asked for."""

    def __init__(self, tuned: TunedVersion, rows_per_request: float) -> None:
        self._tuned, self._rows = tuned, rows_per_request
        self._scenario: Scenario | None = None

    def __call__(self, knobs: Knobs) -> Outlook:
        tuned = self._tuned
        if self._scenario is None:
            process = tuned.traffic.process()
            objective = tuned.objective
            counts = range(1, tuned.bounds.max_instances + 1)
            slowdowns = tuple(tuned.service_time.contention(count, 1)[0] for count in counts)
            self._scenario = Scenario.of(
                tuned.service_time.estimates(1),
                process,
                rows_per_request=self._rows,
                demand=Demand(
                    objective.latency_us, objective.percentile / 100.0, round(objective.latency_us * _MARGIN)
                ),
                surroundings=Surroundings(
                    cores=float(tuned.cores), slowdowns=slowdowns, stalls=tuned.service_time.stalls()
                ),
                requests=_REQUESTS,
                repetitions=_REPETITIONS,
            )
        found = self._scenario.predict(knobs)
        good = 1.0 - found.late - found.lost
        # of the share: how much came differs between repetitions too, and says nothing of the knobs
        error = statistics.stdev(found.goods) / math.sqrt(len(found.goods)) if len(found.goods) > 1 else 1.0
        return Outlook(good, error, found.percentile_ns / 1e3, found.goods)


def _bound_instances(objective: Objective, written: int, cores: int) -> tuple[int, int]:
    """From and to how many; what the objective does not say stays as it is written."""
    if not objective.max_instances and objective.min_instances == Objective().min_instances:
        return written, written
    most = min(objective.max_instances or max(cores, objective.min_instances), _MOST_INSTANCES)
    return min(objective.min_instances, most), most


def _promise_nothing(knobs: Knobs) -> Outlook:
    return Outlook(0.0, 1.0, float("inf"))


def _read(knob: str, knobs: Knobs) -> float:
    return float({"max_batch_size": knobs.max_rows, "delay": knobs.delay_us, "instances": knobs.instances}[knob])
