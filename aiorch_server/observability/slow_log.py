"""The log of slow requests: what the schedulers noted, as one line each, and not too many of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from aiorch_server._core import Scheduler
from aiorch_server.errors import AiorchError, Code
from aiorch_server.tracing import Run, find_trace
from aiorch_server.types import SlowRequest

logger = logging.getLogger(__name__)

#: How often the schedulers are asked; each holds 64 notes meanwhile.
LOOK_INTERVAL_S: Final = 0.25
#: What a line holds of a request's id, as the core's notes do.
_MAX_ID: Final = 64


class NotedModel(Protocol):
    """A live model version with the queues that its requests go through."""

    name: str
    version: int

    @property
    def plain_scheduler(self) -> Scheduler | None:
        """The queue that its requests come to as they are; what else there is tells ``SlowLog.note``."""
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

    @property
    def is_on(self) -> bool:
        """Whether anything is written at all."""
        return self._threshold_us > 0

    def prepare(self, model: NotedModel) -> None:
        """Has the slow requests of a model noted; may be called again."""
        if self._threshold_us and model.plain_scheduler is not None:
            model.plain_scheduler.watch_slow(self._threshold_us)

    def note(self, run: Run, request_id: str) -> None:
        """Writes a request down that has ended, if it took long; for those that no queue notes."""
        if not self._threshold_us or run.ended_ns - run.started_ns < self._threshold_us * 1000:
            return
        trace = run.trace or find_trace()
        ids = ("", "") if trace is None else (trace[:16].hex(), trace[16:].hex())
        request = SlowRequest(request_id[:_MAX_ID], *ids, _read_status(run.error), run.stamps)
        self._write(run.model, run.version, request, run.phases_us())

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
            if model.plain_scheduler is None:
                continue
            requests, n_lost = model.plain_scheduler.take_slow()
            self._n_lost += n_lost
            for request in requests:
                self._write(model.name, model.version, request, request.stamps.phases_us())

    def _write(self, model: str, version: int, request: SlowRequest, phases_us: Mapping[str, float]) -> None:
        if self._allowed < 1.0:
            self._n_lost += 1
            return
        self._allowed -= 1.0
        fields = {
            "model": model,
            "version": version,
            "id": request.id,
            "trace_id": request.trace_id,
            "span_id": request.span_id,
            "status": request.status,
            **{f"{phase}_us": round(us, 1) for phase, us in phases_us.items()},
            "batch_size": request.stamps.batch_rows,
        }
        logger.warning("slow request", extra={"fields": fields})


def _read_status(error: BaseException | None) -> int:
    """As gRPC's code."""
    if error is None:
        return 0
    if isinstance(error, AiorchError):
        return int(error.code)
    return int(Code.INTERNAL if isinstance(error, Exception) else Code.CANCELLED)
