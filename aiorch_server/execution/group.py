"""Several compiled schedulers that count and close as one: for models whose instances have a queue each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from aiorch_server._core import Scheduler
from aiorch_server.types import BatchStatistics, Duration, PhaseHistogram, SchedulerCounters


class SchedulerGroup:
    """``members[i]`` is the scheduler that instance ``i`` pulls from; the rest is the sum of them."""

    def __init__(self, members: Sequence[Scheduler]) -> None:
        self.members = tuple(members)

    @property
    def pending(self) -> int:
        """Requests in the queues."""
        return sum(member.pending for member in self.members)

    @property
    def in_flight(self) -> int:
        """Requests that are queued or running."""
        return sum(member.in_flight for member in self.members)

    def close(self) -> None:
        """No new requests; what is queued is still served."""
        for member in self.members:
            member.close()

    def abandon(self, code: int, text: str) -> None:
        """Closes, and fails everything that is still queued."""
        for member in self.members:
            member.abandon(code, text)

    def counters(self) -> SchedulerCounters:
        """The members' counters added up."""
        return add_counters([member.counters() for member in self.members])

    def durations(self) -> dict[int, int]:
        """The members' durations added up; see Scheduler.durations."""
        total: Counter[int] = Counter()
        for member in self.members:
            total.update(member.durations())
        return dict(total)


def add_counters(parts: Sequence[SchedulerCounters]) -> SchedulerCounters:
    """The sum of ``parts``, of which there is at least one."""
    first = parts[0]
    sizes: dict[int, BatchStatistics] = {}
    for each in (size for part in parts for size in part.batch_sizes):
        sizes[each.batch_size] = _add_sizes(sizes[each.batch_size], each) if each.batch_size in sizes else each
    return SchedulerCounters(
        rows=sum(part.rows for part in parts),
        executions=sum(part.executions for part in parts),
        success=add_durations(part.success for part in parts),
        fail=add_durations(part.fail for part in parts),
        failures={reason: sum(part.failures[reason] for part in parts) for reason in first.failures},
        queue=add_durations(part.queue for part in parts),
        compute_input=add_durations(part.compute_input for part in parts),
        compute_infer=add_durations(part.compute_infer for part in parts),
        compute_output=add_durations(part.compute_output for part in parts),
        batch_sizes=tuple(sizes[size] for size in sorted(sizes)),
        last_inference_ms=max(part.last_inference_ms for part in parts),
        pending=sum(part.pending for part in parts),
        in_flight=sum(part.in_flight for part in parts),
        phases={phase: _add_phases([part.phases for part in parts], phase) for phase in first.phases},
    )


def add_durations(parts: Iterable[Duration]) -> Duration:
    """Counts and times added up."""
    known = list(parts)
    return Duration(sum(part.count for part in known), sum(part.ns for part in known))


def _add_sizes(a: BatchStatistics, b: BatchStatistics) -> BatchStatistics:
    return BatchStatistics(
        a.batch_size,
        add_durations((a.compute_input, b.compute_input)),
        add_durations((a.compute_infer, b.compute_infer)),
        add_durations((a.compute_output, b.compute_output)),
    )


def _add_phases(parts: Sequence[Mapping[str, PhaseHistogram]], phase: str) -> PhaseHistogram:
    histograms = [part[phase] for part in parts]
    counts = tuple(map(sum, zip(*(each.counts for each in histograms), strict=True)))
    return PhaseHistogram(histograms[0].bounds_s, counts, sum(each.sum_s for each in histograms))
