"""What each tenant may take: one quota per tenant, for all doors together, made when the tenant is first seen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from aiorch_server._core import Quota

#: The tenant that stands for each one that has no bounds of its own.
EACH: Final = "*"
#: Tenants that are counted at a time; those that were not seen for longest are forgotten.
MAX_TENANTS: Final = 10_000
#: What the core takes; longer names and other rates would be refused there.
MAX_TENANT_BYTES: Final = 128
MIN_PER_S: Final = 0.001
MAX_PER_S: Final = 1e8


@dataclass(frozen=True, slots=True)
class QuotaBounds:
    """A tenant's bounds; 0: none."""

    tenant: str
    requests_per_s: float = 0.0
    rows_per_s: float = 0.0
    max_in_flight: int = 0

    @property
    def is_bounded(self) -> bool:
        """Whether there is any bound."""
        return bool(self.requests_per_s or self.rows_per_s or self.max_in_flight)

    def fit(self) -> QuotaBounds:
        """The nearest bounds that can be counted."""
        return replace(self, requests_per_s=_fit(self.requests_per_s), rows_per_s=_fit(self.rows_per_s))


class QuotaBook:
    """The quotas by tenant; ``fixed`` bounds hold where no other ones are given by ``replace``. On one event loop."""

    def __init__(self, fixed: Iterable[QuotaBounds] = ()) -> None:
        self._fixed = {each.tenant: each for each in fixed}
        self._bounds = dict(self._fixed)
        self._quotas: OrderedDict[str, Quota] = OrderedDict()

    def replace(self, bounds: Iterable[QuotaBounds]) -> None:
        """From now on these hold before the fixed ones; what is in flight goes on being counted."""
        self._bounds = {**self._fixed, **{each.tenant: each for each in bounds}}
        for tenant, quota in list(self._quotas.items()):
            found = self._find_bounds(tenant)
            if found is None:
                del self._quotas[tenant]
            elif (quota.requests_per_s, quota.rows_per_s, quota.max_in_flight) != _list_bounds(found):
                quota.set(
                    requests_per_s=found.requests_per_s,
                    rows_per_s=found.rows_per_s,
                    max_in_flight=found.max_in_flight,
                )

    def find(self, tenant: str) -> Quota | None:
        """The tenant's quota, None where it has no bounds."""
        quota = self._quotas.get(tenant)
        if quota is not None:
            self._quotas.move_to_end(tenant)
            return quota
        bounds = self._find_bounds(tenant)
        if bounds is None:
            return None
        quota = Quota(
            tenant,
            requests_per_s=bounds.requests_per_s,
            rows_per_s=bounds.rows_per_s,
            max_in_flight=bounds.max_in_flight,
        )
        self._quotas[tenant] = quota
        if len(self._quotas) > MAX_TENANTS:
            self._quotas.popitem(last=False)
        return quota

    def _find_bounds(self, tenant: str) -> QuotaBounds | None:
        found = self._bounds.get(tenant) or self._bounds.get(EACH)
        return found if found is not None and found.is_bounded else None


def _fit(per_s: float) -> float:
    return min(max(per_s, MIN_PER_S), MAX_PER_S) if per_s else 0.0


def _list_bounds(bounds: QuotaBounds) -> tuple[float, float, int]:
    return bounds.requests_per_s, bounds.rows_per_s, bounds.max_in_flight
