"""A model version that is thought up: what tuners and rules see and move of a live one, over a simulation. Pure.

Time is what it is advanced by. What it counts is what the core counts of a live version, so that a tuner cannot tell
them apart; only gaps between arrivals are left out, which nobody reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from aiorch_server._core import Fate, Simulation
from aiorch_server.optimizer.arrivals import Floats, Ints
from aiorch_server.types import BatchingPolicy, RunObservation, SchedulerObservation

_SLOT_NS: Final = 10_000_000
#: Parts of a power of two that the core's histograms tell apart, as a power of two: of latencies, and of run times.
_LATENCY_BITS, _RUN_BITS = 4, 3
#: Larger batches have no histogram of run times.
_MOST_TIMED: Final = 64
_FATES: Final = (
    ("refused_late", Fate.LATE_AT_DOOR),
    ("dropped_late", Fate.LATE_IN_QUEUE),
    ("refused_full", Fate.NO_ROOM),
    ("failed", Fate.EXPIRED),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a version runs on: ``curve`` has pairs (rows, ns) of what a run takes alone, ascending; ``spread`` is the
    standard deviation of the logarithm of a run time, ``noise`` are standard normal values for it, one for each batch
    in turn. ``slowdowns``: how many times slower a run is while 1, 2 ... instances run; there are at most so many.
    """

    curve: Sequence[tuple[int, int]]
    largest_rows: int
    slowdowns: Sequence[float] = (1.0,)
    spread: float = 0.0
    noise: Floats | None = None
    cores: float = 64.0

    def curve_of(self, instances: int) -> tuple[tuple[int, int], ...]:
        """What runs take while so many run."""
        return tuple((rows, round(run_ns * self.slowdowns[instances - 1])) for rows, run_ns in self.curve)

    def run_ns(self, rows: int) -> float:
        """Of a run alone, between the curve's points."""
        points = np.array(self.curve, np.float64)
        return float(np.interp(rows, points[:, 0], points[:, 1]))


