"""The tasks in which models are changed: whoever asked for a change may go without leaving it half done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from aiorch_server.errors import AiorchError, ServerStopping
from aiorch_server.lifecycle.model import STOPPING_TEXT

logger = logging.getLogger(__name__)


class ChangeTasks:
    """For the event loop's thread; ``is_stopping``: no change begins any more."""

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        self._is_stopping = is_stopping
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Awaits ``work`` in a task of its own; cancelling the caller leaves the work running."""
        if self._is_stopping():
            work.close()
            raise ServerStopping(STOPPING_TEXT)
        task = self.start(work)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if task.cancelled() and self._is_stopping() and current is not None and not current.cancelling():
                raise ServerStopping(STOPPING_TEXT) from None
            raise

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task for ``work``; what it raises unexpectedly is logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    async def stop(self) -> None:
        """Cancels what is under way and returns when it has ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # Seen here even where whoever asked is gone. What is expected is logged where it is recorded.
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, AiorchError):
            logger.error("a change of a model failed unexpectedly", exc_info=error)
