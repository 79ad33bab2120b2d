"""Instances on threads: each thread loads its own instance, then pulls batches until the queue is closed and empty.

There is no dispatcher: a free instance takes the next due batch itself (``Scheduler.take`` blocks without the
interpreter lock). Frameworks keep thread settings per thread, so an instance is loaded, warmed, run and closed by one
and the same thread.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from aiorch_server._core import Batch, Scheduler, is_unwanted, list_attachments, read_trace, serve_compiled
from aiorch_server.backend import Backend, LoadContext, ModelInstance, RequestInstance
from aiorch_server.errors import AiorchError, Code, ModelExecutionError, ModelLoadError, ModelNotReady
from aiorch_server.execution.callers import Callers
from aiorch_server.execution.failures import FailureLog, describe_error, read_code, read_text
from aiorch_server.execution.group import SchedulerGroup
from aiorch_server.execution.heap import trim_heap
from aiorch_server.execution.held_request import RequestOwner
from aiorch_server.execution.model_calls import InstanceCalls
from aiorch_server.execution.request_details import RequestDetails
from aiorch_server.execution.request_loop import RequestLoop
from aiorch_server.execution.response_counts import ResponseCounts
from aiorch_server.execution.warmup import WarmupSample, warm_up
from aiorch_server.pauses import pause
from aiorch_server.tracing import Run, speak_of
from aiorch_server.types import ModelSignature

logger = logging.getLogger(__name__)


def _read_callers(batch: Batch) -> Callers:
    details = list_attachments(batch)
    return max((each.callers for each in details if isinstance(each, RequestDetails)), key=len, default=())


def _read_run(batch: Batch) -> Run | None:
    """A watched request among the members; of several the first, for nobody can tell for which one a model calls."""
    runs = (each.run for each in list_attachments(batch) if isinstance(each, RequestDetails))
    return next((run for run in runs if run is not None), None)


class InstanceGroup:
    """All instances of one model version on one scheduler, or each on its own in a ``SchedulerGroup``.

    ``start`` loads them one after another; from then on they serve by themselves. Closing the scheduler ends them once
    its queue is empty; ``ended`` is then resolved with "", or with the reason if the last instance died. When the last
    instance is gone the scheduler is abandoned, so that no request waits for an instance which will never come.
    ``before_serving`` is called in the thread of each instance when that is loaded and warm.
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
        before_serving: Callable[[], object] | None = None,
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
        self.before_serving = before_serving
        self.failures = FailureLog(label)
        self.responses = ResponseCounts()
        self.ended: Future[str] = Future()
        self.ended.set_running_or_notify_cancel()  # from here on nobody can cancel it
        self._lock = threading.Lock()
        self._instances = {index: _InstanceThread(self, index, context) for index, context in enumerate(contexts)}
        self._alive = 0
        self._serving = 0  # of these: loaded, and not on their way out
        self._leaving = 0  # told to go, and not gone yet
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
        for instance in list(self._instances.values()):
            with self._lock:
                self._alive += 1
            error = self._load(instance, max(0.0, deadline - time.monotonic()), timeout_s)
            if error is not None:
                self.scheduler.abandon(Code.UNAVAILABLE, f"model '{self.label}' failed to load")
                raise error

    @property
    def serving(self) -> int:
        """Number of instances that take batches."""
        return self._serving

    @property
    def is_batched(self) -> bool:
        """Whether a run is over when all of its batch is answered: not where a model answers request by request."""
        return not any(instance.answers_singly for instance in list(self._instances.values()))

    @property
    def can_grow(self) -> bool:
        """Whether instances may come and go while others serve: those with a queue of their own may not."""
        return not isinstance(self.scheduler, SchedulerGroup)

    def grow(self, threads: int | None = None, timeout_s: float = 300.0) -> None:
        """Loads one more instance beside those that serve, which go on; blocks until it serves too.

        ``threads`` is its CPU share, else that of the others. Raises as ``start``, and ModelNotReady where the
        group ends.
        """
        with self._lock:
            if isinstance(self.scheduler, SchedulerGroup) or self.scheduler.is_closed or not self._alive:
                raise ModelNotReady(f"'{self.label}' takes no further instance")
            self._alive += 1
            index = next(index for index in itertools.count() if index not in self._instances)
            context = self.contexts[index % len(self.contexts)]
            calls = context.call_model
            context = dataclasses.replace(
                context,
                instance_index=index,
                threads=threads or context.threads,
                call_model=calls.for_another() if isinstance(calls, InstanceCalls) else calls,
            )
            self._instances[index] = instance = _InstanceThread(self, index, context)
        error = self._load(instance, timeout_s, timeout_s)
        if error is not None:
            raise error

    def shrink(self) -> bool:
        """Lets one instance go once it has answered what it runs, and unloads it; False where it is the last one.

        Never blocks: it may take as long as a batch runs.
        """
        with self._lock:
            if not self.can_grow or self._serving - self._leaving < 2:
                return False
            self._leaving += 1
        assert isinstance(self.scheduler, Scheduler)
        self.scheduler.retire(1)
        return True

    def _load(self, instance: _InstanceThread, timeout_s: float, told_s: float) -> AiorchError | None:
        """Starts it and waits until it serves; gives why it does not."""
        error: BaseException | None
        try:
            instance.start()
            error = instance.loaded.result(timeout_s)
        except RuntimeError as refusal:  # the system gives no thread
            error = refusal
            self.on_thread_end(instance.index, "")
        except TimeoutError:
            late = f"instance {instance.index} of '{self.label}' did not finish loading within {told_s:g} s"
            error = ModelLoadError(late) if instance.give_up() else instance.loaded.result()
        if error is None or isinstance(error, AiorchError):
            return error
        found = ModelLoadError(f"instance {instance.index} of '{self.label}' failed to load: {describe_error(error)}")
        found.__cause__ = error
        return found

    def begin_serving(self) -> None:
        """Called by an instance that is loaded, before it says so."""
        with self._lock:
            self._count_serving(1)

    def _count_serving(self, change: int) -> None:
        self._serving += change
        if isinstance(self.scheduler, Scheduler):
            self.scheduler.set_policy(instances=self._serving)

    def abandon(self, code: int, text: str) -> None:
        """Closes the scheduler and fails what is queued, and what models hold that answer request by request.

        Batches that run end by themselves.
        """
        self.scheduler.abandon(code, text)
        for instance in list(self._instances.values()):
            instance.fail_open(code, text)

    def may_leave(self) -> bool:
        """Asked by an instance that gets no more batches: False where it was told to go, but is the last one now."""
        with self._lock:
            if not isinstance(self.scheduler, SchedulerGroup) and not self.scheduler.is_closed:
                self._leaving -= 1
                if self._serving < 2:
                    return False
            self._count_serving(-1)
            return True

    def on_thread_end(self, index: int, reason: str, *, was_serving: bool = False) -> None:
        """Called by each thread as its last act; ``reason`` is "" unless the thread died, perhaps while it served."""
        if isinstance(self.scheduler, SchedulerGroup):  # what this instance alone would serve
            self.scheduler.members[index].abandon(Code.UNAVAILABLE, reason or f"model '{self.label}' is unloaded")
        with self._lock:
            del self._instances[index]
            self._alive -= 1
            if was_serving:
                self._count_serving(-1)
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
        self._lock = threading.Lock()
        self._is_given_up = False
        self._is_serving = False

    @property
    def answers_singly(self) -> bool:
        """Whether its model answers request by request; known once it serves."""
        return self._loop is not None

    def give_up(self) -> bool:
        """It is to end as soon as it is loaded; False where it is loaded by now."""
        with self._lock:
            self._is_given_up = not self.loaded.done()
            return self._is_given_up

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
                pause()
                self._require_requests(instance)
                warm_up(instance, self._group.signature, self._group.warmup, self.name)
                pause()
                trim_heap()
                if self._group.before_serving is not None:
                    self._group.before_serving()
            except BaseException as error:
                self.loaded.set_result(error)
                return
            with self._lock:
                if not self._is_given_up:
                    self._group.begin_serving()
                    self._is_serving = True
                    self.loaded.set_result(None)
            if self._is_serving:
                self._serve(instance)
                while not self._group.may_leave():
                    self._serve(instance)
                self._is_serving = False
        except BaseException as error:
            reason = f"instance {self.index} of '{self._group.label}' died: {describe_error(error)}"
            logger.critical("%s", reason, exc_info=error)
        finally:
            try:
                self._close(instance)
                instance = None
                trim_heap()
            finally:
                self._group.on_thread_end(self.index, reason, was_serving=self._is_serving)

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
            batch.leave()
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
            return read_code(error), read_text(error)
        return int(Code.INTERNAL), f"model '{self._context.model_name}' failed: {describe_error(error)}"

    def _close(self, instance: ModelInstance | None) -> None:
        if instance is None:
            return
        try:
            instance.close()
        except BaseException:  # also SystemExit: the thread ends anyway, and in order
            logger.exception("%s: closing instance %d failed", self._group.label, self.index)