class SimulatedVersion:
    """The levers of one; see ``tuned.Levers``. ``times_ns`` and ``rows`` are all the requests that there will be."""

    def __init__(
        self, machine: Machine, times_ns: Ints, rows: Ints, *, policy: BatchingPolicy, instances: int = 1
    ) -> None:
        self.largest_rows = machine.largest_rows
        self.can_grow = len(machine.slowdowns) > 1
        self.serving = instances
        self._policy = policy
        self._times_ns, self._rows = times_ns, rows
        self._now_ns = 0
        self._world = Simulation(
            times_ns,
            rows=rows,
            truth=machine.curve,
            spreads=[machine.spread] * len(machine.curve),
            noise=machine.noise,
            slowdowns=machine.slowdowns,
            cores=machine.cores,
            instances=len(machine.slowdowns),
            max_rows=policy.max_rows,
            delay_ns=policy.delay_us * 1000,
            target_ns=policy.target_us * 1000,
            margin_ns=policy.margin_us * 1000,
            is_deferring=policy.is_deferring,
            is_shedding=policy.is_shedding,
            curve=policy.curve,
        )
        self._world.set_policy(instances=instances)
        self._open = np.zeros(0, np.int64)  # requests that have come and are not settled, and batches that run
        self._running = np.zeros(0, np.int64)
        self._come = self._begun = 0
        self._counts: Counter[str] = Counter()
        self._runs: dict[int, tuple[int, int, float, Counter[int]]] = {}
        self._durations: Counter[int] = Counter()
        self._slot_squares = 0.0
        self._slots_counted = 0

    @property
    def now_s(self) -> float:
        """How far it was advanced."""
        return self._now_ns / 1e9

    def advance(self, until_s: float) -> None:
        """Lets happen what does until then."""
        self._now_ns = round(until_s * 1e9)
        self._world.advance(self._now_ns)
        self._count_requests()
        self._count_batches()

    def policy(self) -> BatchingPolicy:
        """How it batches now."""
        return self._policy

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
        """Changes what is given; ValueError as a scheduler has it."""
        self._world.set_policy(
            max_rows=max_rows,
            delay_ns=None if delay_us is None else delay_us * 1000,
            target_ns=None if target_us is None else target_us * 1000,
            margin_ns=None if margin_us is None else margin_us * 1000,
            is_deferring=is_deferring,
            is_shedding=is_shedding,
            curve=curve,
        )
        now = self._policy
        self._policy = BatchingPolicy(
            now.max_rows if max_rows is None else max_rows,
            now.delay_us if delay_us is None else delay_us,
            now.target_us if target_us is None else target_us,
            now.margin_us if margin_us is None else margin_us,
            now.is_deferring if is_deferring is None else is_deferring,
            now.is_shedding if is_shedding is None else is_shedding,
            now.instances,
            now.curve if curve is None else curve,
        )

    async def set_instances(self, count: int) -> None:
        """As ``put_instances``; tuners await it."""
        self.put_instances(count)

    def put_instances(self, count: int) -> None:
        """From now on so many; ValueError beyond what the machine has."""
        self._world.set_policy(instances=count)
        self.serving = count

    def observe(self) -> SchedulerObservation:
        """What happened until now."""
        counts = self._counts
        waits = self._world.batch_of[self._open] < 0
        return SchedulerObservation(
            at_ns=self._now_ns,
            arrivals=self._come,
            arrived_rows=counts["rows"],
            answered=counts["answered"],
            answered_rows=counts["answered_rows"],
            failed=counts["failed"],
            refused_full=counts["refused_full"],
            refused_late=counts["refused_late"],
            dropped_late=counts["dropped_late"],
            in_time=counts["in_time"],
            late=counts["late"],
            waiting=int(np.count_nonzero(waits)),
            waiting_rows=int(self._rows[self._open][waits].sum()),
            running=int(np.count_nonzero(~waits)),
            instances=self.serving,
            busy_instances=self._world.running,
            gaps_ns=0,
            gap_squares=0.0,
            slots=self._slots_counted,
            slot_squares=self._slot_squares,
            runs=tuple(
                RunObservation(rows, executions, busy_ns, squares, dict(times))
                for rows, (executions, busy_ns, squares, times) in sorted(self._runs.items())
            ),
            durations=dict(self._durations),
        )

    def _count_requests(self) -> None:
        come = int(np.searchsorted(self._times_ns, self._now_ns, side="right"))
        arrived = np.arange(self._come, come)
        self._count_slots(self._times_ns[self._come : come])
        self._come = come
        self._counts["rows"] += int(self._rows[arrived].sum())
        known = np.concatenate([self._open, arrived])
        ends_ns = self._world.latencies_ns[known]
        self._open = known[ends_ns == 0]
        answered = ends_ns > 0
        latencies_ns = ends_ns[answered]
        self._counts["answered"] += len(latencies_ns)
        self._counts["answered_rows"] += int(self._rows[known[answered]].sum())
        if self._policy.target_us:
            in_time = int(np.count_nonzero(latencies_ns <= self._policy.target_us * 1000))
            self._counts["in_time"] += in_time
            self._counts["late"] += len(latencies_ns) - in_time
        for name, fate in _FATES:
            self._counts[name] += int(np.count_nonzero(ends_ns == fate))
        self._durations.update(_count_bounds(latencies_ns, _LATENCY_BITS))

    def _count_slots(self, times_ns: Ints) -> None:
        """Whole slots only; what a window's last one has more is counted by itself, which evens out."""
        self._slots_counted = self._now_ns // _SLOT_NS
        _, counts = np.unique(times_ns // _SLOT_NS, return_counts=True)
        self._slot_squares += float((counts.astype(np.float64) ** 2).sum())

    def _count_batches(self) -> None:
        starts_ns, ends_ns = self._world.batch_starts_ns, self._world.batch_ends_ns
        known = np.concatenate([self._running, np.arange(self._begun, len(starts_ns))])
        self._begun = len(starts_ns)
        self._running = known[ends_ns[known] == 0]
        ended = known[ends_ns[known] > 0]
        sizes, busy_ns = self._world.batch_rows[ended], ends_ns[ended] - starts_ns[ended]
        for rows in np.unique(sizes).tolist():
            taken_ns = busy_ns[sizes == rows]
            executions, sum_ns, squares, times = self._runs.get(rows, (0, 0, 0.0, Counter[int]()))
            if rows <= _MOST_TIMED:
                times.update(_count_bounds(taken_ns, _RUN_BITS))
            squares += float((taken_ns.astype(np.float64) ** 2).sum())
            self._runs[rows] = executions + len(taken_ns), sum_ns + int(taken_ns.sum()), squares, times


def _count_bounds(values_ns: Ints, bits: int) -> Mapping[int, int]:
    """How many values lie below each upper bound of a histogram, and not below the one before."""
    if not len(values_ns):
        return {}
    lengths = np.frexp(values_ns.astype(np.float64))[1].astype(np.int64)  # bits of a whole number below 2**53
    shifts = np.maximum(0, lengths - 1 - bits)
    bounds, counts = np.unique(((values_ns >> shifts) + 1) << shifts, return_counts=True)
    return dict(zip(bounds.tolist(), counts.tolist(), strict=True))
