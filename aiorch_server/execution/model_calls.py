"""Calls from models' code to other models: begun on any thread, run on the server's event loop, answers handed back."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import Final, Protocol

from aiorch_server.errors import AiorchError, InternalError, QueueFull, RequestCancelled, RequestError, ServerStopping
from aiorch_server.execution.callers import Caller, Callers, current_callers, this_thread
from aiorch_server.tracing import Run, current_run
from aiorch_server.types import InferenceRequest, InferenceResponse, Tensor

#: Calls under way in the whole server, and answers that wait for one caller.
MAX_CALLS: Final = 4096
MAX_WAITING: Final = 64
#: A call without a timeout of its own: two models that call each other may wait for each other's instances.
CALL_TIMEOUT_S: Final = 300.0
#: And one to a model that already waits in the same chain: others may hold its other instances in the same way.
REENTRANT_TIMEOUT_S: Final = 60.0
#: How often a waiting thread looks whether its own caller is still there.
LOOK_INTERVAL_S: Final = 0.05
_STOPPING: Final = "the server is stopping"


class Stream(Protocol):
    """How a request is run: ``DataPlane.stream``."""

    def __call__(self, request: InferenceRequest, *, deadline_ns: int = 0) -> AsyncGenerator[InferenceResponse, None]:
        """The answers as they come."""
        ...


class ModelCalls:
    """All calls of one server; made before there is an event loop, and of no use until ``attach``."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stream: Stream | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, loop: asyncio.AbstractEventLoop, stream: Stream) -> None:
        """From now on calls are run by ``stream`` on ``loop``."""
        self._loop, self._stream = loop, stream

    def start(
        self,
        request: InferenceRequest,
        callers: Callers,
        timeout_s: float | None,
        is_unwanted: Callable[[], bool],
        run: Run | None = None,
    ) -> PendingCall:
        """Begins a call; ``is_unwanted`` is asked while the caller's thread waits. Never blocks.

        ``run`` is the watched request on whose behalf it is.
        """
        if self._loop is None:
            raise ServerStopping("the server is not ready for calls between models")
        if timeout_s is not None and not timeout_s >= 0:
            raise RequestError(f"the timeout of a call must not be negative, got {timeout_s} s")
        deadline_ns = 0 if timeout_s is None else time.monotonic_ns() + int(min(timeout_s, 1e9) * 1e9)
        # What the caller goes on holding, an answer's tensor perhaps, must not change under its hands.
        request = dataclasses.replace(request, inputs=[_share(tensor) for tensor in request.inputs])
        exchange = _Exchange(self._loop)
        context = contextvars.Context()
        context.run(current_callers.set, callers)
        context.run(current_run.set, run)
        try:
            self._loop.call_soon_threadsafe(self._begin, request, deadline_ns, exchange, context)
        except RuntimeError:  # the loop is closed
            exchange.end(ServerStopping(_STOPPING))
        return PendingCall(exchange, is_unwanted)

    def _begin(
        self, request: InferenceRequest, deadline_ns: int, exchange: _Exchange, context: contextvars.Context
    ) -> None:
        assert self._loop is not None
        if len(self._tasks) >= MAX_CALLS:
            exchange.end(QueueFull(f"{MAX_CALLS} calls between models are under way, which is the bound"))
            return
        task = self._loop.create_task(self._run(request, deadline_ns, exchange), context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Also where it never ran: who waits for it must hear.
        task.add_done_callback(lambda _: exchange.end(RequestCancelled("the call was cancelled")))
        exchange.run_by(task)

    async def _run(self, request: InferenceRequest, deadline_ns: int, exchange: _Exchange) -> None:
        assert self._stream is not None
        try:
            async with contextlib.aclosing(self._stream(request, deadline_ns=deadline_ns)) as answers:
                async for answer in answers:
                    await exchange.put(answer)
        except AiorchError as error:
            exchange.end(error)
        except Exception as error:
            exchange.end(InternalError(f"the call failed: {type(error).__name__}: {error}"))
        else:
            exchange.end(None)


def _share(tensor: Tensor) -> Tensor:
    if not isinstance(tensor.data, memoryview) or tensor.data.readonly:
        return tensor
    return dataclasses.replace(tensor, data=tensor.data.toreadonly())


class _Exchange:
    """The answers between the event loop, which puts, and one caller on another thread, who takes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        # The collector may drop the caller's end, which cancels, on the very thread that holds it.
        self._lock = threading.RLock()
        self._answers: deque[InferenceResponse] = deque()
        self._is_ended = False
        self._error: AiorchError | None = None
        self._is_cancelled = False
        self._waiter: Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._room = asyncio.Event()

    # the loop's side

    def run_by(self, task: asyncio.Task[None]) -> None:
        """Who fills it; cancelled at once if the caller has cancelled meanwhile."""
        with self._lock:
            self._task = task
            is_cancelled = self._is_cancelled
        if is_cancelled:
            task.cancel()

    async def put(self, answer: InferenceResponse) -> None:
        """Adds an answer; waits while the caller is too slow."""
        while len(self._answers) >= MAX_WAITING:
            self._room.clear()
            await self._room.wait()
        with self._lock:
            self._answers.append(answer)
            waiter, self._waiter = self._waiter, None
        _wake(waiter)

    def end(self, error: AiorchError | None) -> None:
        """No more answers come; only the first call counts."""
        with self._lock:
            if self._is_ended:
                return
            self._is_ended, self._error = True, error
            waiter, self._waiter = self._waiter, None
        _wake(waiter)

    # the caller's side

    def take(self) -> tuple[InferenceResponse | None, Future[None] | None]:
        """An answer, or what to wait for before asking again; neither: the end. Raises what ended the call."""
        with self._lock:
            if self._answers:
                answer = self._answers.popleft()
            elif self._is_ended:
                if self._error is not None:
                    raise self._error
                return None, None
            else:
                self._waiter = Future()
                return None, self._waiter
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._room.set)
        return answer, None

    def cancel(self) -> None:
        with self._lock:
            was_cancelled, self._is_cancelled = self._is_cancelled or self._is_ended, True
            task = self._task
        if task is not None and not was_cancelled:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(task.cancel)


def _wake(waiter: Future[None] | None) -> None:
    # A coroutine that gave up waiting has cancelled it.
    if waiter is not None and waiter.set_running_or_notify_cancel():
        waiter.set_result(None)


class PendingCall:
    """One call in its caller's hands; see ``backend.ModelCall``. Dropping it cancels what is not ended."""

    def __init__(self, exchange: _Exchange, is_unwanted: Callable[[], bool]) -> None:
        self._exchange = exchange
        self._is_unwanted = is_unwanted

    def __del__(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Any thread, any number of times."""
        self._exchange.cancel()

    def __iter__(self) -> Iterator[InferenceResponse]:
        """Blocks the calling thread; RequestCancelled once the caller's own callers are all gone."""
        if _is_running(self._exchange.loop):
            raise InternalError("a call between models cannot block the server's event loop; iterate it with async for")
        while True:
            answer, waiter = self._exchange.take()
            if answer is not None:
                yield answer
            elif waiter is None:
                return
            else:
                self._wait(waiter)

    def _wait(self, waiter: Future[None]) -> None:
        while True:
            try:
                return waiter.result(LOOK_INTERVAL_S)
            except TimeoutError:
                if self._is_unwanted():
                    self.cancel()
                    raise RequestCancelled("the call was cancelled: nobody waits for its caller any more") from None

    async def __aiter__(self) -> AsyncIterator[InferenceResponse]:
        """On whichever event loop the coroutine runs."""
        try:
            while True:
                answer, waiter = self._exchange.take()
                if answer is not None:
                    yield answer
                elif waiter is None:
                    return
                else:
                    await asyncio.wrap_future(waiter)
        except asyncio.CancelledError:
            self.cancel()
            raise


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


class InstanceCalls:
    """The calls of one instance: what ``LoadContext.call_model`` is. Any thread of the model's may call."""

    def __init__(self, calls: ModelCalls, model_name: str) -> None:
        self._calls = calls
        self._model_name = model_name
        self._thread: int | None = None
        self._read_callers: Callable[[], Callers] = tuple
        self._is_unwanted: Callable[[], bool] = lambda: False
        self._last: Callers = ()
        self._read_run: Callable[[], Run | None] = lambda: None

    def for_another(self) -> InstanceCalls:
        """The same for another instance of that model."""
        return InstanceCalls(self._calls, self._model_name)

    def follow(
        self,
        read_callers: Callable[[], Callers],
        is_unwanted: Callable[[], bool],
        read_run: Callable[[], Run | None] = lambda: None,
    ) -> None:
        """Called by the instance's thread before it serves: who calls, whether nobody waits any more, who is watched.

        All are only asked on that thread.
        """
        self._read_callers, self._is_unwanted, self._thread = read_callers, is_unwanted, threading.get_ident()
        self._read_run = read_run

    def __call__(self, request: InferenceRequest, *, timeout_s: float | None = None) -> PendingCall:
        """See ``backend.CallModel``."""
        is_own_thread = threading.get_ident() == self._thread
        if is_own_thread:
            self._last = self._read_callers()
        callers = (*self._last, Caller(self._model_name, is_own_thread, this_thread.holding))
        if timeout_s is None:
            timeout_s = CALL_TIMEOUT_S
        models = [caller.model for caller in callers]
        if request.model_name in models or len(set(models)) < len(models):
            timeout_s = min(timeout_s, REENTRANT_TIMEOUT_S)
        run = self._read_run() if is_own_thread else None
        is_unwanted = self._is_unwanted if is_own_thread else lambda: False
        return self._calls.start(request, callers, timeout_s, is_unwanted, run)
