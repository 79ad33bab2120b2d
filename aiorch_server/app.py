"""The composition root: builds all parts from one configuration, starts them in order, and takes them down again.

The only module that knows every part. Frameworks of the doors are imported when a door is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from aiorch_server._core import Mailbox, Passes, Router
from aiorch_server.cache import ResponseCache, open_cache
from aiorch_server.config.server import GrpcConfig, ServerConfig, TlsConfig, Transport
from aiorch_server.controlplane import EXTENSIONS, ControlPlane
from aiorch_server.dataplane import DataPlane
from aiorch_server.errors import InvalidSettings
from aiorch_server.exchange import SharedRegions
from aiorch_server.execution.model_calls import ModelCalls
from aiorch_server.execution.resources import ResourceLimit, ResourcePool
from aiorch_server.lifecycle.backends import BackendRegistry
from aiorch_server.lifecycle.loader import Loader
from aiorch_server.lifecycle.manager import LifecycleManager
from aiorch_server.lifecycle.model import Observer
from aiorch_server.observability.cache_metrics import CacheCollector
from aiorch_server.observability.model_metrics import ModelMetrics
from aiorch_server.observability.sample_metrics import SampleCollector
from aiorch_server.observability.slow_log import SlowLog
from aiorch_server.observability.trace_settings import TraceLevel, TraceSetting, TraceSettings
from aiorch_server.observability.tracer import Tracer
from aiorch_server.repository import FilesystemRepository, ModelRepository, UnionRepository
from aiorch_server.security.find import open_gate
from aiorch_server.types import ModelIndexEntry

if TYPE_CHECKING:
    from ssl import SSLContext

    from aiorch_server._core import ServerLedger
    from aiorch_server.deployments.local import LocalDeployments
    from aiorch_server.frontends.admin.services import AdminServices
    from aiorch_server.frontends.grpc import ConnectionLife, ServerCredentials
    from aiorch_server.lifecycle.servable import Servable
    from aiorch_server.observability.log_settings import LogSettings
    from aiorch_server.observability.spans import OtlpWriter
    from aiorch_server.security.gate import Gate

logger = logging.getLogger(__name__)

HTTP = "http/1.1"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Application:
    """One server: models, planes and doors on the running event loop.

    Either ``await Application(config).run()``, which serves until a signal, or ``async with Application(config)``.
    ``observe`` is called on the loop with each step of a model version; ``log_settings`` lets clients change logging.
    The ports are those bound, None where the door is not open. ``manager``, ``dataplane`` and ``controlplane`` exist
    from ``start`` on.
    """

    manager: LifecycleManager
    dataplane: DataPlane
    controlplane: ControlPlane
    router: Router

    def __init__(
        self, config: ServerConfig, *, observe: Observer | None = None, log_settings: LogSettings | None = None
    ) -> None:
        self.config = config
        self._log_settings = log_settings
        self.grpc_port: int | None = None
        self.http_port: int | None = None
        self.metrics_port: int | None = None
        self._observers: list[Observer] = [observe] if observe is not None else []
        #: What follows the registry, if there is one.
        self.deployments: LocalDeployments | None = None
        self._admin: AdminServices | None = None
        self._mailbox: Mailbox | None = None
        self._cache: ResponseCache | None = None
        self._grpc: Any = None
        self._rest: Any = None
        self._metrics: Any = None
        self._health: Any = None
        self._health_task: asyncio.Task[None] | None = None
        self._certificate_tasks: list[asyncio.Task[None]] = []
        self._gate: Gate | None = None
        self._passes: Passes | None = None
        self._gate_task: asyncio.Task[None] | None = None
        self._model_metrics = ModelMetrics()
        self._slow_log = SlowLog(lambda: self.manager.servables(), config.log.slow_us, config.log.slow_lines_per_s)
        self._tracer = Tracer(slow_log=self._slow_log)
        self._writer: OtlpWriter | None = None
        self._trace_settings = TraceSettings()
        self._changed = asyncio.Event()
        self._stop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Opens REST and metrics, loads the start set, then opens gRPC: who connects there finds the models.

        Raises OSError when a port cannot be had and ModelLoadError when the repository cannot be read; what was
        started is stopped then. A model that does not load is no reason: the index and the readiness tell.
        """
        try:
            self._build()
            self._slow_log.start()
            if self._gate is not None:
                self._gate_task = asyncio.create_task(self._gate.follow())
            await self._open_metrics()
            await self._open_rest()
            server = await self._build_grpc()
            if self.deployments is not None:
                await self.deployments.start(
                    self.manager, self.dataplane.samples, server=self._name(), on_change=self._changed.set
                )
                if self._admin is not None:
                    self._admin.start(self.deployments.store)
            await self.manager.start()
            if server is not None:
                await server.start()
            self._health_task = asyncio.create_task(self._follow_readiness())
        except BaseException:
            await self.stop(0.0)
            raise

    async def stop(self, grace_s: float | None = None) -> None:
        """Refuses new requests, answers those under way within ``grace_s`` (default: the configuration's), unloads.

        May be called again, and while a first call runs: both return when all is down.
        """
        if self._stop_task is None:
            grace_s = self.config.lifecycle.exit_timeout_secs if grace_s is None else grace_s
            self._stop_task = asyncio.create_task(self._stop(grace_s))
        await asyncio.shield(self._stop_task)

    async def run(self, on_ready: Callable[[], None] | None = None) -> None:
        """Serves until SIGTERM or SIGINT, then drains and returns; a second signal ends the process at once.

        ``on_ready`` is called once, when all doors are open. A signal during the start gives the start up.
        """
        asked = asyncio.Event()
        with _catching_signals(asked):
            starting = asyncio.create_task(self.start())
            waiting = asyncio.create_task(asked.wait())
            try:
                await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
                if starting.done():
                    starting.result()
                    if on_ready is not None:
                        on_ready()
                    await waiting
            finally:
                waiting.cancel()
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                await self.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def _open_traces(self) -> None:
        """The SDK is imported only where there is an endpoint; InvalidSettings where it is not installed."""
        config = self.config.trace
        if not config.endpoint:
            return
        try:
            from aiorch_server.observability.spans import OtlpWriter
        except ImportError as error:
            raise InvalidSettings(
                f"trace.endpoint: traces need the extra 'otel' (pip install 'aiorchestrator[otel]'): {error}"
            ) from error
        levels = frozenset({TraceLevel.TIMESTAMPS}) if config.level.value == "timestamps" else frozenset()
        default = TraceSetting(levels, config.rate, config.count, mode="opentelemetry")
        self._trace_settings = TraceSettings(default, levels=frozenset({TraceLevel.OFF, TraceLevel.TIMESTAMPS}))
        self._writer = OtlpWriter(config.endpoint, config.service)
        self._tracer = Tracer(self._trace_settings, self._writer, self._slow_log)

    def _open_gate(self) -> None:
        """InvalidSettings where nobody could say who one is; tells the log of doors that are open to everybody."""
        config = self.config
        doors = (config.grpc, config.http, config.metrics)
        has_certificates = any(each.enabled and each.tls.require_client_auth for each in doors)
        self._passes = Passes() if config.security.enabled else None
        known: RegistryAccess | None = None
        if self.deployments is not None:
            from aiorch_server.frontends.admin.registry_access import RegistryAccess

            known = RegistryAccess(self.deployments.database)
        self._gate = open_gate(
            config.security, has_certificates=has_certificates, passes=self._passes, keys=known, source=known
        )
        for name in ("grpc", "http", "metrics"):
            if lack := config.find_exposure(name):
                logger.warning("%s is open although it should not be (security.insecure): %s", name, lack)

    def _open_repository(self) -> ModelRepository:
        """The models in folders, and with a registry those that it deploys; InvalidSettings without what it needs."""
        stored = FilesystemRepository(self.config.repository.paths)
        if not self.config.registry.is_enabled:
            return stored
        try:
            from aiorch_server.deployments.local import LocalDeployments
        except ImportError as error:
            raise InvalidSettings(
                f"registry.url: a registry needs the extra 'admin' (pip install 'aiorchestrator[admin]'): {error}"
            ) from error
        self.deployments = LocalDeployments(self.config.registry)
        return UnionRepository(stored, self.deployments.repository)

    def _has_deployed(self) -> bool:
        return self.deployments is None or self.deployments.is_settled

    def _name(self) -> str:
        """What the registry calls this server: the same after a restart."""
        return f"{socket.gethostname()}:{self.grpc_port or self.http_port or 0}"

    def _build(self) -> None:
        config = self.config
        self._open_traces()
        repository = self._open_repository()
        self._open_gate()
        self.router = Router()
        calls = ModelCalls()
        cache = self._cache = open_cache(config.cache)
        self.manager = LifecycleManager(
            repository,
            Loader(
                BackendRegistry(config.execution.backends),
                default_max_batch_size=config.execution.default_max_batch_size,
                default_instances=config.execution.instances,
                allow_code=config.execution.allow_code,
                default_queue_size=config.limits.max_queue_size,
                declare_metric=self._model_metrics.declare,
                startup_timeout_s=config.lifecycle.load_timeout_secs,
                concurrency=config.lifecycle.concurrent_loads,
                calls=calls,
                resources=ResourcePool([ResourceLimit.parse(text) for text in config.execution.resources]),
                identifies=cache is not None and cache.is_shared,
            ),
            self.router,
            control_mode=config.lifecycle.control_mode,
            load_models=config.lifecycle.load_models,
            poll_interval_s=config.lifecycle.poll_secs,
            drain_timeout_s=config.lifecycle.exit_timeout_secs,
            observe=self._observe,
            cache=cache,
            prepare=self._prepare,
        )
        self._mailbox = Mailbox(asyncio.get_running_loop())
        memory = config.shared_memory
        regions = SharedRegions(memory.keys, max_regions=memory.max_regions, max_bytes=memory.max_bytes)
        self.dataplane = DataPlane(
            self.manager, self._mailbox, regions, self._tracer, stream_stall_s=config.limits.stream_stall_secs
        )
        calls.attach(asyncio.get_running_loop(), self.dataplane.stream)
        optional = {"binary_tensor_data": config.http.enabled, "response_cache": cache is not None}
        extensions = (*EXTENSIONS, *(name for name, works in optional.items() if works))
        self.controlplane = ControlPlane(
            self.manager,
            config.lifecycle,
            extensions=extensions,
            regions=regions,
            log_settings=self._log_settings,
            server_id=config.id,
            trace_settings=self._trace_settings,
            has_deployed=self._has_deployed,
        )
        self._tracer.follow(self.manager.servables)

    async def _open_metrics(self) -> None:
        config = self.config.metrics
        if not config.enabled:
            return
        from aiorch_server.frontends.metrics import MetricsServer

        self._metrics = MetricsServer(
            self.manager.servables,
            list_ledgers=self._list_ledgers,
            own=[
                self._model_metrics,
                SampleCollector(self.dataplane.samples.counts),
                *self._list_cache_collectors(),
            ],
            host=config.host,
            port=config.port,
            gate=self._gate,
            tls=self._open_tls(config.tls, "metrics"),
        )
        self.metrics_port = await self._metrics.start()

    async def _open_rest(self) -> None:
        config = self.config.http
        if not config.enabled:
            return
        from aiorch_server.frontends.rest import RestServer
        from aiorch_server.frontends.rest.connection import Patience
        from aiorch_server.frontends.rest.planes import RestLimits
        from aiorch_server.frontends.restriction import AccessRules

        patience = Patience(max_head_bytes=self.config.limits.max_header_bytes)
        limits = RestLimits(max_body_bytes=config.max_body_bytes, patience=patience)
        self._rest = RestServer(
            self.dataplane,
            self.controlplane,
            host=config.host,
            port=config.port,
            limits=limits,
            access=AccessRules(config.restricted_apis),
            gate=self._gate,
            tls=self._open_tls(config.tls, "REST"),
        )
        self.http_port = await self._rest.start()

    async def _build_grpc(self) -> Any:
        """The gRPC server with all services, its port bound and not yet served; None if the door stays shut."""
        config = self.config.grpc
        if not config.enabled:
            return None
        from aiorch_server.frontends.grpc.health import add_health_service
        from aiorch_server.frontends.grpc.reflection import add_reflection_service
        from aiorch_server.frontends.grpc.servicer import InferenceServicer, add_inference_service
        from aiorch_server.frontends.tfserving.registration import add_serving_services

        self._grpc = self._make_grpc_server(config)
        self.grpc_port = self._bind(self._grpc, config)
        server = self._grpc
        if self._gate is not None:
            from aiorch_server.frontends.grpc.guard import GuardedServer

            server = GuardedServer(server, self._gate)
        add_inference_service(InferenceServicer(self.dataplane, self.controlplane), server)
        add_serving_services(server, self.dataplane, self.controlplane, max_tensor_bytes=config.max_message_bytes)
        add_reflection_service(server, self._add_admin_services())
        self._health = await add_health_service(server)
        if server is not self._grpc:
            server.add_end()
        return self._grpc

    def _add_admin_services(self) -> Sequence[str]:
        """Registers the admin services where there is a registry, and gives their names."""
        if self.deployments is None:
            return ()
        from aiorch_server.frontends.admin.services import SERVICE_NAMES, AdminServices, read_bounds

        self._admin = AdminServices(
            self.deployments.database,
            read_bounds(self.config.registry),
            server=self._name(),
            gate=self._gate,
            allow_code=self.config.execution.allow_code,
            on_commit=self.deployments.nudge,
        )
        self._admin.register(self._grpc)
        names: Sequence[str] = SERVICE_NAMES
        return names

    def _open_tls(self, tls: TlsConfig, door: str) -> SSLContext | None:
        """What an HTTP door shows its clients, None for plain text; follows the files."""
        if tls.certificate is None or tls.key is None:
            return None
        from aiorch_server.frontends.grpc import CredentialFiles
        from aiorch_server.frontends.grpc.credentials import renew_ssl_context

        files = CredentialFiles(tls.certificate, tls.key, tls.root, tls.require_client_auth)
        stamp, context = files.stamp(), files.read().make_ssl_context(HTTP)

        def renew(credentials: ServerCredentials) -> None:
            renew_ssl_context(context, credentials.make_ssl_context(HTTP))

        if tls.reload_secs:
            following = files.follow(stamp, renew, tls.reload_secs, door)
            self._certificate_tasks.append(asyncio.create_task(following))
        return context

    def _bind(self, server: Any, config: GrpcConfig) -> int:
        """Binds the gRPC port and gives its number; OSError when it cannot be had. Follows the files of its TLS."""
        from aiorch_server.frontends import grpc as door

        port: int
        address, tls = config.write_address(config.port), config.tls
        try:
            if tls.certificate is None or tls.key is None:  # both are there, or none
                return int(server.add_insecure_port(address))
            files = door.CredentialFiles(tls.certificate, tls.key, tls.root, tls.require_client_auth)
            stamp, credentials = files.stamp(), files.read()
            if isinstance(server, door.GrpcDoor):
                renew: Callable[[ServerCredentials], None] = server.renew_credentials
                port = server.add_secure_port(address, credentials)
            else:
                renewable = door.RenewableCredentials(credentials)
                renew = renewable.renew
                port = server.add_secure_port(address, renewable.for_port)
        except RuntimeError as error:  # grpcio has no errno to tell
            raise OSError(f"cannot listen on {address}: {error}") from error
        if tls.reload_secs:
            self._certificate_tasks.append(asyncio.create_task(files.follow(stamp, renew, tls.reload_secs)))
        return port

    def _make_grpc_server(self, config: GrpcConfig) -> Any:
        from aiorch_server.frontends import grpc as door

        limits = self.config.limits
        is_native = config.transport is Transport.NATIVE
        if is_native and not door.is_native_available():
            logger.warning(
                "built without libnghttp2: gRPC is served by grpcio, which is several times slower; "
                "for the fast door install libnghttp2-dev and pkg-config, then this package again"
            )
            is_native = False
        if not is_native:
            return door.create_grpcio_server(
                max_message_bytes=config.max_message_bytes,
                max_concurrent_streams=limits.max_concurrent_streams,
                max_header_bytes=limits.max_header_bytes,
                reuse_port=config.reuse_port,
                life=_make_life(config),
                compression=door.COMPRESSIONS[config.compression],
                interceptors=_make_interceptors(config),
            )
        interceptors = _make_interceptors(config)
        # interceptors are made with grpc, our own services are not
        open_door = door.NativeGrpcServer if interceptors else door.GrpcDoor
        return open_door(
            router=self.router,
            passes=self._passes,
            max_message_bytes=config.max_message_bytes,
            io_threads=config.io_threads,
            reuse_port=config.reuse_port,
            limits=door.ConnectionLimits(
                max_concurrent_streams=limits.max_concurrent_streams, max_header_list_bytes=limits.max_header_bytes
            ),
            life=_make_life(config),
            server_limits=door.ServerLimits(config.max_buffered_bytes, config.max_connections),
            compression=door.ResponseCompression(door.COMPRESSIONS[config.compression], config.min_compress_bytes),
            interceptors=interceptors,
        )

    def _list_cache_collectors(self) -> list[CacheCollector]:
        return [] if self._cache is None else [CacheCollector(self._cache.read_use)]

    def _list_ledgers(self) -> list[ServerLedger]:
        ledger = getattr(self._grpc, "ledger", None)  # grpcio's server has none
        return [] if ledger is None else [ledger]

    def _prepare(self, servable: Servable) -> None:
        self._tracer.prepare(servable)
        self._slow_log.prepare(servable)

    def _observe(self, entry: ModelIndexEntry) -> None:
        self._changed.set()
        if self.deployments is not None:
            self.deployments.nudge()
        for observe in self._observers:
            observe(entry)

    async def _follow_readiness(self) -> None:
        """Keeps the standard health service in step with the models."""
        said: bool | None = None
        while self._health is not None:
            self._changed.clear()
            is_ready = not self.manager.is_stopping and self.controlplane.is_ready()
            if is_ready != said:
                await self._health.set_serving(is_ready)
                said = is_ready
            await self._changed.wait()

    async def _stop(self, grace_s: float) -> None:
        """Readiness first, then the doors, then the models: whoever has not heard of the end yet is still served."""
        for task in (self._health_task, self._gate_task, *self._certificate_tasks):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._mailbox is None:
            return
        until = asyncio.get_running_loop().time() + grace_s
        self.manager.announce_stop()
        jobs: list[Any] = []
        if self._admin is not None:
            self._admin.announce_stop()
        if self._health is not None:
            jobs.append(self._health.set_serving(False))
        if self._grpc is not None:
            jobs.append(self._grpc.stop(grace_s))
        if self._rest is not None:
            jobs.append(self._rest.stop(grace_s))
        if self.deployments is not None:
            jobs.append(self.deployments.stop())
        problems = await asyncio.gather(*jobs, return_exceptions=True)
        if self._admin is not None:
            problems += await asyncio.gather(self._admin.stop(), return_exceptions=True)
        await self._slow_log.stop()
        await self.dataplane.samples.close()
        left_s = max(0.0, until - asyncio.get_running_loop().time())
        problems += await asyncio.gather(self.manager.stop(left_s), return_exceptions=True)
        if self._cache is not None:
            problems += await asyncio.gather(self._cache.close(), return_exceptions=True)
        # Metrics last: the drain can be watched.
        if self._metrics is not None:
            problems += await asyncio.gather(self._metrics.stop(1.0), return_exceptions=True)
        for problem in problems:
            if isinstance(problem, BaseException):
                logger.error("a part did not stop in order", exc_info=problem)
        self._mailbox.close()
        if self.deployments is not None:
            await self.deployments.close()
        if self._gate is not None:
            await self._gate.close()
        if self._writer is not None:
            await asyncio.to_thread(self._writer.close)


