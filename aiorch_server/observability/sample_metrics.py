"""What becomes of the samples of requests, as Prometheus metric families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


class SampleCounts(Protocol):
    """Of one model: samples that observers got, and those for which there was no room."""

    taken: int
    dropped: int


class SampleCollector:
    """The samples of all models that are or were observed."""

    def __init__(self, read_counts: Callable[[], Mapping[str, SampleCounts]]) -> None:
        self._read_counts = read_counts

    def collect(self) -> Iterator[Metric]:
        """Nothing where no model was ever observed."""
        from prometheus_client.metrics_core import CounterMetricFamily  # here: with the first scrape

        counts = self._read_counts()
        if not counts:
            return
        taken = CounterMetricFamily("aiorch_samples", "Requests that observers of a model got", labels=["model"])
        text = "Requests in the model's sample that observers did not get: they were busy, or memory was short"
        dropped = CounterMetricFamily("aiorch_samples_dropped", text, labels=["model"])
        for model, each in sorted(counts.items()):
            taken.add_metric([model], each.taken)
            dropped.add_metric([model], each.dropped)
        yield from (taken, dropped)
