"""What tenants took and were refused, as Prometheus metric families: over all doors, planes and models together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from aiorch_server.types import QuotaCounters

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


class MeasuredQuota(Protocol):
    """A tenant's quota; see _core.Quota."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        ...

    def counters(self) -> QuotaCounters:
        """Counts since it was made."""
        ...


class QuotaCollector:
    """The counts of all quotas that ``list_quotas`` gives at the time of a scrape; of each tenant there is one."""

    def __init__(self, list_quotas: Callable[[], Iterable[MeasuredQuota]]) -> None:
        self._list_quotas = list_quotas

    def collect(self) -> Iterator[Metric]:
        """No families where there are no quotas."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily  # here: with the first scrape

        counted = [(quota.tenant, quota.counters()) for quota in tuple(self._list_quotas())]
        if not counted:
            return
        admitted = CounterMetricFamily("aiorch_quota_admitted", "Requests that a quota let in", labels=("tenant",))
        text = "Requests refused because their tenant's quota was used up, by the bound that was exceeded"
        refused = CounterMetricFamily("aiorch_quota_refused", text, labels=("tenant", "bound"))
        text = "Requests in flight that count for a quota now"
        in_flight = GaugeMetricFamily("aiorch_quota_in_flight", text, labels=("tenant",))
        for tenant, counters in counted:
            admitted.add_metric((tenant,), counters.admitted)
            refused.add_metric((tenant, "requests"), counters.refused_requests)
            refused.add_metric((tenant, "rows"), counters.refused_rows)
            refused.add_metric((tenant, "in_flight"), counters.refused_in_flight)
            in_flight.add_metric((tenant,), counters.in_flight)
        yield from (admitted, refused, in_flight)
