"""What happened between two observations of a scheduler, and what may be said of it. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from aiorch_server.optimizer.burstiness import SLOT_S, Slots
from aiorch_server.optimizer.runs import Runs
from aiorch_server.types import SchedulerObservation

_NS_PER_S = 1_000_000_000
#: Parts of a power of two that the core's histograms tell apart, as a power of two.
_SUB_BITS = 4
_TIMES_MODULUS = 1 << 32
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Percentile:
    """A latency that ``quantile`` of the answers were not above, between the bounds with that confidence; ns.

    ``high_ns`` is infinite where there were too few answers to bound it.
    """

    quantile: float
    value_ns: float
    low_ns: float
    high_ns: float
    answers: int


@dataclass(frozen=True, slots=True)
class Window:
    """Differences of counts over ``length_s`` seconds up to ``end_s``, and how things stood at the end.

    ``durations`` has the answers by the upper bound of their latency in ns; ``in_time`` and ``late`` only those that
    came while there was a target.
    """

    end_s: float
    length_s: float
    arrivals: int
    arrived_rows: int
    answered: int
    answered_rows: int
    failed: int
    refused_full: int
    refused_late: int
    dropped_late: int
    in_time: int
    late: int
    waiting: int
    waiting_rows: int
    instances: int
    slots: Slots
    runs: tuple[Runs, ...]
    durations: Mapping[int, int]

    @classmethod
    def between(cls, before: SchedulerObservation, after: SchedulerObservation) -> Window:
        """ValueError where they are not two observations of one scheduler, in this order."""
        if after.at_ns <= before.at_ns or after.arrivals < before.arrivals or after.slots < before.slots:
            raise ValueError("a window lies between two observations of one scheduler, the older one first")
        runs = {run.rows: run for run in before.runs}
        seen = []
        for run in after.runs:
            old = runs.get(run.rows)
            executions = run.executions - (old.executions if old else 0)
            if executions > 0:
                busy_ns = run.busy_ns - (old.busy_ns if old else 0)
                squares = run.busy_squares - (old.busy_squares if old else 0.0)
                times = _subtract(run.times, old.times if old else {})
                seen.append(Runs(run.rows, executions, float(busy_ns), max(squares, busy_ns**2 / executions), times))
        durations = {
            upper_ns: count - before.durations.get(upper_ns, 0)
            for upper_ns, count in after.durations.items()
            if count > before.durations.get(upper_ns, 0)
        }
        slots = after.slots - before.slots
        return cls(
            end_s=after.at_ns / _NS_PER_S,
            length_s=(after.at_ns - before.at_ns) / _NS_PER_S,
            arrivals=after.arrivals - before.arrivals,
            arrived_rows=after.arrived_rows - before.arrived_rows,
            answered=after.answered - before.answered,
            answered_rows=after.answered_rows - before.answered_rows,
            failed=after.failed - before.failed,
            refused_full=after.refused_full - before.refused_full,
            refused_late=after.refused_late - before.refused_late,
            dropped_late=after.dropped_late - before.dropped_late,
            in_time=after.in_time - before.in_time,
            late=after.late - before.late,
            waiting=after.waiting,
            waiting_rows=after.waiting_rows,
            instances=after.instances,
            # arrivals of the slot that is not over are counted a window early or late, which evens out
            slots=Slots(SLOT_S, slots, after.arrivals - before.arrivals, after.slot_squares - before.slot_squares),
            runs=tuple(seen),
            durations=durations,
        )

    @property
    def rate(self) -> float:
        """Requests/s that came."""
        return self.arrivals / self.length_s

    @property
    def rows_per_request(self) -> float:
        """In the mean; 1 where nothing came."""
        return self.arrived_rows / self.arrivals if self.arrivals else 1.0

    @property
    def busy(self) -> float:
        """Part of the instances' time that runs took; what ran over the window's edge counts where it ended."""
        return sum(run.sum_ns for run in self.runs) / _NS_PER_S / self.length_s / max(1, self.instances)

    @property
    def goodput(self) -> float:
        """Answers within the target, per second; all answers where there was none."""
        judged = self.in_time + self.late
        return (self.in_time if judged else self.answered) / self.length_s

    @property
    def lost(self) -> int:
        """Requests that the server did not answer because of the load."""
        return self.refused_full + self.refused_late + self.dropped_late

    def percentile(self, quantile: float, confidence: float = 0.95) -> Percentile | None:
        """Of the latencies of the answers, with bounds from order statistics; None where there were no answers."""
        return find_percentile(self.durations, quantile, confidence)

    def part_above(self, latency_ns: float) -> float:
        """Part of the answers that took longer; 0 where there were none."""
        total = sum(self.durations.values())
        above = sum(count * _part_above(upper_ns, latency_ns) for upper_ns, count in self.durations.items())
        return above / total if total else 0.0


def find_percentile(durations: Mapping[int, int], quantile: float, confidence: float = 0.95) -> Percentile | None:
    """Of a histogram ``{upper_ns: count}`` of the core; None of an empty one.

    The number of answers below the true percentile is binomial: the bounds are the latencies at the ranks that leave
    equal parts of the rest of the confidence on both sides.
    """
    if not 0.0 < quantile < 1.0 or not 0.0 < confidence < 1.0:
        raise ValueError("quantile and confidence lie between 0 and 1")
    total = sum(durations.values())
    if total == 0:
        return None
    reach = _NORMAL.inv_cdf(0.5 + confidence / 2) * math.sqrt(total * quantile * (1.0 - quantile))
    low, high = total * quantile - reach, total * quantile + reach
    return Percentile(
        quantile,
        _at_rank(durations, total * quantile),
        _at_rank(durations, low) if low > 0 else 0.0,
        _at_rank(durations, high) if high < total else math.inf,
        total,
    )


def _subtract(after: Mapping[int, int], before: Mapping[int, int]) -> dict[int, int]:
    """Differences of counts that may have run over."""
    counts = {upper_ns: (count - before.get(upper_ns, 0)) % _TIMES_MODULUS for upper_ns, count in after.items()}
    return {upper_ns: count for upper_ns, count in counts.items() if count}


def _at_rank(durations: Mapping[int, int], rank: float) -> float:
    """The latency that so many answers are below, evenly spread within a bucket."""
    below = 0
    for upper_ns in sorted(durations):
        count = durations[upper_ns]
        if below + count >= rank:
            return upper_ns - _width_of(upper_ns) * (1.0 - (rank - below) / count)
        below += count
    return float(max(durations))


def _part_above(upper_ns: int, latency_ns: float) -> float:
    return min(1.0, max(0.0, (upper_ns - latency_ns) / _width_of(upper_ns)))


def _width_of(upper_ns: int) -> int:
    return 1 << max(0, (max(1, upper_ns - 1)).bit_length() - 1 - _SUB_BITS)
