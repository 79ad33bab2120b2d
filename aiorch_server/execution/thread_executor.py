"""Instances on threads: each thread loads its own instance, then pulls batches until the queue is closed and empty.

There is no dispatcher: a free instance takes the next due batch itself (``Scheduler.take`` blocks without the
interpreter lock). Frameworks keep thread settings per thread, so an instance is loaded, warmed, run and closed by one
and the same thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from aiorch_server._core import Batch, Scheduler, is_unwanted, list_attachments, read_trace, serve_compiled
from aiorch_server.backend import Backend, LoadContext, ModelInstance, RequestInstance
from aiorch_server.errors import AiorchError, Code, ModelExecutionError, ModelLoadError
from aiorch_server.execution.callers import Callers
from aiorch_server.execution.group import SchedulerGroup
from aiorch_server.execution.heap import trim_heap
from aiorch_server.execution.held_request import RequestOwner
from aiorch_server.execution.model_calls import InstanceCalls
from aiorch_server.execution.request_details import RequestDetails
from aiorch_server.execution.request_loop import RequestLoop
from aiorch_server.execution.response_counts import ResponseCounts
from aiorch_server.execution.warmup import WarmupSample, warm_up
from aiorch_server.tracing import Run, speak_of
from aiorch_server.types import ModelSignature

logger = logging.getLogger(__name__)

MAX_ERROR_CHARS = 1000
LOG_INTERVAL_S = 10.0
#: A model may make up a new type of error for each failure; what is remembered of them is bounded.
MAX_ERROR_TYPES = 100


def describe_error(error: BaseException) -> str:
    """Type and text of an error of foreign code, bounded, encodable and without its traceback; never raises."""
    text = _read_text(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _read_text(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # foreign code too
        return ""
    text = text.encode("utf-8", "replace").decode()  # lone surrogates come from undecodable file names
    return text if len(text) <= MAX_ERROR_CHARS else f"{text[:MAX_ERROR_CHARS]}..."


def _read_code(error: AiorchError) -> int:
    try:
        return int(Code(error.code))
    except ValueError:  # a model's own class of error, with a code that there is not
        return int(Code.INTERNAL)


def _read_callers(batch: Batch) -> Callers:
    details = list_attachments(batch)
    return max((each.callers for each in details if isinstance(each, RequestDetails)), key=len, default=())


def _read_run(batch: Batch) -> Run | None:
    """A watched request among the members; of several the first, for nobody can tell for which one a model calls."""
    runs = (each.run for each in list_attachments(batch) if isinstance(each, RequestDetails))
    return next((run for run in runs if run is not None), None)


class FailureLog:
    """Logs failures of one model with traceback, at most one per type of error and interval; counts the rest."""

    def __init__(self, label: str, interval_s: float = LOG_INTERVAL_S) -> None:
        self._label = label
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._seen: dict[type[BaseException], tuple[float, int]] = {}

    def write(self, error: BaseException) -> None:
        """Logs ``error`` or counts it, when one of its type was logged within the interval."""
        now = time.monotonic()
        with self._lock:
            logged_at, suppressed = self._seen.get(type(error), (-self._interval_s, 0))
            if now - logged_at < self._interval_s:
                self._seen[type(error)] = (logged_at, suppressed + 1)
                return
            if len(self._seen) >= MAX_ERROR_TYPES:
                self._seen.clear()
            self._seen[type(error)] = (now, 0)
        again = f" ({suppressed} more of this type since the last report)" if suppressed else ""
        logger.error("%s: a batch failed%s", self._label, again, exc_info=error)


class InstanceGroup:
    """All instances of one model version on one scheduler, or each on its own in a ``SchedulerGroup``.

    ``start`` loads them one after another; from then on they serve by themselves. Closing the scheduler ends them once
    its queue is empty; ``ended`` is then resolved with "", or with the reason if the last instance died. When the last
    instance is gone the scheduler is abandoned, so that no request waits for an instance which will never come.
    """

    def __init__(
        self,
        label: str,
        scheduler: Scheduler | SchedulerGroup,
        backend: Backend,
        signature: ModelSignature,
        contexts: Sequence[LoadContext],
        warmup: Sequence[WarmupSample] = (),
        *,
        isolate_failures: bool = True,
    ) -> None:
        if not contexts:
            raise ModelLoadError(f"model '{label}' has no instance; an instance group needs a count of at least 1")
        self.label = label
        self.scheduler = scheduler
        self.backend = backend
        self.signature = signature
        self.contexts = tuple(contexts)
        self.warmup = tuple(warmup)
        self.isolate_failures = isolate_failures
        self.failures = FailureLog(label)
        self.responses = ResponseCounts()
        self.ended: Future[str] = Future()
        self.ended.set_running_or_notify_cancel()  # from here on nobody can cancel it
        self._lock = threading.Lock()
        self._instances = [_InstanceThread(self, index, context) for index, context in enumerate(contexts)]
        self._alive = 0
        self._reason = ""

    @property
    def alive(self) -> int:
        """Number of instance threads that run now."""
        return self._alive

    def start(self, timeout_s: float = 300.0) -> None:
        """Loads and warms all instances, each in its own thread; blocks until all serve.

        Raises ModelLoadError, or the AiorchError of the backend; the group is then ended or ends by itself as soon as
        the framework returns.
        """
        deadline = time.monotonic() + timeout_s
        for instance in self._instances:
            with self._lock:
                self._alive += 1
            error: BaseException | None
            try:
                instance.start()
                error = instance.loaded.result(max(0.0, deadline - time.monotonic()))
            except RuntimeError as refusal:  # the system gives no thread
                error = refusal
                self.on_thread_end(instance.index, "")
            except TimeoutError:
                error = ModelLoadError(
                    f"instance {instance.index} of '{self.label}' did not finish loading within {timeout_s:g} s"
                )
            if error is not None:
                self.scheduler.abandon(Code.UNAVAILABLE, f"model '{self.label}' failed to load")
                if isinstance(error, AiorchError):
                    raise error
                raise ModelLoadError(
                    f"instance {instance.index} of '{self.label}' failed to load: {describe_error(error)}"
                ) from error

    def abandon(self, code: int, text: str) -> None:
        """Closes the scheduler and fails what is queued, and what models hold that answer request by request.

        Batches that run end by themselves.
        """
        self.scheduler.abandon(code, text)
        for instance in self._instances:
            instance.fail_open(code, text)

    def on_thread_end(self, index: int, reason: str) -> None:
        """Called by each thread as its last act; ``reason`` is "" unless the thread died."""
        if isinstance(self.scheduler, SchedulerGroup):  # what this instance alone would serve
            self.scheduler.members[index].abandon(Code.UNAVAILABLE, reason or f"model '{self.label}' is unloaded")
        with self._lock:
            self._alive -= 1
            self._reason = reason or self._reason
            is_last = self._alive == 0
            reason = self._reason
        if is_last:
            # Also after an orderly end: close() leaves nothing queued, so then there is nothing to fail.
            self.scheduler.abandon(Code.UNAVAILABLE, reason or f"model '{self.label}' is unloaded")
            self.ended.set_result(reason)


class _InstanceThread(threading.Thread):
    """One place of the group. ``loaded`` is resolved with None, or with what made the load fail."""

    def __init__(self, group: InstanceGroup, index: int, context: LoadContext) -> None:
        # Daemon: a model stuck in its framework must not keep the process alive.
        super().__init__(name=f"{group.label}#{index}", daemon=True)
        self.index = index
        self.loaded: Future[BaseException | None] = Future()
        self._group = group
        self._context = context
        self._loop: RequestLoop | None = None

    def fail_open(self, code: int, text: str) -> None:
        """Fails the requests that a model which answers one by one still holds."""
        if self._loop is not None:
            self._loop.fail_open(code, text)

    def run(self) -> None:
        instance: ModelInstance | None = None
        reason = ""
        try:
            try:
                instance = self._group.backend.load(self._context, self._group.signature)
                self._require_requests(instance)
                warm_up(instance, self._group.signature, self._group.warmup, self.name)
                trim_heap()
            except BaseException as error:
                self.loaded.set_result(error)
                return
            self.loaded.set_result(None)
            self._serve(instance)
        except BaseException as error:
            reason = f"instance {self.index} of '{self._group.label}' died: {describe_error(error)}"
            logger.critical("%s", reason, exc_info=error)
        finally:
            try:
                self._close(instance)
                instance = None
                trim_heap()
            finally:
                self._group.on_thread_end(self.index, reason)

    def _require_requests(self, instance: ModelInstance) -> None:
        if self._group.signature.is_decoupled and not isinstance(instance, RequestInstance):
            raise ModelLoadError(
                f"'{self._group.label}': model_transaction_policy.decoupled: this model of backend "
                f"'{self._group.backend.name}' gives one answer to each request; write false or remove it"
            )

    def _serve(self, instance: ModelInstance) -> None:
        scheduler, calls = self._group.scheduler, self._context.call_model
        own = scheduler.members[self.index] if isinstance(scheduler, SchedulerGroup) else scheduler
        if isinstance(instance, RequestInstance):
            self._loop = RequestLoop(
                instance,
                own,
                RequestOwner(self._context.model_name, self._group.signature, self._group.responses),
                isolate_failures=self._group.isolate_failures,
                answer=self._answer,
                log=self._group.failures.write,
            )
            if isinstance(calls, InstanceCalls):
                calls.follow(self._loop.read_callers, self._loop.is_unwanted, self._loop.read_run)
            self._loop.serve()
            return
        batch = Batch(own)
        if isinstance(calls, InstanceCalls):
            calls.follow(lambda: _read_callers(batch), lambda: is_unwanted(batch), lambda: _read_run(batch))
        execute, compiled = instance.execute, instance.compiled
        try:
            while True:
                try:
                    if compiled is None:
                        batch.serve(execute)
                    elif (reason := serve_compiled(batch, compiled)) is not None:
                        raise self._describe_failure(reason)
                    return
                except Exception as error:
                    self._settle_failed(instance, batch, error)
        except BaseException as error:
            # The thread dies (SystemExit in a model's code). Its batch is answered here: where the error is kept, the
            # batch is kept by its traceback, and would leave its members waiting.
            batch.select(None)
            batch.fail(*self._answer(error))
            raise

    def _settle_failed(self, instance: ModelInstance, batch: Batch, error: Exception) -> None:
        """Answers every member of a failed batch, each on its own where the configuration allows to run it again."""
        with speak_of(read_trace(batch)):
            self._group.failures.write(error)
        members = batch.members
        if members == 1 or not self._group.isolate_failures:
            batch.fail(*self._answer(error))
            return
        for index in range(members):
            batch.select(index)
            try:
                batch.settle(instance.execute(batch.gather()))
            except Exception as member_error:
                batch.fail(*self._answer(member_error))

    def _describe_failure(self, reason: str) -> ModelExecutionError:
        return ModelExecutionError(f"model '{self._context.model_name}' failed: {reason}")

    def _answer(self, error: BaseException) -> tuple[int, str]:
        if isinstance(error, AiorchError):
            return _read_code(error), _read_text(error)
        return int(Code.INTERNAL), f"model '{self._context.model_name}' failed: {describe_error(error)}"

    def _close(self, instance: ModelInstance | None) -> None:
        if instance is None:
            return
        try:
            instance.close()
        except BaseException:  # also SystemExit: the thread ends anyway, and in order
            logger.exception("%s: closing instance %d failed", self._group.label, self.index)