def _make_life(config: GrpcConfig) -> ConnectionLife:
    from aiorch_server.frontends.grpc import ConnectionLife

    return ConnectionLife(
        keepalive_time_s=config.keepalive_time_ms / 1e3,
        keepalive_timeout_s=config.keepalive_timeout_ms / 1e3,
        keepalive_permit_without_calls=config.keepalive_permit_without_calls,
        min_ping_interval_s=config.http2_min_ping_interval_without_data_ms / 1e3,
        max_ping_strikes=config.http2_max_ping_strikes,
        max_connection_idle_s=config.max_connection_idle_ms / 1e3,
        max_connection_age_s=config.max_connection_age_ms / 1e3,
        max_connection_age_grace_s=config.max_connection_age_grace_ms / 1e3,
    )


def _make_interceptors(config: GrpcConfig) -> list[Any]:
    from aiorch_server.frontends.grpc import import_interceptor

    interceptors = [import_interceptor(name) for name in config.interceptors]
    if config.restricted_protocols:
        from aiorch_server.frontends.grpc.restricted import RestrictionInterceptor
        from aiorch_server.frontends.restriction import AccessRules

        interceptors.insert(0, RestrictionInterceptor(AccessRules.for_grpc(config.restricted_protocols)))
    return interceptors


@contextlib.contextmanager
def _catching_signals(asked: asyncio.Event) -> Iterator[None]:
    """Sets ``asked`` at the first signal; ends the process at the second. Off the main thread, catches nothing."""
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if asked.is_set():
            logger.warning("%s again: ending at once", number.name)
            os._exit(128 + number)
        logger.info("%s: draining", number.name)
        asked.set()

    caught = []
    try:
        for number in SIGNALS:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, on_signal, number)
                caught.append(number)
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
