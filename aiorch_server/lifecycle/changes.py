"""One change of one model: what the repository holds, or a request brings, is loaded, or taken away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from aiorch_server.cache import ResponseCache
from aiorch_server.errors import AiorchError, InternalError, ModelLoadError
from aiorch_server.lifecycle.caching import attach_cache, check_caching
from aiorch_server.lifecycle.dependencies import Dependencies, list_requirements
from aiorch_server.lifecycle.loader import Loader, Source
from aiorch_server.lifecycle.model import ManagedModel
from aiorch_server.lifecycle.offers import Offers
from aiorch_server.lifecycle.opening import Opener
from aiorch_server.lifecycle.refusals import explain_missing_versions
from aiorch_server.lifecycle.residents import MemoryTerms, Residents
from aiorch_server.lifecycle.servable import Servable
from aiorch_server.lifecycle.threads import run_blocking
from aiorch_server.lifecycle.turns import unload_for_others
from aiorch_server.lifecycle.version_policy import find_missing
from aiorch_server.repository import ModelSnapshot

logger = logging.getLogger(__name__)


class Changes:
    """Over the manager's own table of models; for the event loop's thread.

    ``find_model`` gives a model of the table, which is made if need be; ``look`` what the repository held of one last.
    """

    def __init__(
        self,
        models: dict[str, ManagedModel],
        find_model: Callable[[str], ManagedModel],
        look: Callable[[str], ModelSnapshot | None],
        opener: Opener,
        loader: Loader,
        dependencies: Dependencies,
        offers: Offers,
        cache: ResponseCache | None,
        memory: MemoryTerms,
    ) -> None:
        self._models = models
        self._find_model = find_model
        self._look = look
        self._opener = opener
        self._loader = loader
        self._dependencies = dependencies
        self._offers = offers
        self._cache = cache
        #: What each loaded version has of the devices' memory.
        self.residents = Residents(models, loader, evict, memory)

    async def load(
        self, name: str, config_json: str | bytes | None, files: Mapping[str, bytes], *, is_asked: bool
    ) -> None:
        """Brings a model to what the repository, or what is given, says. Raises as LifecycleManager.load."""
        model = self._find_model(name)
        async with model.changing():
            try:
                opened, aspired = await self._opener.open(
                    model, config_json, files, self._look(name), is_asked=is_asked
                )
            except AiorchError as error:
                if not (is_asked and model.is_forgotten):
                    model.fail(error.public_text)
                elif not model.is_contended:
                    self._models.pop(name, None)  # a request with a wrong name must leave no trace
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

    async def load_demanded(self, name: str) -> None:
        """Loads what the repository holds because a request wants it. Raises an AiorchError."""
        try:
            await self.load(name, None, {}, is_asked=True)
        except AiorchError:
            raise
        except Exception as error:
            raise InternalError(self._note_unexpected(name, error)) from error
        self._models[name].failure = None

    async def attempt(self, name: str, *, is_asked: bool = False) -> None:
        """Loads what the repository holds; a failure is recorded and logged, never raised."""
        try:
            await self.load(name, None, {}, is_asked=is_asked)
        except AiorchError as error:
            logger.error("%s", error)
        except Exception as error:
            self._note_unexpected(name, error)

    async def unload(self, model: ManagedModel, *, forget: bool = False) -> None:
        """Takes a model away, drained, and out of the table if it is to be forgotten and nobody else wants it."""
        async with model.changing():
            await model.unload()
            if forget:
                model.forget_versions()
                if not model.is_contended:  # else whoever comes next finds it as if it were new
                    self._models.pop(model.name, None)

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
                        await self.load(name, None, {}, is_asked=True)
                    self._offers.share(model, self._models[name])
            except AiorchError as error:
                failures[name] = error.public_text
            except Exception as error:
                failures[name] = self._note_unexpected(name, error)

        # Unlike gather, it never ends before all of them have.
        async with asyncio.TaskGroup() as loads:
            for name in names:
                loads.create_task(require(name))
        # An override that failed is not tried again by itself: it is not what the repository holds.
        model.is_waiting = model.seen is not None and not self._dependencies.are_met(model)
        return failures

    def _note_unexpected(self, name: str, error: Exception) -> str:
        text = f"load failed for model '{name}': unexpected {type(error).__name__}"
        logger.error("loading '%s' failed unexpectedly", name, exc_info=error)
        self._find_model(name).fail(text)
        return text


async def evict(model: ManagedModel, reason: str) -> None:
    """Takes a model away, drained, that requests may bring back."""
    async with model.changing():
        await unload_for_others(model, reason)
