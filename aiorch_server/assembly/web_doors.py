"""The doors that speak HTTP/1.1: REST and metrics. Their frameworks are imported when a door is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from aiorch_server.assembly.certificates import Certificates
from aiorch_server.assembly.planes import Planes
from aiorch_server.assembly.telemetry import Telemetry
from aiorch_server.config.server import ServerConfig
from aiorch_server.observability.cache_metrics import CacheCollector
from aiorch_server.observability.memory_metrics import MemoryCollector
from aiorch_server.observability.quota_metrics import QuotaCollector
from aiorch_server.observability.sample_metrics import SampleCollector
from aiorch_server.optimizer.metrics import TunerCollector

if TYPE_CHECKING:
    from aiorch_server._core import ServerLedger
    from aiorch_server.frontends.metrics import MetricsServer
    from aiorch_server.frontends.rest import RestServer
    from aiorch_server.optimizer.tuned import TunedVersion
    from aiorch_server.security.gate import Gate


def build_metrics(
    config: ServerConfig,
    planes: Planes,
    telemetry: Telemetry,
    *,
    list_ledgers: Callable[[], Sequence[ServerLedger]],
    list_tuned: Callable[[], Iterable[TunedVersion]],
    gate: Gate | None,
    certificates: Certificates,
) -> MetricsServer | None:
    """The metrics' door, not yet open; None if it stays shut. ``list_ledgers`` gives what the gRPC door counts."""
    if not config.metrics.enabled:
        return None
    from aiorch_server.frontends.metrics import MetricsServer

    cache, residents = planes.cache, planes.manager.residents
    return MetricsServer(
        planes.manager.servables,
        list_ledgers=list_ledgers,
        own=[
            telemetry.model_metrics,
            SampleCollector(planes.dataplane.samples.counts),
            TunerCollector(list_tuned),
            MemoryCollector(residents.ledger.list_charges, lambda: residents.evictions),
            *([] if cache is None else [CacheCollector(cache.read_use)]),
            *([] if gate is None else [QuotaCollector(gate.list_quotas)]),
        ],
        host=config.metrics.host,
        port=config.metrics.port,
        gate=gate,
        tls=certificates.open_context(config.metrics.tls, "metrics"),
    )


def build_rest(
    config: ServerConfig, planes: Planes, *, gate: Gate | None, certificates: Certificates
) -> RestServer | None:
    """REST's door, not yet open; None if it stays shut."""
    if not config.http.enabled:
        return None
    from aiorch_server.frontends.rest import RestServer
    from aiorch_server.frontends.rest.connection import Patience
    from aiorch_server.frontends.rest.planes import RestLimits
    from aiorch_server.frontends.restriction import AccessRules

    patience = Patience(max_head_bytes=config.limits.max_header_bytes)
    return RestServer(
        planes.dataplane,
        planes.controlplane,
        host=config.http.host,
        port=config.http.port,
        limits=RestLimits(max_body_bytes=config.http.max_body_bytes, patience=patience),
        access=AccessRules(config.http.restricted_apis),
        gate=gate,
        tls=certificates.open_context(config.http.tls, "REST"),
    )
