"""The lifecycle of all models: what the repository holds -> what is aspired -> what is loaded and routed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from aiorch_server._core import Router
from aiorch_server.cache import ResponseCache
from aiorch_server.config.server import ControlMode
from aiorch_server.errors import LoadNotAllowed, ModelLoadError, ServerStopping, UnknownModel
from aiorch_server.execution.callers import current_callers
from aiorch_server.lifecycle.changes import Changes
from aiorch_server.lifecycle.demand import DEFAULT_MAX_WAITING, Demand, DemandTerms
from aiorch_server.lifecycle.dependencies import Dependencies
from aiorch_server.lifecycle.directory import ModelDirectory
from aiorch_server.lifecycle.loader import Loader
from aiorch_server.lifecycle.model import STOPPING_TEXT, ManagedModel, Observer
from aiorch_server.lifecycle.opening import Opener
from aiorch_server.lifecycle.refusals import UNKNOWN_UNLOAD_TEXT, parse_version
from aiorch_server.lifecycle.residents import MemoryTerms
from aiorch_server.lifecycle.route import Route
from aiorch_server.lifecycle.servable import Servable
from aiorch_server.lifecycle.tasks import ChangeTasks
from aiorch_server.lifecycle.threads import run_blocking
from aiorch_server.repository import ModelRepository
from aiorch_server.routing import Traffic

logger = logging.getLogger(__name__)

NOT_ALLOWED_TEXT = "explicit model load / unload is not allowed if polling is enabled"


class LifecycleManager(ModelDirectory):
    """Brings models up and down and publishes what serves. All methods are for one event loop's thread.

    Every change of a model runs in a task of the manager: whoever asked for it may be cancelled without leaving a model
    half loaded or half drained.
    """

    def __init__(
        self,
        repository: ModelRepository,
        loader: Loader,
        router: Router,
        *,
        control_mode: str = ControlMode.NONE,
        load_models: Sequence[str] = (),
        poll_interval_s: float = 15.0,
        drain_timeout_s: float = 30.0,
        observe: Observer | None = None,
        cache: ResponseCache | None = None,
        prepare: Callable[[Servable], None] | None = None,
        load_on_demand: Sequence[str] = (),
        memory: MemoryTerms | None = None,
    ) -> None:
        """``load_on_demand``: names, with ``*`` for any characters, of the repository's models that requests load."""
        super().__init__(load_on_demand)
        self.control_mode = ControlMode(control_mode)
        self._repository = repository
        self._router = router
        self._load_models = tuple(load_models)
        self._poll_interval_s = poll_interval_s
        self._drain_timeout_s = drain_timeout_s
        self._observe = observe or (lambda entry: None)
        self._prepare = prepare or (lambda servable: None)
        self._withheld: set[str] = set()
        self._dependencies = Dependencies(self._models, self._traffic)
        self._tasks = ChangeTasks(lambda: self._is_stopping)
        self._changes = Changes(
            self._models,
            self._model,
            lambda name: self._snapshots.get(name),
            Opener(repository),
            loader,
            self._dependencies,
            self._offers,
            cache,
            memory or MemoryTerms({}),
        )
        #: What each loaded version has of the devices' memory.
        self.residents = self._changes.residents
        waiting = DemandTerms(
            is_serial=self.residents.ledger.has_budgets,
            max_waiting=loader.default_queue_size or DEFAULT_MAX_WAITING,
            patience_s=loader.startup_timeout_s,
        )
        self._demand = Demand(self._changes.load_demanded, self._tasks.start, waiting)
        self._poller: asyncio.Task[None] | None = None
        self._polling = asyncio.Lock()

    async def start(self) -> None:
        """Loads the start set and returns when each model of it is ready or has failed.

        Raises ModelLoadError only where the repository itself cannot be read and the mode needs all of it.
        """
        needs_all = self.control_mode is not ControlMode.EXPLICIT or "*" in self._load_models
        try:
            await self._scan()
        except ModelLoadError as error:
            if needs_all:
                raise
            logger.warning("%s", error)
        if needs_all:
            names = [name for name in self._snapshots if not self._offers.are_left_to_requests(name)]
        else:
            names = list(dict.fromkeys(self._load_models))
        for name in names:
            self._model(name).is_wanted = self._model(name).is_asked = True
        if names:
            await asyncio.gather(*(self._tasks.run(self._changes.attempt(name)) for name in names))
        self._is_started = True
        if self.control_mode is not ControlMode.NONE and not self._is_stopping:
            self._poller = asyncio.create_task(self._poll_forever())

    async def bring(self, name: str, version: str = "", deadline_ns: int = 0) -> bool:
        """Loads a model that is loaded on demand, or waits until others have: whether ``choose`` may now find it.

        False at once where it is not to be loaded so, or is loaded already. Until the caller awaits something else, it
        is not evicted. Raises as ``Demand.bring``, RequestError for a bad version string, ModelLoadError where models
        would wait for each other.
        """
        model = self._offers.find(name, parse_version(version))
        if model is None or model.ready():
            return False
        if self._is_stopping:
            raise ServerStopping(STOPPING_TEXT)
        callers = current_callers.get()
        if not callers:
            await self._demand.bring(model, deadline_ns)
            return True
        # Its load may wait for this one: it calls in its warm-up.
        with self._dependencies.waiting(callers[-1].model, name, "models that call each other"):
            await self._demand.bring(model, deadline_ns, is_called=True)
        return True

    async def load(
        self, name: str, config_override: str | bytes | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Loads or reloads a model as the repository, or the given configuration and files, say.

        Only in explicit mode (LoadNotAllowed). Raises BackendError when there is no such model, ModelLoadError with the
        reasons when a version does not load (what served before goes on serving), OverrideRefused when the given
        configuration or files make no model, RequestError for a bad name.
        """
        self.check_explicit()
        self._check_own(name)
        await self._tasks.run(self._changes.load(name, config_override, files or {}, is_asked=True))
        if name in self._models:
            self._models[name].is_asked = True
            is_stored = config_override is None  # what else came with the request comes no second time
            self._models[name].follow_demand(is_stored and self._offers.cover(name), self._models[name].seen)

    async def unload(self, name: str, unload_dependents: bool = False) -> None:
        """Takes a model away and returns when it is drained; UnknownModel if it is neither loaded nor stored.

        Requests do not load it any more, until ``load`` does.
        ``unload_dependents``: also the models that were only loaded because this one needs them.
        """
        self.check_explicit()
        self._check_own(name)
        if name not in self._models:
            if await run_blocking(f"look at {name}", lambda: self._repository.look(name)) is None:
                raise UnknownModel(UNKNOWN_UNLOAD_TEXT.format(name))
            return
        unneeded = self._dependencies.list_unneeded(name) if unload_dependents else []
        self._models[name].follow_demand(False, None)
        await self._tasks.run(self._changes.unload(self._models[name]))
        for each in unneeded:
            if each in self._models:
                await self.unload(each, unload_dependents=True)

    async def apply(self, name: str, *, is_asked: bool = True, is_on_demand: bool = False) -> None:
        """Makes what the repository holds of a deployed model serve, in any control mode; raises as ``load``.

        From now on until ``withdraw`` it is only changed so, and whether it serves is not the server's readiness. What
        failed before is tried again if it ``is_asked`` for. Where it ``is_on_demand`` and does not serve, requests do
        the loading.
        """
        model = self._model(name)
        model.is_deployed = model.is_asked = True
        snapshot = None
        if is_on_demand:
            snapshot = await run_blocking(f"look at {name}", lambda: self._repository.look(name))
        model.follow_demand(is_on_demand, snapshot)
        if is_on_demand and model.is_resting:
            return
        await self._tasks.run(self._changes.load(name, None, {}, is_asked=is_asked))

    async def withdraw(self, name: str) -> None:
        """Takes a deployed model away, drained; nothing happens where there is none."""
        model = self._models.get(name)
        try:
            if model is not None and model.is_deployed:
                model.follow_demand(False, None)
                await self._tasks.run(self._take_away(model))
                if await run_blocking(f"look at {name}", lambda: self._repository.look(name)) is None:
                    self._snapshots = {other: each for other, each in self._snapshots.items() if other != name}
        finally:
            self.withhold(name, False)

    async def _take_away(self, model: ManagedModel) -> None:
        await self._changes.unload(model, forget=True)
        model.is_deployed = False  # before whoever waited for the change goes on

    def withhold(self, name: str, is_withheld: bool = True) -> None:
        """Gives a model no more requests, at once, whatever is being done with it; ``withdraw`` waits for that.

        What is under way is answered. Holds until it is taken back, or ``withdraw`` is done.
        """
        if is_withheld != (name in self._withheld):
            (self._withheld.add if is_withheld else self._withheld.discard)(name)
            self._publish()

    def set_traffic(self, name: str, traffic: Traffic | None) -> None:
        """Says where requests to a model go that name no version; None: to the highest one that is ready.

        Takes effect at once, for all doors together, and holds until it is set again, whether the model serves or not.
        A version that is not ready gets nothing: the others have its share as long. Where none of them is ready, such
        requests are refused (ModelNotReady). Sequences stay with the version where they began.
        """
        if self._traffic.get(name) == traffic:
            return
        if traffic is None:
            del self._traffic[name]
        else:
            self._traffic[name] = traffic
        self._publish()

    async def poll(self) -> None:
        """Looks at the repository once and follows what was added, changed or removed since the last look.

        Problems of models end in the index. Raises ModelLoadError when the repository cannot be read: nothing changes.
        """
        async with self._polling:
            await self._scan()
            if self.control_mode is not ControlMode.POLL:
                return
            jobs = []
            for name, snapshot in self._snapshots.items():
                model = self._models.get(name)
                if (model is None or model.seen != snapshot) and not self._offers.are_left_to_requests(name):
                    jobs.append(self._tasks.run(self._changes.attempt(name)))
            for name, model in list(self._models.items()):
                if name not in self._snapshots:
                    jobs.append(self._tasks.run(self._changes.unload(model, forget=True)))
            await asyncio.gather(*jobs)

    def announce_stop(self) -> None:
        """Says "not ready" and takes no changes from now on; requests are served until ``stop``."""
        self._is_stopping = True

    async def stop(self, grace_s: float) -> None:
        """Refuses new requests, answers those under way within ``grace_s``, fails the rest, unloads everything."""
        self._is_stopping = self._has_closed = True
        self._publish()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
        await self._tasks.stop()
        await asyncio.gather(*(model.stop(grace_s) for model in self._models.values()))

    def check_explicit(self) -> None:
        """Raises what ``load`` and ``unload`` raise for any model: the mode is another, or the end is near."""
        if self.control_mode is not ControlMode.EXPLICIT:
            raise LoadNotAllowed(NOT_ALLOWED_TEXT)
        if self._is_stopping:
            raise ServerStopping(STOPPING_TEXT)

    def _check_own(self, name: str) -> None:
        if name in self._models and self._models[name].is_deployed:
            raise LoadNotAllowed(f"model '{name}' is deployed from the registry: it is changed by its deployment")

    def _model(self, name: str) -> ManagedModel:
        model = self._models.get(name)
        if model is None:
            model = ManagedModel(name, self._publish, self._observe, self._drain_timeout_s)
            self._models[name] = model
        return model

    async def _scan(self) -> None:
        former = self._snapshots
        self._snapshots = await run_blocking("scan repository", self._repository.scan)
        for name in self._offers.list_changed(former, self._snapshots):
            self._offers.follow(self._model(name), self._snapshots.get(name))

    def _publish(self) -> None:
        routes: dict[str, Route] = {}
        if not self._has_closed:
            self._dependencies.follow()
            for name, model in self._models.items():
                if (ready := model.ready()) and name not in self._withheld:
                    for servable in ready.values():
                        self._prepare(servable)
                    routes[name] = Route(name, ready, self._traffic.get(name), self._routes.get(name))
        self._routes = routes
        self._router.publish(
            {
                name: (route.default, schedulers, route.shares)
                for name, route in routes.items()
                # the compiled desk leaves to Python what it does not know
                if (schedulers := route.find_plain()) is not None
            }
        )
        if not self._is_stopping:
            for name in self._dependencies.list_hopeful():
                self._tasks.start(self._changes.attempt(name, is_asked=True))

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(self._poll_interval_s)
            try:
                await self.poll()
            except ServerStopping:
                return
            except Exception:
                logger.exception("the look at the model repository failed; the next one comes in due time")
