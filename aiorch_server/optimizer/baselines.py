"""Rules of other servers over the same levers, to compare with: ``tuning: aimd`` or ``linear`` beside an objective.

No batching and a fixed delay need no rule: they are configurations (``max_batch_size: 1``; ``dynamic_batching { }``,
which takes what waits as soon as an instance is free) under ``tuning: off``.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from aiorch_server.config.objective import Objective
from aiorch_server.optimizer.tuned import MAX_DECISIONS, Decision, Levers
from aiorch_server.optimizer.window import Window
from aiorch_server.types import BatchingPolicy, SchedulerObservation

_NS_PER_US: Final = 1000
#: A version is looked at so often, because these rules go by single batches; and so many times in a tick.
LOOK_S: Final = 0.05
LOOKS: Final = 20


@dataclass(frozen=True, slots=True)
class Setting:
    """What a rule wants: at most ``max_rows`` in a batch, and how long the oldest may wait for company.

    ``curve`` has run times in ns by rows, by which what would be late is dropped; empty: nothing is.
    """

    max_rows: int
    delay_us: int = 0
    curve: tuple[tuple[int, int], ...] = ()


class Rule(Protocol):
    """Decides from what was seen, and from nothing else."""

    @property
    def setting(self) -> Setting:
        """What it wants now."""
        ...

    def step(self, window: Window) -> None:
        """Takes in what was seen since the last call."""
        ...


class Aimd:
    """Additive increase, multiplicative decrease of the largest batch, as Clipper has it (Crankshaw et al., NSDI 2017,
    section 4.3.1).

    Beginning at 1, one request more as long as full batches are run within the objective; 10 % less when a batch took
    longer. Only a batch's own run time counts. Batches never wait for company, and nothing is refused.
    """

    def __init__(self, largest_rows: int, target_us: int) -> None:
        self._largest_rows, self._target_ns = largest_rows, target_us * _NS_PER_US
        self._rows = 1.0

    @property
    def setting(self) -> Setting:
        """The cap so far."""
        return Setting(int(self._rows))

    def step(self, window: Window) -> None:
        """One step up or down, if any."""
        if any(run.mean_ns > self._target_ns for run in window.runs):
            self._rows = max(1.0, 0.9 * self._rows)
        elif any(run.rows + window.rows_per_request > int(self._rows) for run in window.runs):
            self._rows = min(float(self._largest_rows), self._rows + window.rows_per_request)


class Linear:
    """The rule of BentoML's adaptive batching (its ``CorkDispatcher``).

    The time of a run is fitted as ``a * rows + b`` by least squares over the last 50 runs. While fewer than the largest
    batch wait, one more is waited for as long as what that costs all n of them, ``n * (gap + a)``, is no more than 95 %
    of the mean wait of those answered lately. What would end after the objective, by the fit, is dropped first. There
    the rule runs at every tick of a loop; here the delay is set at which it would stop, at the present mean gap between
    requests.
    """

    _KEPT, _DECAY = 50, 0.95

    def __init__(self, largest_rows: int, target_us: int) -> None:
        self._largest_rows, self._target_ns = largest_rows, target_us * _NS_PER_US
        self._runs: deque[tuple[float, float]] = deque(maxlen=self._KEPT)  # rows, ns
        self._waits_ns: deque[float] = deque(maxlen=LOOKS)
        self._gaps_ns: deque[float] = deque(maxlen=LOOKS)

    @property
    def setting(self) -> Setting:
        """By the fit as it is now; no waiting before there is one."""
        if not self._runs:
            return Setting(self._largest_rows)
        a_ns, b_ns = self._fit()
        curve = tuple((rows, max(1, round(a_ns * rows + b_ns))) for rows in _double(self._largest_rows))
        if not self._gaps_ns:
            return Setting(self._largest_rows, 0, curve)
        gap_ns = sum(self._gaps_ns) / len(self._gaps_ns)
        wait_ns = sum(self._waits_ns) / len(self._waits_ns)
        rows = min(self._largest_rows, int(self._DECAY * wait_ns / (gap_ns + a_ns)))
        room_ns = max(0.0, self._target_ns - a_ns * max(1, rows) - b_ns)
        return Setting(self._largest_rows, int(min(rows * gap_ns, room_ns)) // _NS_PER_US, curve)

    def step(self, window: Window) -> None:
        """Keeps the last runs, waits and gaps."""
        for run in window.runs:
            self._runs.extend([(run.rows, run.mean_ns)] * min(run.executions, self._KEPT))
        if window.arrivals:
            self._gaps_ns.append(window.length_s * 1e9 / window.arrivals)
            executions = sum(run.executions for run in window.runs)
            answers = sum(window.durations.values())
            if executions and answers:
                total_ns = sum(upper_ns * count for upper_ns, count in window.durations.items()) / answers
                # of a request, whose run is shared by those in it
                run_ns = sum(run.sum_ns * run.rows for run in window.runs)
                run_ns /= sum(run.executions * run.rows for run in window.runs)
                self._waits_ns.append(max(0.0, total_ns - run_ns))
            else:
                self._waits_ns.append(0.0)

    def _fit(self) -> tuple[float, float]:
        """``a`` and ``b``, neither below 0; of least norm where only one size was seen."""
        count = len(self._runs)
        rows, times = (sum(each) / count for each in zip(*self._runs, strict=True))
        variance = sum((x - rows) ** 2 for x, _ in self._runs) / count
        if variance < 1e-9:
            part = times / (rows**2 + 1)
            return part * rows, part
        a_ns = max(0.0, sum((x - rows) * (y - times) for x, y in self._runs) / count / variance)
        return a_ns, max(0.0, times - a_ns * rows)


RULES: Final[dict[str, Callable[[int, int], Rule]]] = {"aimd": Aimd, "linear": Linear}


class RuledVersion:
    """One live model version under a rule; in a tuned one's place. ``on_decision`` hears of what a tick has changed.

    Without a target nothing is moved. A tick looks ``looks`` times, ``look_s`` apart.
    """

    def __init__(
        self,
        name: str,
        version: int,
        levers: Levers,
        objective: Objective,
        policy: str,
        *,
        looks: int = LOOKS,
        look_s: float = LOOK_S,
        on_decision: Callable[[RuledVersion, Decision], None] = lambda version, decision: None,
    ) -> None:
        self.name, self.version, self.objective, self.state = name, version, objective, policy
        self.decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self.window: Window | None = None
        self.rate = 0.0
        largest = min(levers.largest_rows, objective.max_batch_size or levers.largest_rows)
        self.rule: Rule = RULES[policy](largest, objective.latency_us)
        self._levers, self._on_decision = levers, on_decision
        self._looks, self._look_s = looks, look_s
        self._before: SchedulerObservation | None = None
        self._made = self.rule.setting
        if objective.latency_us:
            self._set(self._made)

    @property
    def knobs(self) -> dict[str, float]:
        """Where they stand, by the names of decisions."""
        return {
            "max_batch_size": self._made.max_rows,
            "delay_us": self._made.delay_us,
            "instances": self._levers.serving,
        }

    async def tick(self) -> None:
        """So many looks, each with what the rule makes of it."""
        if not self.objective.latency_us:
            return
        made, first = self._made, self._before
        for _ in range(self._looks):
            self._look()
            await asyncio.sleep(self._look_s)
        if first is not None and self._before is not None and self._before.at_ns > first.at_ns:
            self.window = Window.between(first, self._before)
            self.rate = self.window.rate
        for decision in _compare(made, self._made, self.state):
            self.decisions.append(decision)
            self._on_decision(self, decision)

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

    def _look(self) -> None:
        before, self._before = self._before, self._levers.observe()
        if before is None or self._before.at_ns <= before.at_ns:
            return
        self.rule.step(Window.between(before, self._before))
        if (wanted := self.rule.setting) != self._made:
            self._set(wanted)

    def _set(self, setting: Setting) -> None:
        self._levers.set_policy(
            max_rows=setting.max_rows,
            delay_us=setting.delay_us,
            target_us=self.objective.latency_us,
            margin_us=0,
            is_deferring=False,
            is_shedding=bool(setting.curve),
            curve=setting.curve,
        )
        self._made = setting


def _compare(before: Setting, after: Setting, policy: str) -> Iterator[Decision]:
    knobs = (("max_batch_size", before.max_rows, after.max_rows), ("delay", before.delay_us, after.delay_us))
    for knob, old, new in knobs:
        if old != new:
            yield Decision(time.time(), knob, old, new, f"the rule '{policy}'")


def _double(most: int) -> Iterator[int]:
    """1, 2, 4 ... and the most."""
    yield from (1 << bit for bit in range(math.ceil(math.log2(most)) if most > 1 else 0))
    yield most
