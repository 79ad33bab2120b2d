"""The two planes over one lifecycle: models, the desk for requests, and the desk for everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiorch_server._core import Mailbox, Router
from aiorch_server.assembly.telemetry import Telemetry
from aiorch_server.cache import ResponseCache, open_cache
from aiorch_server.config.server import ServerConfig
from aiorch_server.controlplane import EXTENSIONS, ControlPlane
from aiorch_server.dataplane import DataPlane
from aiorch_server.exchange import SharedRegions
from aiorch_server.execution.model_calls import ModelCalls
from aiorch_server.execution.precedence import ask_short_slices
from aiorch_server.execution.resources import ResourceLimit, ResourcePool
from aiorch_server.lifecycle.backends import BackendRegistry
from aiorch_server.lifecycle.loader import Loader
from aiorch_server.lifecycle.manager import LifecycleManager
from aiorch_server.lifecycle.model import Observer
from aiorch_server.lifecycle.residents import MemoryTerms
from aiorch_server.repository import ModelRepository

if TYPE_CHECKING:
    from aiorch_server.observability.log_settings import LogSettings


@dataclass(frozen=True, slots=True)
class Planes:
    """What the doors stand on. ``mailbox`` and ``cache`` are whoever's who built them, to close after the models."""

    router: Router
    mailbox: Mailbox
    cache: ResponseCache | None
    manager: LifecycleManager
    dataplane: DataPlane
    controlplane: ControlPlane


def build_planes(
    config: ServerConfig,
    repository: ModelRepository,
    telemetry: Telemetry,
    *,
    observe: Observer,
    has_deployed: Callable[[], bool],
    log_settings: LogSettings | None,
) -> Planes:
    """The planes on the running event loop; nothing is loaded yet.

    ``observe`` is called on the loop with each step of a model version; ``has_deployed`` tells whether all that a
    registry deploys was looked at.
    """
    router, calls, cache = Router(), ModelCalls(), open_cache(config.cache)
    manager = LifecycleManager(
        repository,
        _build_loader(config, telemetry, calls, identifies=cache is not None and cache.is_shared),
        router,
        control_mode=config.lifecycle.control_mode,
        load_models=config.lifecycle.load_models,
        poll_interval_s=config.lifecycle.poll_secs,
        drain_timeout_s=config.lifecycle.exit_timeout_secs,
        observe=observe,
        cache=cache,
        prepare=telemetry.prepare,
        load_on_demand=config.lifecycle.load_on_demand,
        memory=MemoryTerms(
            config.lifecycle.budgets, config.lifecycle.residence_secs, config.lifecycle.room_timeout_secs
        ),
    )
    memory = config.shared_memory
    regions = SharedRegions(memory.keys, max_regions=memory.max_regions, max_bytes=memory.max_bytes)
    mailbox = Mailbox(asyncio.get_running_loop())
    dataplane = DataPlane(manager, mailbox, regions, telemetry.tracer, stream_stall_s=config.limits.stream_stall_secs)
    calls.attach(asyncio.get_running_loop(), dataplane.stream)
    optional = {"binary_tensor_data": config.http.enabled, "response_cache": cache is not None}
    controlplane = ControlPlane(
        manager,
        config.lifecycle,
        extensions=(*EXTENSIONS, *(name for name, works in optional.items() if works)),
        regions=regions,
        log_settings=log_settings,
        server_id=config.id,
        trace_settings=telemetry.trace_settings,
        has_deployed=has_deployed,
    )
    telemetry.tracer.follow(manager.servables)
    return Planes(router, mailbox, cache, manager, dataplane, controlplane)


def _build_loader(config: ServerConfig, telemetry: Telemetry, calls: ModelCalls, *, identifies: bool) -> Loader:
    return Loader(
        BackendRegistry(config.execution.backends),
        default_max_batch_size=config.execution.default_max_batch_size,
        default_instances=config.execution.instances,
        allow_code=config.execution.allow_code,
        default_queue_size=config.limits.max_queue_size,
        declare_metric=telemetry.model_metrics.declare,
        startup_timeout_s=config.lifecycle.load_timeout_secs,
        concurrency=config.lifecycle.concurrent_loads,
        calls=calls,
        resources=ResourcePool([ResourceLimit.parse(text) for text in config.execution.resources]),
        identifies=identifies,
        before_serving=ask_short_slices,
    )
