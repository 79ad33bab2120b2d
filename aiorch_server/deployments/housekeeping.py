"""Takes away what a registry does not need any more: old answers and events, uploads that expired, unreferenced files.

Every server does it, each at its own times: twice does no harm.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from aiorch_server.errors import AiorchError, ServerStopping
from aiorch_server.lifecycle.threads import run_blocking
from aiorch_server.registry.collect import GRACE, collect_garbage, exclude_uploads
from aiorch_server.registry.deployments import read_deployments
from aiorch_server.registry.events import forget_events
from aiorch_server.registry.idempotency import forget_answers
from aiorch_server.registry.rollouts import forget_rollouts
from aiorch_server.registry.servers import forget_silent_servers
from aiorch_server.registry.upload_rows import drop_upload, read_expired_uploads
from aiorch_server.registry.versions import read_referenced

if TYPE_CHECKING:
    from aiorch_server.registry.database import Database
    from aiorch_server.registry.session import Session
    from aiorch_server.registry.store import ArtefactStore
    from aiorch_server.registry.uploads import Uploads

logger = logging.getLogger(__name__)

#: How often, within a quarter more or less.
INTERVAL_S: Final = 600.0
#: Whoever was silent for so long will not come back under that name.
_SILENT_S: Final = 24 * 3600.0


class Housekeeping:
    """For one event loop's thread; what blocks runs on threads."""

    def __init__(
        self,
        database: Database,
        store: ArtefactStore,
        uploads: Uploads,
        *,
        interval_s: float = INTERVAL_S,
        grace: timedelta = GRACE,
    ) -> None:
        self._database = database
        self._store = store
        self._uploads = uploads
        self._interval_s, self._grace = interval_s, grace
        self._task: asyncio.Task[None] | None = None
        self._is_over = False

    def start(self) -> None:
        """Begins; the first time is after an interval."""
        self._task = asyncio.create_task(self._run(), name="registry-housekeeping")

    async def stop(self) -> None:
        """Ends, at once; what is under way on a thread ends with its next step, and holds up no process."""
        self._is_over = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def tidy(self) -> None:
        """All of it, once; what cannot be done now is told in the log, and does not keep the rest from being done."""
        for step in (self._forget, self._forget_uploads, self._collect):
            try:
                # a store that hangs would keep a thread of a pool, and the interpreter waits for those
                await run_blocking("tidy up the registry", step)
            except AiorchError as error:
                logger.info("the registry was not tidied up: %s", error)
            except Exception:
                logger.exception("tidying up the registry failed; it is tried again")

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s * random.uniform(0.75, 1.25))
            await self.tidy()

    def _forget(self) -> None:
        def forget_old_rollouts(session: Session) -> None:
            for deployment in read_deployments(session):
                forget_rollouts(session, deployment.model)

        steps: tuple[Callable[[Session], object], ...] = (
            forget_answers,
            forget_events,
            forget_old_rollouts,
            lambda session: forget_silent_servers(session, after_s=_SILENT_S),
        )
        for step in steps:  # each for itself: writers wait for each other
            self._check_not_over()
            self._database.run_blocking(step)

    def _forget_uploads(self) -> None:
        """Rows whose time is over, and bytes that nobody adds to."""
        for row in self._database.read_blocking(read_expired_uploads):
            self._check_not_over()
            self._database.run_blocking(lambda session, row=row: drop_upload(session, row.model, row.upload_id))  # type: ignore[misc]
        self._check_not_over()
        self._uploads.sweep(now=datetime.now(UTC))

    def _collect(self) -> None:
        freed = collect_garbage(
            self._store,
            self._list_referenced,
            now=datetime.now(UTC),
            grace=self._grace,
            begin=lambda: exclude_uploads(self._database),
        )
        if freed:
            logger.info("%d bytes that no version refers to were deleted from %s", freed, self._store.name)

    def _list_referenced(self) -> Collection[str]:
        found: set[str] = set()
        after = ""
        while page := self._database.read_blocking(lambda session: read_referenced(session, after=after)):  # noqa: B023
            found.update(page)
            after = page[-1]
        self._check_not_over()
        return found

    def _check_not_over(self) -> None:
        if self._is_over:
            raise ServerStopping("the server is stopping; another one goes on, or this one when it is back")
