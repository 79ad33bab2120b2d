"""Decides which requests are watched, and hands what was seen to whoever makes spans of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from aiorch_server._core import Scheduler
from aiorch_server.observability.trace_settings import TraceSettings
from aiorch_server.tracing import Incoming, Run, current_incoming, current_run

logger = logging.getLogger(__name__)

#: The members of one batch end nearly together; after this its span is sent.
_BATCH_PATIENCE_S: Final = 0.5


class WatchedModel(Protocol):
    """A model version that requests come to."""

    name: str
    version: int

    @property
    def plain_scheduler(self) -> Scheduler | None:
        """The queue that the compiled path knows, if it does."""
        ...


class Span(Protocol):
    """A request that is being traced."""

    trace_id: bytes
    span_id: bytes


class SpanWriter(Protocol):
    """Where traces go; nothing here may raise or wait."""

    def begin(self, model: str, version: int, incoming: Incoming | None) -> Span:
        """The server's span of one request."""
        ...

    def finish(self, run: Run) -> None:
        """The request is over: its whole tree is there, ``run.span`` is what ``begin`` gave."""
        ...

    def end_batches(self) -> None:
        """No more members of the batches that were seen are expected."""
        ...


class Tracer:
    """Watches single requests for their callers' sake, or for traces; belongs to the event loop's thread.

    Without ``writer`` nothing is traced.
    """

    def __init__(self, settings: TraceSettings | None = None, writer: SpanWriter | None = None) -> None:
        self._settings = settings or TraceSettings()
        self._writer = writer
        self._batch_timer: asyncio.TimerHandle | None = None
        self._turns: dict[tuple[str, int], int] = {}
        self._list_models: Callable[[], Iterable[WatchedModel]] = tuple

    def follow(self, list_models: Callable[[], Iterable[WatchedModel]]) -> None:
        """From now on a change of the settings reaches the models that ``list_models`` gives."""
        self._list_models = list_models
        self._settings.observe(self._apply)

    def prepare(self, model: WatchedModel) -> None:
        """Tells the compiled path what to leave to Python of a model that is about to serve; may be called again."""
        scheduler = model.plain_scheduler
        if scheduler is None:
            return
        setting = self._settings.get(model.name)
        is_traced = self._writer is not None and self._settings.is_on(model.name)
        scheduler.set_sampling(setting.rate, is_traced=is_traced)

    def _apply(self) -> None:
        for model in tuple(self._list_models()):
            self.prepare(model)

    @contextmanager
    def watch(self, model: WatchedModel) -> Iterator[None]:
        """Surrounds one request from outside; what already belongs to a watched request needs nothing."""
        incoming = current_incoming.get()
        if current_run.get() is not None:
            yield
            return
        is_traced = self._writer is not None and self._is_chosen(model, incoming)
        if not is_traced and (incoming is None or not incoming.wants_timing):
            yield
            return
        run = Run(model.name, model.version)
        if is_traced and self._writer is not None:
            run.span = self._writer.begin(model.name, model.version, incoming)
        if incoming is not None:
            incoming.run = run
        token = current_run.set(run)
        try:
            yield
        except BaseException as error:
            run.error = run.error or error
            raise
        finally:
            current_run.reset(token)
            if run.span is not None and self._writer is not None:
                self._finish(run, self._writer)

    def _finish(self, run: Run, writer: SpanWriter) -> None:
        try:
            writer.finish(run)
        except Exception:  # a trace is never worth a request
            logger.exception("a trace could not be written")
        if self._batch_timer is None:
            self._batch_timer = asyncio.get_running_loop().call_later(_BATCH_PATIENCE_S, self._end_batches, writer)

    def _end_batches(self, writer: SpanWriter) -> None:
        self._batch_timer = None
        writer.end_batches()

    def _is_chosen(self, model: WatchedModel, incoming: Incoming | None) -> bool:
        if not self._settings.is_on(model.name):
            return False
        is_sampled = incoming.is_sampled if incoming is not None else None
        if is_sampled is None:
            scheduler = model.plain_scheduler
            is_sampled = self._take_turn(model) if scheduler is None else scheduler.take_sample()
        return is_sampled and self._settings.take(model.name)

    def _take_turn(self, model: WatchedModel) -> bool:
        """One in so many, of a model that the compiled path does not know."""
        rate = self._settings.get(model.name).rate
        key = (model.name, model.version)
        turn = self._turns[key] = self._turns.get(key, 0) + 1
        if rate == 0 or turn % rate:
            return False
        del self._turns[key]
        return True
