"""An asyncio connection to one server; what its clients share."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from aiorch_client.channel import TlsConfig, call_metadata, channel_options, check_target, unreachable
from aiorch_client.errors import RequestError
from aiorch_client.steps import Pause, Send, Steps

T = TypeVar("T")
Status = tuple[grpc.StatusCode, str, Any]


class AsyncConnection(ABC):
    """Carries out the steps of calls; belongs to the event loop of its first call, which connects it."""

    def __init__(
        self,
        target: str,
        *,
        tls: TlsConfig | None,
        token: str | None,
        metadata: Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]],
    ) -> None:
        self.target = check_target(target)
        self._metadata = call_metadata(token, metadata)
        self._options = channel_options(tls)
        self._credentials = None if tls is None else tls.credentials()
        # A grpc.aio channel belongs to the running loop, so it is opened by the first call.
        self._channel: grpc.aio.Channel | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and every call that is under way; may be called twice."""
        self._is_closed = True
        if self._channel is not None:
            await self._channel.close()

    async def connect(self, timeout_s: float = 5.0) -> None:
        """Connects now; UnreachableError as soon as that fails, or after ``timeout_s``. Calls do not need it."""
        self._ensure_open()
        try:
            async with asyncio.timeout(timeout_s):
                channel: Any = self._channel
                state = channel.get_state(try_to_connect=True)
                while state is not grpc.ChannelConnectivity.READY:
                    if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                        raise unreachable(self.target, "connecting failed")
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
        except TimeoutError:
            raise unreachable(self.target, f"no connection within {timeout_s:g} s") from None

    @abstractmethod
    def _use(self, channel: Any) -> None:
        """Makes the stub over the channel that was opened."""

    @abstractmethod
    def _find(self, method: str) -> Any:
        """The stub's callable for ``Send.method``; the connection is open."""

    async def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                try:
                    reply = await self._perform(step)
                except grpc.RpcError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(reply)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        finally:
            steps.close()

    async def _perform(self, step: Any) -> Any:
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        return await self._invoke(step)

    async def _invoke(self, step: Send) -> Any:
        self._ensure_open()
        call = self._find(step.method)(step.request, timeout=step.timeout_s, metadata=self._metadata)
        return await self._answer(call)

    async def _answer(self, call: Any) -> Any:
        try:
            return await call
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._is_closed and task is not None and not task.cancelling():
                # Nobody cancelled this task: close() ended its call, which the caller must not take for a cancellation.
                self._ensure_open()
            raise

    def _ensure_open(self) -> None:
        if self._is_closed:
            raise RequestError("this client is closed; make a new one", code=grpc.StatusCode.CANCELLED)
        if self._channel is None:
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, self._options)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._credentials, self._options)
            self._use(self._channel)


def note_status(call: Any) -> list[Status]:
    """The status that is announced for ``call``, once it is; for ``choose_status``."""
    statuses: list[Status] = []
    call.add_done_callback(lambda done: statuses.append(_read_status(done)))
    return statuses


def _read_status(call: Any) -> Status:
    """The status of a call that is over: grpc.aio gives it through coroutines, which then have nothing to wait for."""
    parts: list[Any] = []
    for coroutine in (call.code(), call.details(), call.trailing_metadata()):
        try:
            coroutine.send(None)
        except StopIteration as end:
            parts.append(end.value)
        finally:
            coroutine.close()
    code, details, trailing_metadata = parts
    return code, details, trailing_metadata


def choose_status(statuses: list[Status], error: grpc.RpcError) -> Status:
    """The server's status of a call that sends a stream.

    A message that is written while the server ends the stream fails, and grpc.aio then puts an INTERNAL of its own in
    the place of the server's status (https://github.com/grpc/grpc/issues/36066). Either may be announced and either
    raised, so of two the server's is the one that is not INTERNAL.
    """
    told = next((status for status in statuses if status[0] is not grpc.StatusCode.INTERNAL), None)
    if told is None and statuses and error.code() is grpc.StatusCode.INTERNAL:
        told = statuses[0]
    return (error.code(), error.details(), error.trailing_metadata()) if told is None else told
