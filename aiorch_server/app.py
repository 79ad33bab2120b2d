"""The composition root: builds all parts from one configuration, starts them in order, and takes them down again.

With ``assembly``, the only code that knows every part. Frameworks of the doors are imported when a door is built.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from aiorch_server._core import Passes, Router
from aiorch_server.assembly.certificates import Certificates
from aiorch_server.assembly.grpc_door import add_services, build_grpc_server
from aiorch_server.assembly.planes import Planes, build_planes
from aiorch_server.assembly.registry import build_admin, build_gate, open_deployments, open_repository
from aiorch_server.assembly.signals import catching_signals
from aiorch_server.assembly.telemetry import Telemetry
from aiorch_server.assembly.web_doors import build_metrics, build_rest
from aiorch_server.config.server import ServerConfig
from aiorch_server.controlplane import ControlPlane
from aiorch_server.dataplane import DataPlane
from aiorch_server.execution.placement import count_cpus
from aiorch_server.lifecycle.manager import LifecycleManager
from aiorch_server.lifecycle.model import Observer
from aiorch_server.types import ModelIndexEntry

if TYPE_CHECKING:
    from aiorch_server._core import ServerLedger
    from aiorch_server.deployments.local import LocalDeployments
    from aiorch_server.frontends.admin.services import AdminServices
    from aiorch_server.frontends.grpc.health import HealthService
    from aiorch_server.frontends.metrics import MetricsServer
    from aiorch_server.frontends.rest import RestServer
    from aiorch_server.observability.log_settings import LogSettings
    from aiorch_server.optimizer.optimizer import Account, Optimizer
    from aiorch_server.security.gate import Gate

logger = logging.getLogger(__name__)


class Application:
    """One server: models, planes and doors on the running event loop.

    Either ``await Application(config).run()``, which serves until a signal, or ``async with Application(config)``.
    ``observe`` is called on the loop with each step of a model version; ``log_settings`` lets clients change logging.
    The ports are those bound, None where the door is not open. ``manager``, ``dataplane``, ``controlplane`` and
    ``router`` exist from ``start`` on.
    """

    manager: LifecycleManager
    dataplane: DataPlane
    controlplane: ControlPlane
    router: Router
    _telemetry: Telemetry

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
        self._planes: Planes | None = None
        self._grpc: Any = None
        self._rest: RestServer | None = None
        self._metrics: MetricsServer | None = None
        self._health: HealthService | None = None
        self._health_task: asyncio.Task[None] | None = None
        self._certificates = Certificates()
        self._gate: Gate | None = None
        self._passes: Passes | None = None
        self._gate_task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._stop_task: asyncio.Task[None] | None = None
        #: What moves the knobs of models that have an objective.
        self.optimizer: Optimizer | None = None

    async def start(self) -> None:
        """Opens REST and metrics, loads the start set, then opens gRPC: who connects there finds the models.

        Raises OSError when a port cannot be had and ModelLoadError when the repository cannot be read; what was
        started is stopped then. A model that does not load is no reason: the index and the readiness tell.
        """
        try:
            planes = self._build()
            self._telemetry.slow_log.start()
            if self._gate is not None:
                self._gate_task = asyncio.create_task(self._gate.follow())
            await self._open_web_doors(planes)
            await self._build_grpc(planes)
            if self.deployments is not None:
                await self.deployments.start(
                    self.manager, self.dataplane.samples, address=self._address(), on_change=self._changed.set
                )
                if self._admin is not None:
                    self._admin.start(self.deployments.store)
            await self.manager.start()
            self._start_optimizer()
            if self._grpc is not None:
                await self._grpc.start()
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
        with catching_signals(asked):
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

    def _build(self) -> Planes:
        config = self.config
        self._telemetry = Telemetry(config, lambda: self.manager.servables())
        self.deployments = open_deployments(config.registry)
        repository = open_repository(config, self.deployments)
        self._passes = Passes() if config.security.enabled else None
        self._gate = build_gate(config, self.deployments, self._passes)
        planes = self._planes = build_planes(
            config,
            repository,
            self._telemetry,
            observe=self._observe,
            has_deployed=self._has_deployed,
            log_settings=self._log_settings,
        )
        self.router, self.manager = planes.router, planes.manager
        self.dataplane, self.controlplane = planes.dataplane, planes.controlplane
        return planes

    async def _open_web_doors(self, planes: Planes) -> None:
        self._metrics = build_metrics(
            self.config,
            planes,
            self._telemetry,
            list_ledgers=self._list_ledgers,
            list_tuned=lambda: [] if self.optimizer is None else self.optimizer.list_tuned(),
            gate=self._gate,
            certificates=self._certificates,
        )
        if self._metrics is not None:
            self.metrics_port = await self._metrics.start()
        self._rest = build_rest(self.config, planes, gate=self._gate, certificates=self._certificates)
        if self._rest is not None:
            self.http_port = await self._rest.start()

    async def _build_grpc(self, planes: Planes) -> None:
        """Makes the gRPC server with all services, its port bound and not yet served."""
        config = self.config.grpc
        if not config.enabled:
            return
        self._grpc = build_grpc_server(self.config, planes.router, self._passes)
        self.grpc_port = self._certificates.bind(self._grpc, config)
        self._admin = build_admin(
            self.config,
            self.deployments,
            self._gate,
            server=self._address(),
            explain=self._explain,
            manager=self.manager,
        )
        self._health = await add_services(self._grpc, config, planes, gate=self._gate, admin=self._admin)

    def _start_optimizer(self) -> None:
        from aiorch_server.optimizer.optimizer import Optimizer

        deployments = self.deployments
        self.optimizer = Optimizer(
            self.manager.servables,
            cores=count_cpus(),
            read_objectives=None if deployments is None else deployments.read_objectives,
        )
        self.optimizer.start()

    def _explain(self, model: str) -> list[Account]:
        return [] if self.optimizer is None else self.optimizer.explain(model)

    def _has_deployed(self) -> bool:
        return self.deployments is None or self.deployments.has_settled

    def _address(self) -> str:
        """Where it is, for its name in the registry and for the audit log: the same after a restart."""
        return f"{socket.gethostname()}:{self.grpc_port or self.http_port or 0}"

    def _list_ledgers(self) -> list[ServerLedger]:
        ledger = getattr(self._grpc, "ledger", None)  # grpcio's server has none
        return [] if ledger is None else [ledger]

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
        for task in (self._health_task, self._gate_task):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self._certificates.stop()
        if self.optimizer is not None:
            await self.optimizer.stop()
        if self._planes is None:
            return
        mailbox, cache = self._planes.mailbox, self._planes.cache
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
        await self._telemetry.slow_log.stop()
        await self.dataplane.samples.close()
        left_s = max(0.0, until - asyncio.get_running_loop().time())
        problems += await asyncio.gather(self.manager.stop(left_s), return_exceptions=True)
        if cache is not None:
            problems += await asyncio.gather(cache.close(), return_exceptions=True)
        # Metrics last: the drain can be watched.
        if self._metrics is not None:
            problems += await asyncio.gather(self._metrics.stop(1.0), return_exceptions=True)
        for problem in problems:
            if isinstance(problem, BaseException):
                logger.error("a part did not stop in order", exc_info=problem)
        mailbox.close()
        if self.deployments is not None:
            await self.deployments.close()
        if self._gate is not None:
            await self._gate.close()
        await self._telemetry.close()
