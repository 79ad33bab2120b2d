"""What each tenant may take: one quota per tenant, for all doors together, made when the tenant is first seen."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

from aiorch_server._core import Quota
from aiorch_server.errors import QuotaExceeded

#: The tenant that stands for each one that has no bounds of its own.
EACH: Final = "*"
#: Tenants that are counted at a time; those whose buckets are full again are forgotten, the longest unseen first.
MAX_TENANTS: Final = 10_000
#: Of how many it is found out whether they can be forgotten, for one that comes; and when it may come again.
_MOST_LOOKED_AT: Final = 64
_PAUSE_NS: Final = 1_000_000_000
#: What the core takes; longer names and other rates would be refused there.
MAX_TENANT_BYTES: Final = 128
MIN_PER_S: Final = 0.001
MAX_PER_S: Final = 1e8
#: So that nobody can choose a name that is taken for another.
_KEY: Final = os.urandom(16)


class TenantShare(NamedTuple):
    """A tenant as queues know it: a number, 0 for nobody in particular, and the weight of its share of what waits."""

    number: int = 0
    weight: float = 1.0


#: Of what waits for nobody in particular.
NO_SHARE: Final = TenantShare()


@dataclass(frozen=True, slots=True)
class QuotaBounds:
    """A tenant's bounds, 0: none; and the weight of its share where queues are full."""

    tenant: str
    requests_per_s: float = 0.0
    rows_per_s: float = 0.0
    max_in_flight: int = 0
    weight: float = 1.0

    @property
    def is_bounded(self) -> bool:
        """Whether there is any bound."""
        return bool(self.requests_per_s or self.rows_per_s or self.max_in_flight)

    def fit(self) -> QuotaBounds:
        """The nearest bounds that can be counted."""
        return replace(self, requests_per_s=_fit(self.requests_per_s), rows_per_s=_fit(self.rows_per_s))


class QuotaBook:
    """The quotas by tenant; ``fixed`` bounds hold where no other ones are given by ``replace``. On one event loop.

    Weights are those of ``fixed``, whatever else is given.

    A tenant has one quota for as long as anybody counts with it or its buckets are not full again: neither other bounds
    nor other tenants, however many, give it a fresh one. ``clock`` gives nanoseconds of the monotonic clock.
    """

    def __init__(self, fixed: Iterable[QuotaBounds] = (), *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._fixed = {each.tenant: each for each in fixed}
        self._bounds = dict(self._fixed)
        self._clock = clock
        #: Those that are kept, the ones that were not seen for longest first; and these with all that calls still hold.
        self._kept: OrderedDict[str, Quota] = OrderedDict()
        self._quotas: WeakValueDictionary[str, Quota] = WeakValueDictionary()

    def replace(self, bounds: Iterable[QuotaBounds]) -> None:
        """From now on these hold before the fixed ones; what is in flight goes on being counted.

        Also for those who hold a quota already: a tenant that has no bounds any more is let through by it.
        """
        self._bounds = {**self._fixed, **{each.tenant: each for each in bounds}}
        for tenant, quota in list(self._quotas.items()):
            found = self._find_bounds(tenant) or QuotaBounds(tenant)
            if (quota.requests_per_s, quota.rows_per_s, quota.max_in_flight) != _list_bounds(found):
                quota.set(
                    requests_per_s=found.requests_per_s,
                    rows_per_s=found.rows_per_s,
                    max_in_flight=found.max_in_flight,
                )

    def find_share(self, tenant: str) -> TenantShare:
        """How queues tell the tenant's requests from those of others, and what share they have."""
        found = self._fixed.get(tenant) or self._fixed.get(EACH)
        return TenantShare(_number(tenant), 1.0 if found is None else found.weight)

    def list_quotas(self) -> list[Quota]:
        """One of each tenant that is counted now, by its name."""
        return [quota for _, quota in sorted(self._quotas.items())]

    def find(self, tenant: str) -> Quota | None:
        """The tenant's quota, None where it has no bounds; QuotaExceeded where too many tenants are counted now."""
        bounds = self._find_bounds(tenant)
        if bounds is None:
            return None
        quota = self._quotas.get(tenant)
        if tenant in self._kept:
            self._kept.move_to_end(tenant)
            return quota
        self._make_room()
        if quota is None:
            quota = self._quotas[tenant] = Quota(
                tenant,
                requests_per_s=bounds.requests_per_s,
                rows_per_s=bounds.rows_per_s,
                max_in_flight=bounds.max_in_flight,
            )
        self._kept[tenant] = quota
        return quota

    def _make_room(self) -> None:
        if len(self._kept) < MAX_TENANTS:
            return
        now_ns = self._clock()
        for tenant, quota in list(itertools.islice(self._kept.items(), _MOST_LOOKED_AT)):
            if quota.is_as_new(now_ns):
                del self._kept[tenant]
                return
            self._kept.move_to_end(tenant)
        raise QuotaExceeded(f"{MAX_TENANTS} tenants with quotas call this server at a time; try again", _PAUSE_NS)

    def _find_bounds(self, tenant: str) -> QuotaBounds | None:
        found = self._bounds.get(tenant) or self._bounds.get(EACH)
        return found if found is not None and found.is_bounded else None


@lru_cache(MAX_TENANTS)
def _number(tenant: str) -> int:
    digest = hashlib.blake2b(tenant.encode("utf-8", "replace"), digest_size=8, key=_KEY).digest()
    return int.from_bytes(digest, "little") or 1


def _fit(per_s: float) -> float:
    return min(max(per_s, MIN_PER_S), MAX_PER_S) if per_s else 0.0


def _list_bounds(bounds: QuotaBounds) -> tuple[float, float, int]:
    return bounds.requests_per_s, bounds.rows_per_s, bounds.max_in_flight
