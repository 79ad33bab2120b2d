"""The lifecycle of all models: what the repository holds -> what is aspired -> what is loaded and routed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from aiorch_server._core import Router
from aiorch_server.cache import ResponseCache
from aiorch_server.config.server import ControlMode
from aiorch_server.errors import (
    AiorchError,
    InternalError,
    LoadNotAllowed,
    ModelLoadError,
    ModelNotReady,
    RequestError,
    ServerStopping,
    UnknownModel,
    UnknownVersion,
)
from aiorch_server.execution.callers import current_callers
from aiorch_server.lifecycle.caching import attach_cache, check_caching
from aiorch_server.lifecycle.demand import DEFAULT_MAX_WAITING, Demand, DemandTerms
from aiorch_server.lifecycle.dependencies import Dependencies, list_requirements
from aiorch_server.lifecycle.loader import Loader, Source
from aiorch_server.lifecycle.model import STOPPING_TEXT, ManagedModel, Observer
from aiorch_server.lifecycle.offers import Offers
from aiorch_server.lifecycle.opening import Opener
from aiorch_server.lifecycle.refusals import (
    UNKNOWN_UNLOAD_TEXT,
    explain_missing,
    explain_missing_versions,
    explain_unknown,
    parse_version,
)
from aiorch_server.lifecycle.residents import MemoryTerms, Residents
from aiorch_server.lifecycle.route import Route
from aiorch_server.lifecycle.servable import Servable, ServableHandle
from aiorch_server.lifecycle.threads import run_blocking
from aiorch_server.lifecycle.version_policy import find_missing
from aiorch_server.repository import ModelRepository, ModelSnapshot
from aiorch_server.routing import Traffic
from aiorch_server.types import ModelIndexEntry, ModelState

logger = logging.getLogger(__name__)

NOT_ALLOWED_TEXT = "explicit model load / unload is not allowed if polling is enabled"


class LifecycleManager:
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
        self._cache = cache
        self.control_mode = ControlMode(control_mode)
        self._repository = repository
        self._opener = Opener(repository)
        self._loader = loader
        self._router = router
        self._load_models = tuple(load_models)
        self._poll_interval_s = poll_interval_s
        self._drain_timeout_s = drain_timeout_s
        self._observe = observe or (lambda entry: None)
        self._prepare = prepare or (lambda servable: None)
        self._models: dict[str, ManagedModel] = {}
        self._routes: dict[str, Route] = {}
        self._traffic: dict[str, Traffic] = {}
        self._dependencies = Dependencies(self._models, self._traffic)
        self._offers = Offers(self._models, load_on_demand)
        #: What each loaded version has of the devices' memory.
        self.residents = Residents(self._models, loader, self._evict, memory or MemoryTerms({}))
        waiting = DemandTerms(
            is_serial=self.residents.ledger.has_budgets,
            max_waiting=loader.default_queue_size or DEFAULT_MAX_WAITING,
            patience_s=loader.startup_timeout_s,
        )
        self._demand = Demand(self._load_demanded, self._start, waiting)
        self._snapshots: Mapping[str, ModelSnapshot] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._poller: asyncio.Task[None] | None = None
        self._polling = asyncio.Lock()
        self._is_started = False
        self._is_stopping = False
        self._has_closed = False

    # what the planes ask

    @property
    def is_started(self) -> bool:
        """Whether the models of the start set are loaded or have failed."""
        return self._is_started

    @property
    def is_stopping(self) -> bool:
        """Whether an end was announced: not ready any more, and no model changes."""
        return self._is_stopping

    def acquire(self, name: str, version: str = "") -> ServableHandle:
        """A lease on a version that is ready, for one request; "" is what the shares choose for it, see ``choose``.

        Raises UnknownModel, UnknownVersion, ModelNotReady, ServerStopping, or RequestError for a bad version string.
        """
        return self.choose(name, version)[0].acquire()

    def choose(
        self,
        name: str,
        version: str = "",
        *,
        key: bytes = b"",
        correlation_id: int | str = 0,
        chosen: tuple[int, bool] | None = None,
    ) -> tuple[Servable, bool]:
        """The version that one request is to run on, and whether it is in the sample that observers get.

        For each request once: where it names no version, it is counted to the shares. A sequence goes where it is
        under way; else the version in ``chosen`` holds while it is ready, then the shares decide, by ``key`` (the
        request's, see ROUTE_KEY) where they are sticky. Raises as ``acquire``.
        """
        number, route = self._find_route(name, version)
        found = route.choose(number, key, correlation_id, chosen) if route is not None else None
        if found is None:
            raise explain_missing(name, number, self._models.get(name), self._routes.get(name))
        return found

    def find(self, name: str, version: str = "") -> Servable:
        """For looking at a version that is ready, without a lease; "" is the first that has a share.

        No request is counted. Raises as ``acquire``.
        """
        number, route = self._find_route(name, version)
        servable = route.look(number) if route is not None else None
        if servable is None:
            raise explain_missing(name, number, self._models.get(name), self._routes.get(name))
        return servable

    def _find_route(self, name: str, version: str) -> tuple[int, Route | None]:
        number = parse_version(version)
        if self._has_closed:
            raise ServerStopping(STOPPING_TEXT)
        return number, self._routes.get(name)

    def list_choices(self, name: str, version: str = "") -> list[Servable]:
        """Everything that ``choose`` may give for a request; empty where it raises."""
        try:
            number, route = self._find_route(name, version)
        except (RequestError, ServerStopping):
            return []
        return route.list_choices(number) if route is not None else []

    def explain_unknown(self, name: str, version: str = "") -> AiorchError:
        """What ``find`` raises where there is no model of that name, whether there is one or not."""
        try:
            parse_version(version)
        except RequestError as error:
            return error
        return ServerStopping(STOPPING_TEXT) if self._has_closed else explain_unknown(name)

    def is_ready(self, name: str, version: str = "") -> bool:
        """Whether requests for that version should be sent; RequestError for a bad version string."""
        try:
            self.find(name, version)
            return not self._is_stopping
        except ServerStopping:
            return False
        except (UnknownModel, UnknownVersion, ModelNotReady):
            model = self._offers.find(name, parse_version(version))
            return model is not None and model.is_loadable(asyncio.get_running_loop().time()) and not self._is_stopping

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

    def servables(self) -> list[Servable]:
        """What serves or drains, by name and version."""
        return [servable for name in sorted(self._models) for servable in self._models[name].servables()]

    def versions(self, name: str) -> list[int]:
        """The ready versions of a model, lowest first."""
        return sorted(self._routes[name].servables) if name in self._routes else []

    def traffic(self, name: str) -> Traffic | None:
        """What ``set_traffic`` was last told."""
        return self._traffic.get(name)

    def is_known(self, name: str) -> bool:
        """Whether a version of the model was ever tried."""
        return name in self._models and bool(self._models[name].versions)

    def index(self, ready_only: bool = False) -> list[ModelIndexEntry]:
        """All models that are managed or were seen in the repository, by name and version."""
        entries = [entry for name in sorted(self._models) for entry in self._models[name].index()]
        if ready_only:
            return [entry for entry in entries if entry.state is ModelState.READY]
        for name, snapshot in self._snapshots.items():
            if name not in self._models:
                entries.append(ModelIndexEntry(name, "", ModelState.UNKNOWN, snapshot.problem))
        return sorted(entries, key=lambda entry: (entry.name, int(entry.version or 0)))

    def is_own(self, name: str) -> bool:
        """Whether a model of that name is managed that is not deployed from the registry."""
        model = self._models.get(name)
        return model is not None and not model.is_deployed and bool(model.is_wanted or model.versions or model.offered)

    def index_model(self, name: str) -> list[ModelIndexEntry]:
        """The rows of one model, none if it is not managed."""
        return self._models[name].index() if name in self._models else []

    def ready(self, name: str) -> Mapping[int, Servable]:
        """The ready versions of a model."""
        return self._models[name].ready() if name in self._models else {}

    def problems(self) -> dict[str, str]:
        """Models that should be ready and are not, with the reason."""
        return {name: problem for name, model in self._models.items() if (problem := model.problem())}

    # what changes models

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
            await asyncio.gather(*(self._run(self._attempt(name)) for name in names))
        self._is_started = True
        if self.control_mode is not ControlMode.NONE and not self._is_stopping:
            self._poller = asyncio.create_task(self._poll_forever())

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
        await self._run(self._load(name, config_override, files or {}, is_asked=True))
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
        await self._run(self._unload(self._models[name]))
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
        await self._run(self._load(name, None, {}, is_asked=is_asked))

    async def withdraw(self, name: str) -> None:
        """Takes a deployed model away, drained; nothing happens where there is none."""
        model = self._models.get(name)
        if model is not None and model.is_deployed:
            model.follow_demand(False, None)
            await self._run(self._unload(model, forget=True))
            model.is_deployed = False

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
                    jobs.append(self._run(self._attempt(name)))
            for name, model in list(self._models.items()):
                if name not in self._snapshots:
                    jobs.append(self._run(self._unload(model, forget=True)))
            await asyncio.gather(*jobs)

    def announce_stop(self) -> None:
        """Says "not ready" and takes no changes from now on; requests are served until ``stop``."""
        self._is_stopping = True

    async def stop(self, grace_s: float) -> None:
        """Refuses new requests, answers those under way within ``grace_s``, fails the rest, unloads everything."""
        self._is_stopping = self._has_closed = True
        self._publish()
        tasks = [*self._tasks, *([self._poller] if self._poller is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(model.stop(grace_s) for model in self._models.values()))

    # the work behind

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

    async def _load_demanded(self, name: str) -> None:
        try:
            await self._load(name, None, {}, is_asked=True)
        except AiorchError:
            raise
        except Exception as error:
            raise InternalError(self._note_unexpected(name, error)) from error
        self._models[name].failure = None

    async def _attempt(self, name: str, *, is_asked: bool = False) -> None:
        """Loads what the repository holds; a failure is recorded and logged, never raised."""
        try:
            await self._load(name, None, {}, is_asked=is_asked)
        except AiorchError as error:
            logger.error("%s", error)
        except Exception as error:
            self._note_unexpected(name, error)

    def _note_unexpected(self, name: str, error: Exception) -> str:
        text = f"load failed for model '{name}': unexpected {type(error).__name__}"
        logger.error("loading '%s' failed unexpectedly", name, exc_info=error)
        self._model(name).fail(text)
        return text

    async def _load(
        self, name: str, config_json: str | bytes | None, files: Mapping[str, bytes], *, is_asked: bool
    ) -> None:
        is_new = name not in self._models
        model = self._model(name)
        async with model.changing():
            try:
                opened, aspired = await self._opener.open(
                    model, config_json, files, self._snapshots.get(name), is_asked=is_asked
                )
            except AiorchError as error:
                if is_new and is_asked and model.is_untouched():
                    self._models.pop(name, None)  # a request with a wrong name must leave no trace
                else:
                    model.fail(str(error))
                raise
            source = Source(opened)
            failures: dict[str, str] = {}

            async def load(version: int, fingerprint: str) -> Servable:
                selected = await self._loader.select(source, version)
                try:
                    return await self._load_version(model, selected, version, fingerprint, failures)
                finally:
                    await run_blocking(f"release {name}", selected.release)

            try:
                # versions may have configurations of their own; those that serve already are not opened again
                kept = (each for each in model.servables() if aspired.get(each.version) == each.fingerprint)
                configs = [opened.config, *(each.config for each in kept)]
                model.requires = frozenset().union(*map(list_requirements, configs))
                failures.update(await self._load_required(model))
                await model.reconcile(aspired, load, is_asked=is_asked, force=config_json is not None)
            finally:
                await run_blocking(f"release {name}", source.release)
            if missing := find_missing(opened.config.version_policy, opened.snapshot.versions):
                text = explain_missing_versions(name, missing)
                model.fail(text)
                raise ModelLoadError(text)

    async def _load_version(
        self, model: ManagedModel, source: Source, version: int, fingerprint: str, failures: dict[str, str]
    ) -> Servable:
        """One version by its own configuration; ``failures`` tells why models that it needs did not load."""
        config = source.model.config
        check_caching(config, self._cache)
        limit = self._loader.default_queue_size
        if missing := list_requirements(config) - model.requires:
            model.requires |= missing
            failures.update(await self._load_required(model))
        if config.ensemble_scheduling is None:
            servable = await self.residents.load(source, version, fingerprint)
        else:
            servable = self._dependencies.build(source.model, version, fingerprint, limit, failures)
            if self._cache is not None and self._cache.is_shared:
                servable.identity = ""  # its configuration says it all, and its steps have theirs
        attach_cache(servable, self._cache, limit)
        return servable

    async def _load_required(self, model: ManagedModel) -> dict[str, str]:
        """Loads what an ensemble needs and does not serve yet; gives the reasons of what did not load."""
        names = [name for name in dict.fromkeys(key[0] for key in model.requires) if name != model.name]
        failures: dict[str, str] = {}

        async def require(name: str) -> None:
            try:
                if name not in self._models or not self._models[name].ready():
                    with self._dependencies.waiting(model.name, name):
                        await self._load(name, None, {}, is_asked=True)
                    self._offers.share(model, self._models[name])
            except AiorchError as error:
                failures[name] = str(error)
            except Exception as error:
                failures[name] = self._note_unexpected(name, error)

        # Unlike gather, it never ends before all of them have.
        async with asyncio.TaskGroup() as loads:
            for name in names:
                loads.create_task(require(name))
        # An override that failed is not tried again by itself: it is not what the repository holds.
        model.is_waiting = model.seen is not None and not self._dependencies.are_met(model)
        return failures

    async def _evict(self, model: ManagedModel, reason: str) -> None:
        async with model.changing():
            is_asked = model.is_asked
            await model.unload(reason)
            model.is_asked = is_asked

    async def _unload(self, model: ManagedModel, *, forget: bool = False) -> None:
        async with model.changing():
            await model.unload()
            if forget and not model.is_contended:
                self._models.pop(model.name, None)

    def _publish(self) -> None:
        routes: dict[str, Route] = {}
        if not self._has_closed:
            self._dependencies.follow()
            for name, model in self._models.items():
                if ready := model.ready():
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
                task = asyncio.ensure_future(self._attempt(name, is_asked=True))
                self._tasks.add(task)
                task.add_done_callback(self._forget)

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Awaits ``work`` in a task of the manager's own; cancelling the caller leaves the work running."""
        if self._is_stopping:
            work.close()
            raise ServerStopping(STOPPING_TEXT)
        task = self._start(work)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if task.cancelled() and self.is_stopping and current is not None and not current.cancelling():
                raise ServerStopping(STOPPING_TEXT) from None
            raise

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # Seen here even where whoever asked is gone. What is expected is logged where it is recorded.
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, AiorchError):
            logger.error("a change of a model failed unexpectedly", exc_info=error)

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(self._poll_interval_s)
            try:
                await self.poll()
            except ServerStopping:
                return
            except Exception:
                logger.exception("the look at the model repository failed; the next one comes in due time")

    def check_explicit(self) -> None:
        """Raises what ``load`` and ``unload`` raise for any model: the mode is another, or the end is near."""
        if self.control_mode is not ControlMode.EXPLICIT:
            raise LoadNotAllowed(NOT_ALLOWED_TEXT)
        if self._is_stopping:
            raise ServerStopping(STOPPING_TEXT)

    def _check_own(self, name: str) -> None:
        if name in self._models and self._models[name].is_deployed:
            raise LoadNotAllowed(f"model '{name}' is deployed from the registry: it is changed by its deployment")
