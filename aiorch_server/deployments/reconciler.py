"""Follows what the registry says should run on this server, and reports to it what became of that.

While the database is away, what was wanted last goes on being served; a start without it takes what was kept in a file.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from aiorch_server.deployments.deployed import DeployedModel, FindVersion
from aiorch_server.deployments.desired import Wanted, read_last_known, read_wanted, write_last_known
from aiorch_server.errors import AiorchError, PreconditionFailed, RegistryUnavailable
from aiorch_server.lifecycle.manager import LifecycleManager
from aiorch_server.registry.database import Database
from aiorch_server.registry.records import ServerStatus
from aiorch_server.registry.servers import forget_server, report
from aiorch_server.registry.session import Session
from aiorch_server.registry.upgrade import upgrade_schema
from aiorch_server.repository import RegisteredRepository
from aiorch_server.routing import Samples

logger = logging.getLogger(__name__)

#: How often the database is looked at, at least; more often while a rollout is under way.
POLL_S: Final = 1.0
ROLLOUT_POLL_S: Final = 0.25
#: How often a server says that it is there, at least.
HEARTBEAT_S: Final = 3.0
#: A call of the database takes no longer, with the wait for a thread.
LONGEST_CALL_S: Final = 5.0
_NEVER: Final = datetime.min.replace(tzinfo=UTC)


class Reconciler:
    """``server`` is this server's name in the registry; for one event loop's thread.

    ``last_known`` is the file for starts without the database. ``on_change`` is called when ``has_settled`` may have
    changed, ``on_contact`` after each look at the database with whether a rollout is under way.
    """

    def __init__(
        self,
        database: Database,
        manager: LifecycleManager,
        repository: RegisteredRepository,
        samples: Samples,
        find_version: FindVersion,
        *,
        server: str,
        last_known: Path,
        on_change: Callable[[], None] = lambda: None,
        on_contact: Callable[[bool], None] = lambda is_rolling: None,
    ) -> None:
        self.server = server
        self._database = database
        self._manager = manager
        self._repository = repository
        self._samples = samples
        self._find_version = find_version
        self._last_known = last_known
        self._on_change = on_change
        self._on_contact = on_contact
        self._models: dict[str, DeployedModel] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_current = False
        self._is_away = False
        self._has_begun = False
        self._has_settled = False
        self._is_rolling = False
        self._end = asyncio.Event()
        self._kept: dict[str, tuple[object, ...]] | None = None
        self._reported: tuple[ServerStatus, ...] | None = None
        self._reported_at = 0.0

    @property
    def has_settled(self) -> bool:
        """Whether everything that was deployed when this began is as it should be, or has failed.

        It stays so: what is changed later takes its time beside what serves.
        """
        return self._has_settled

    async def start(self) -> None:
        """Returns when what is deployed serves or has failed, or if nothing is known of it: then it goes on trying."""
        await self._look()
        if not self._has_begun:
            found = await asyncio.to_thread(read_last_known, self._last_known)
            if found is not None:
                logger.warning("serving what was deployed when the registry was last seen: %s", self._last_known)
                self._want(found)
        # Followed from now on: who loads for long is heard of meanwhile, and hears what is wanted instead.
        self._task = asyncio.create_task(self._follow())
        await asyncio.gather(*(model.settle() for model in self._models.values()))

    def nudge(self) -> None:
        """Something has changed: look at once."""
        self._news.set()

    async def stop(self) -> None:
        """Follows no more, and tells the registry that this server is gone, if it is there."""
        self._end.set()
        self._news.set()
        if self._task is not None:
            # Not cancelled before it is at rest: what it reports would come after the farewell.
            await asyncio.wait([self._task], timeout=LONGEST_CALL_S)
        tasks = [*self._leaving, *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(model.stop() for model in self._models.values()))
        if self._is_current and not self._is_away:
            try:
                await self._database.run(lambda session: forget_server(session, self.server))
            except AiorchError as error:
                logger.info("the registry was not told that this server ends: %s", error)

    async def _follow(self) -> None:
        while not self._end.is_set():
            try:
                async with asyncio.timeout(ROLLOUT_POLL_S if self._is_rolling else POLL_S):
                    await self._news.wait()
            except TimeoutError:
                pass
            if self._end.is_set():
                return
            self._news.clear()
            try:
                await self._look()
            except Exception:
                logger.exception("the look at what is deployed failed; the next one comes in due time")
            for model in self._models.values():
                model.look()

    async def _look(self) -> None:
        """Reports, and reads what is wanted; what cannot be done because the database is away is told once."""
        try:
            if not self._is_current:
                await asyncio.to_thread(upgrade_schema, self._database.url, limit_s=30.0)
                self._is_current = True
            found = await self._exchange()
        except (RegistryUnavailable, PreconditionFailed) as error:
            if not self._is_away:
                logger.error("%s; what was deployed last goes on being served, changes have to wait", error)
            self._is_away = True
            return
        if self._is_away:
            logger.warning("the registry is back")
        self._is_away = False
        self._is_rolling = any(each.rollout is not None for each in found.values())
        self._want(found)
        self._on_contact(self._is_rolling)
        await self._keep(found)

    async def _exchange(self) -> dict[str, Wanted]:
        known = {name: model.wanted.manifests for name, model in self._models.items() if model.wanted is not None}
        statuses = tuple(model.status() for model in self._models.values())
        told = tuple(replace(status, seen_at=_NEVER) for status in statuses)
        now = asyncio.get_running_loop().time()
        if told == self._reported and now < self._reported_at + HEARTBEAT_S:
            return await self._database.read(lambda session: read_wanted(session, known))

        def work(session: Session) -> dict[str, Wanted]:
            report(session, self.server, statuses)
            return read_wanted(session, known)

        found = await self._database.run(work)
        self._reported, self._reported_at = told, now
        return found

    def _want(self, found: dict[str, Wanted]) -> None:
        self._has_begun = True
        for name, wanted in found.items():
            if name not in self._models:
                self._models[name] = DeployedModel(
                    name, self._manager, self._repository, self._samples, self._find_version, self._tell
                )
            self._models[name].want(wanted)
        for name in [name for name in self._models if name not in found]:
            model = self._models[name]
            if model.wanted is not None:
                model.want(None)
                task = asyncio.create_task(self._part_with(name, model))
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
        self._note_settled()

    async def _part_with(self, name: str, model: DeployedModel) -> None:
        await model.settle()
        if model.wanted is None and self._models.get(name) is model:  # not wanted again meanwhile
            del self._models[name]
            await model.stop()

    def _note_settled(self) -> None:
        self._has_settled |= self._has_begun and all(model.is_settled for model in self._models.values())

    def _tell(self) -> None:
        self._note_settled()
        self._news.set()
        self._on_change()

    async def _keep(self, found: dict[str, Wanted]) -> None:
        marks = {name: wanted.mark for name, wanted in found.items()}
        if marks == self._kept:
            return
        try:
            await asyncio.to_thread(write_last_known, self._last_known, tuple(found.values()))
            self._kept = marks
        except OSError as error:
            logger.warning("what is deployed cannot be kept in %s: %s", self._last_known, error.strerror)
