"""A blocking connection to one server; what its clients share."""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from aiorch_client.channel import TlsConfig, call_metadata, channel_options, check_target, unreachable
from aiorch_client.errors import RequestError
from aiorch_client.steps import Pause, Send, Steps

T = TypeVar("T")


class Connection(ABC):
    """Carries out the steps of calls; threads may share it. Connects with the first call."""

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
        options = channel_options(tls)
        if tls is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, tls.credentials(), options)
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and every call that is under way; may be called twice."""
        self._closed.set()
        self._channel.close()

    def connect(self, timeout_s: float = 5.0) -> None:
        """Connects now; UnreachableError as soon as that fails, or after ``timeout_s``. Calls do not need it."""
        self._check_open()
        states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
        deadline_s = time.monotonic() + timeout_s
        self._channel.subscribe(states.put, try_to_connect=True)
        try:
            while True:
                state = states.get(timeout=max(0.0, deadline_s - time.monotonic()))
                if state is grpc.ChannelConnectivity.READY:
                    return
                if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                    raise unreachable(self.target, "connecting failed")
        except queue.Empty:
            raise unreachable(self.target, f"no connection within {timeout_s:g} s") from None
        finally:
            self._channel.unsubscribe(states.put)

    @abstractmethod
    def _find(self, method: str) -> Any:
        """The stub's callable for ``Send.method``."""

    def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                try:
                    reply = self._perform(step)
                except grpc.RpcError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(reply)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        finally:
            steps.close()

    def _perform(self, step: Any) -> Any:
        if isinstance(step, Pause):
            return self._closed.wait(step.seconds)
        return self._invoke(step)

    def _invoke(self, step: Send) -> Any:
        self._check_open()
        try:
            return self._find(step.method)(step.request, timeout=step.timeout_s, metadata=self._metadata)
        except ValueError:
            self._check_open()  # gRPC's word for a channel that another thread closed in this moment
            raise

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RequestError("this client is closed; make a new one", code=grpc.StatusCode.CANCELLED)
