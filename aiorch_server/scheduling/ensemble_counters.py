"""Statistics of what has no scheduler of its own in the core: counted on the event loop, shown in the same form."""

from __future__ import annotations

import time
from collections import Counter

from aiorch_server._core import Histogram
from aiorch_server.errors import AiorchError, BackendError, CapacityError, RequestCancelled
from aiorch_server.types import BatchStatistics, Duration, PhaseHistogram, SchedulerCounters

# The bounds of the core's schedulers, so that the histograms of all models add up.
_BOUNDS_NS = tuple(1 << bit for bit in range(13, 37))
_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
_PHASES = ("queue", "batch_wait", "compute_input", "infer", "compute_output", "total", "wait")


class EnsembleCounters:
    """What happened to the requests of one ensemble: each is an execution of its own.

    ``queue`` is the time in which a request waited for its steps' places (``max_inflight_requests``), ``infer`` the
    rest: the steps have statistics of their own, with their own queues.
    """

    def __init__(self) -> None:
        self._phases = {phase: Histogram() for phase in _PHASES}
        self._rows = 0
        self._fail = Duration()
        self._failures: Counter[str] = Counter()
        self._batches: dict[int, Duration] = {}
        self._last_ms = 0

    def count_success(self, rows: int, queue_ns: int, total_ns: int) -> None:
        """One answered request; ``rows`` is at least 1."""
        infer_ns = max(0, total_ns - queue_ns)
        for phase, value in (("queue", queue_ns), ("wait", queue_ns), ("infer", infer_ns), ("total", total_ns)):
            self._phases[phase].record(value)
        for phase in ("batch_wait", "compute_input", "compute_output"):
            self._phases[phase].record(0)
        self._rows += rows
        former = self._batches.get(rows, Duration())
        self._batches[rows] = Duration(former.count + 1, former.ns + infer_ns)
        self._last_ms = int(time.time() * 1000)

    def count_failure(self, error: BaseException, total_ns: int) -> None:
        """One request that ended with ``error``."""
        self._fail = Duration(self._fail.count + 1, self._fail.ns + total_ns)
        self._failures[_name_reason(error)] += 1

    def read(self, in_flight: int) -> SchedulerCounters:
        """Everything counted so far."""
        infer = self._duration("infer")
        return SchedulerCounters(
            rows=self._rows,
            executions=infer.count,
            success=self._duration("total"),
            fail=self._fail,
            failures={reason: self._failures[reason] for reason in _REASONS},
            queue=self._duration("queue"),
            compute_input=self._duration("compute_input"),
            compute_infer=infer,
            compute_output=self._duration("compute_output"),
            batch_sizes=tuple(
                BatchStatistics(rows, Duration(ran.count, 0), ran, Duration(ran.count, 0))
                for rows, ran in sorted(self._batches.items())
            ),
            last_inference_ms=self._last_ms,
            pending=0,
            in_flight=in_flight,
            phases={phase: _coarsen(histogram) for phase, histogram in self._phases.items()},
        )

    def durations(self) -> dict[int, int]:
        """As Scheduler.durations."""
        return self._phases["total"].bounds()

    def _duration(self, phase: str) -> Duration:
        return Duration(self._phases[phase].count, self._phases[phase].sum_ns)


def _name_reason(error: BaseException) -> str:
    if isinstance(error, CapacityError):
        return "REJECTED"
    if isinstance(error, RequestCancelled) or not isinstance(error, Exception):
        return "CANCELED"
    return "BACKEND" if isinstance(error, BackendError) or not isinstance(error, AiorchError) else "OTHER"


def _coarsen(histogram: Histogram) -> PhaseHistogram:
    below = [histogram.count_below(bound) for bound in _BOUNDS_NS]
    counts = tuple(after - before for before, after in zip([0, *below], [*below, histogram.count], strict=True))
    return PhaseHistogram(tuple(bound / 1e9 for bound in _BOUNDS_NS), counts, histogram.sum_ns / 1e9)
