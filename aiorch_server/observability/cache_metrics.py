"""What the response cache counts, as Prometheus metric families: Triton's names by model, our own for the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from aiorch_server.types import ModelStatistics

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

#: Counters of models with a cache: what they count, and how to read them.
CACHE_COUNTERS: Final[tuple[tuple[str, str, Callable[[ModelStatistics], float]], ...]] = (
    ("nv_cache_num_hits_per_model", "Number of cache hits per model", lambda model: model.cache_hit.count),
    ("nv_cache_num_misses_per_model", "Number of cache misses per model", lambda model: model.cache_miss.count),
    (
        "nv_cache_hit_duration_per_model",
        "Total cache hit duration per model, in microseconds",
        lambda model: model.cache_hit.ns // 1000,
    ),
    (
        "nv_cache_miss_duration_per_model",
        "Total cache miss duration per model, in microseconds",
        lambda model: model.cache_miss.ns // 1000,
    ),
)


class Use(Protocol):
    """What a cache holds."""

    @property
    def entries(self) -> int:
        """Answers held now."""
        ...

    @property
    def used_bytes(self) -> int:
        """Bytes held now."""
        ...

    @property
    def evictions(self) -> int:
        """Answers given up for room or age since the start."""
        ...


class CacheCollector:
    """The use of one cache."""

    def __init__(self, read_use: Callable[[], Use]) -> None:
        self._read_use = read_use

    def collect(self) -> Iterator[Metric]:
        """Three families."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily  # here: with the first scrape

        use = self._read_use()
        yield GaugeMetricFamily("aiorch_cache_entries", "Answers that the response cache holds", use.entries)
        yield GaugeMetricFamily("aiorch_cache_used_bytes", "Bytes that the response cache holds", use.used_bytes)
        yield CounterMetricFamily(
            "aiorch_cache_evictions", "Answers that the response cache gave up for room or age", use.evictions
        )
