"""The log of slow requests: what the schedulers noted, as one line each, and not too many of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from aiorch_server._core import Scheduler
from aiorch_server.types import SlowRequest

logger = logging.getLogger(__name__)

#: How often the schedulers are asked; each holds 64 notes meanwhile.
LOOK_INTERVAL_S: Final = 0.25


class NotedModel(Protocol):
    """A live model version with the queues that its requests go through."""

    name: str
    version: int

    @property
    def queues(self) -> Iterable[Scheduler]:
        """None where it has no queue of its own."""
        ...


class SlowLog:
    """Writes a warning for each request of ``list_models()`` that took ``threshold_us`` or longer; 0: for none.

    At most ``lines_per_s``: the rest are counted, and told in one more line. For the event loop's thread.
    """

    def __init__(
        self, list_models: Callable[[], Iterable[NotedModel]], threshold_us: int, lines_per_s: int = 10
    ) -> None:
        self._list_models = list_models
        self._threshold_us = threshold_us
        self._lines_per_s = lines_per_s
        self._allowed = float(lines_per_s)
        self._refilled_s = time.monotonic()
        self._n_lost = 0
        self._task: asyncio.Task[None] | None = None

    def prepare(self, model: NotedModel) -> None:
        """Has the slow requests of a model noted; may be called again."""
        if self._threshold_us:
            for queue in model.queues:
                queue.watch_slow(self._threshold_us)

    def start(self) -> None:
        """Begins to write."""
        if self._threshold_us:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Writes what is there, and no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            self.write()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            try:
                self.write()
            except Exception:
                logger.exception("slow requests could not be written down")

    def write(self) -> None:
        """Writes what was noted since the last time, as far as the rate allows."""
        now_s = time.monotonic()
        self._allowed += (now_s - self._refilled_s) * self._lines_per_s
        self._allowed, self._refilled_s = min(self._allowed, float(self._lines_per_s)), now_s
        if self._n_lost and self._allowed >= 1.0:
            logger.warning("slow requests not written down", extra={"fields": {"count": self._n_lost}})
            self._n_lost = 0
            self._allowed -= 1.0
        for model in tuple(self._list_models()):
            for queue in model.queues:
                requests, n_lost = queue.take_slow()
                self._n_lost += n_lost
                for request in requests:
                    self._write(model, request)

    def _write(self, model: NotedModel, request: SlowRequest) -> None:
        if self._allowed < 1.0:
            self._n_lost += 1
            return
        self._allowed -= 1.0
        phases = {f"{phase}_us": round(us, 1) for phase, us in request.stamps.phases_us().items()}
        fields = {
            "model": model.name,
            "version": model.version,
            "id": request.id,
            "trace_id": request.trace_id,
            "status": request.status,
            **phases,
            "batch_size": request.stamps.batch_rows,
        }
        logger.warning("slow request", extra={"fields": fields})
