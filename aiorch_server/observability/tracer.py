"""Decides which requests are watched, and hands what was seen to whoever makes spans of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from aiorch_server._core import Scheduler
from aiorch_server.observability.slow_log import SlowLog
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

    @property
    def is_plain(self) -> bool:
        """Whether each of its requests goes through that queue."""
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
    """Watches single requests for their callers' sake, for traces or the slow log; for the event loop's thread.

    Without ``writer`` nothing is traced. ``slow_log`` hears of what no queue tells it.
    """

    def __init__(
        self,
        settings: TraceSettings | None = None,
        writer: SpanWriter | None = None,
        slow_log: SlowLog | None = None,
    ) -> None:
        self._settings = settings or TraceSettings()
        self._writer = writer
        self._slow_log = slow_log
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
        run = None if current_run.get() is not None else self._begin(model)
        if run is None:
            yield
            return
        token = current_run.set(run)
        try:
            yield
        except BaseException as error:
            run.error = run.error or error
            raise
        finally:
            current_run.reset(token)
            self._finish(run)

    @contextmanager
    def enter(self, model: WatchedModel, request_id: str) -> Iterator[None]:
        """Surrounds what one model does for a request, as its first or as a step or call of it."""
        outer = current_run.get()
        if outer is None:
            yield
            return
        run = outer.begin(model.name, model.version)
        token = current_run.set(run)
        try:
            yield
        except BaseException as error:
            run.error = error
            raise
        finally:
            current_run.reset(token)
            self._end(run, request_id)

    @contextmanager
    def watch_stream(self, model: WatchedModel, request_id: str, *, is_whole: bool) -> Iterator[Run | None]:
        """``watch`` and ``enter`` for a generator, each step of which may be run by another task: gives the run.

        ``is_whole``: it is no step of an ensemble, which has decided for its steps.
        """
        outer = current_run.get() or (self._begin(model) if is_whole else None)
        if outer is None:
            yield None
            return
        run = outer.begin(model.name, model.version)
        try:
            yield run
        except BaseException as error:
            run.error = error
            raise
        finally:
            self._end(run, request_id)
            if run is run.root:
                self._finish(run)

    def _begin(self, model: WatchedModel) -> Run | None:
        """A request that is to be watched for its caller's sake, to be traced, or because no queue notes it if slow."""
        incoming, writer = current_incoming.get(), self._writer
        is_traced = writer is not None and self._is_chosen(model, incoming)
        is_noted = self._slow_log is not None and self._slow_log.is_on and not model.is_plain
        if not (is_traced or is_noted or (incoming is not None and incoming.wants_timing)):
            return None
        run = Run(model.name, model.version)
        if is_traced and writer is not None:
            try:
                run.span = writer.begin(model.name, model.version, incoming)
            except Exception:  # a trace is never worth a request
                logger.exception("a trace could not be begun")
        if incoming is not None:
            incoming.run = run
        return run

    def _end(self, run: Run, request_id: str) -> None:
        run.ended_ns = time.monotonic_ns()
        if self._slow_log is not None and not run.is_queued:
            self._slow_log.note(run, request_id)

    def _finish(self, run: Run) -> None:
        writer = self._writer
        if run.span is None or writer is None:
            return
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
