"""What the response cache as a whole counts, as Prometheus metric families; by model it is ModelCollector's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from aiorch_server.types import CacheUse

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


class CacheCollector:
    """The use of one cache."""

    def __init__(self, read_use: Callable[[], CacheUse]) -> None:
        self._read_use = read_use

    def collect(self) -> Iterator[Metric]:
        """One family for each number that the cache knows."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily  # here: with the first scrape

        use = self._read_use()
        if use.entries is not None:
            yield GaugeMetricFamily("aiorch_cache_entries", "Answers that the response cache holds", use.entries)
        if use.used_bytes is not None:
            yield GaugeMetricFamily("aiorch_cache_used_bytes", "Bytes that the response cache holds", use.used_bytes)
        if use.evictions is not None:
            text = "Answers that the response cache gave up for room or age"
            yield CounterMetricFamily("aiorch_cache_evictions", text, use.evictions)
        if use.failures is not None:
            text = "Look-ups in the response cache and insertions that went wrong"
            yield CounterMetricFamily("aiorch_cache_failures", text, use.failures)
