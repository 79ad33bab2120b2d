"""What tuners aim at, see and do, as Prometheus metric families."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from aiorch_server.optimizer.tuner import State

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from aiorch_server.optimizer.tuned import TunedVersion
    from aiorch_server.types import SchedulerObservation

#: What became of a decision: it was judged good, it was judged harm, or it could not be made.
OUTCOMES: Final = ("kept", "undone", "failed")
KNOBS: Final = ("max_batch_size", "delay", "instances")
#: What became of a request, and how that is read.
_ENDS: Final[tuple[tuple[str, Callable[[SchedulerObservation], int]], ...]] = (
    ("in_time", lambda seen: seen.in_time),
    ("late", lambda seen: seen.late),
    ("refused", lambda seen: seen.refused_late),
    ("dropped", lambda seen: seen.dropped_late),
    ("no_room", lambda seen: seen.refused_full),
    ("failed", lambda seen: seen.failed),
)
_GAUGES: Final[tuple[tuple[str, str, Callable[[TunedVersion], float]], ...]] = (
    ("aiorch_tuner_max_batch_size", "Rows of a batch, as the tuner has set it", lambda it: it.knobs["max_batch_size"]),
    (
        "aiorch_tuner_delay_seconds",
        "How long a request may wait for company, as the tuner has set it",
        lambda it: it.knobs["delay_us"] / 1e6,
    ),
    ("aiorch_tuner_instances", "Instances that take batches", lambda it: it.knobs["instances"]),
    (
        "aiorch_objective_latency_seconds",
        "Latency that answers should keep to",
        lambda it: it.objective.latency_us / 1e6,
    ),
    (
        "aiorch_objective_quantile",
        "Part of the answers that should keep to it",
        lambda it: it.objective.percentile / 100,
    ),
    (
        "aiorch_objective_error_budget",
        "Part of the requests that may be late or refused",
        lambda it: it.objective.allowed_misses,
    ),
    (
        "aiorch_tuner_measured_latency_seconds",
        "The objective's percentile over the last look of about a second; NaN where nothing was answered",
        lambda it: it.measured_us / 1e6,
    ),
    (
        "aiorch_tuner_predicted_latency_seconds",
        "The same percentile as the last look for a move foretold it; NaN before there was one",
        lambda it: it.predicted_us / 1e6,
    ),
)


class TunerCollector:
    """The families of all versions that ``list_tuned`` gives at the time of a scrape, 28 series for each, 19 of one
    without a target.

    Of two generations of one version, where the older one drains after a reload, the one that came last is shown.
    """

    def __init__(self, list_tuned: Callable[[], Iterable[TunedVersion]]) -> None:
        self._list_tuned = list_tuned

    def collect(self) -> Iterator[Metric]:
        """No families where nothing is tuned."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily  # here: with the first scrape

        tuned = {(it.name, str(it.version)): it for it in self._list_tuned()}
        if not tuned:
            return
        names = ["model", "version"]
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=names)
            for labels, it in tuned.items():
                if it.objective.latency_us or not name.startswith("aiorch_objective_"):
                    gauge.add_metric(labels, _show(read(it)))
            yield gauge
        states = GaugeMetricFamily("aiorch_tuner_state", "1 for the state that a tuner is in", labels=[*names, "state"])
        text = "Moves of a knob by what became of them"
        decisions = CounterMetricFamily("aiorch_tuner_decisions", text, labels=[*names, "knob", "outcome"])
        text = "Processor time that looking at a version and deciding took"
        spent = CounterMetricFamily("aiorch_tuner_cpu_seconds", text, labels=names)
        text = "Requests to versions with a target by their end"
        requests = CounterMetricFamily("aiorch_objective_requests", text, labels=[*names, "end"])
        for labels, it in tuned.items():
            for state in State:
                states.add_metric((*labels, state.value), float(it.tuner.state is state))
            for knob in KNOBS:
                for outcome in OUTCOMES:
                    decisions.add_metric((*labels, knob, outcome), it.outcomes[knob, outcome])
            spent.add_metric(labels, it.cpu_s)
            if it.objective.latency_us and (seen := it.seen) is not None:
                for end, count in _ENDS:
                    requests.add_metric((*labels, end), count(seen))
        yield from (states, decisions, spent, requests)


def _show(value: float) -> float:
    return value if math.isfinite(value) else math.nan
