"""What models take of the devices' memory, as Prometheus metric families."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

#: Model, version, and bytes by device.
Held = tuple[str, int, Mapping[str, int]]


class MemoryCollector:
    """What each loaded version takes, and how many models were evicted since the start."""

    def __init__(self, list_held: Callable[[], Iterable[Held]], count_evictions: Callable[[], int]) -> None:
        self._list_held = list_held
        self._count_evictions = count_evictions

    def collect(self) -> Iterator[Metric]:
        """One gauge for each version and device, and a counter."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily  # here: with the first scrape

        text = "Memory that a model version is counted with, in bytes"
        gauge = GaugeMetricFamily("aiorch_model_memory_bytes", text, labels=("model", "version", "device"))
        for model, version, charge in self._list_held():
            for device, size in charge.items():
                gauge.add_metric((model, str(version), device), size)
        yield gauge
        text = "Models that made room for others"
        yield CounterMetricFamily("aiorch_model_evictions", text, self._count_evictions())
