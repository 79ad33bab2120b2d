"""All collectors of a server in one registry; apart, because Prometheus' library comes with the first scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from aiorch_server.observability.collector import (
    CopyCollector,
    DoorCollector,
    DoorLedger,
    MachineCollector,
    MeasuredModel,
    ModelCollector,
)
from aiorch_server.observability.exposition import render_metrics
from aiorch_server.observability.machine import MachineProbe


def build_exposition(
    list_models: Callable[[], Iterable[MeasuredModel]],
    list_ledgers: Callable[[], Iterable[DoorLedger]],
    probe: MachineProbe,
    own: Iterable[Collector],
) -> Callable[[str | None], tuple[bytes, str]]:
    """``render_metrics`` of models, doors, copies, the machine, ``own``, and what the library tells of the process."""
    # Not the library's global registry: two servers in one process (tests) must not share their numbers.
    registry = CollectorRegistry()
    sources: tuple[Collector, ...] = (
        ModelCollector(list_models),
        DoorCollector(list_ledgers),
        CopyCollector(),
        MachineCollector(probe),
        *own,
    )
    for source in sources:
        registry.register(source)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return partial(render_metrics, registry)
