"""What every call of the SDK is made of, without I/O: steps that a client carries out, deadlines and retries.

A call is a generator that yields ``Send`` (answered with the response message, or with the ``grpc.RpcError`` thrown in)
and ``Pause`` (answered with None); its return value is the call's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from aiorch_client.errors import RequestError, UnavailableError, from_rpc_error
from aiorch_client.retry import RetryPolicy

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """Call ``method`` with ``request``, which may take ``timeout_s``; ``Service.Method`` where there are several."""

    method: str
    request: Any
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait for ``seconds``."""

    seconds: float


Steps = Generator[Send | Pause, Any, T]


class CallLayer:
    """Deadlines and retries of calls; usable from several threads at once.

    ``clock_s`` gives monotonic seconds, ``draw`` random numbers in [0, 1).
    """

    def __init__(
        self, *, timeout_s: float, retry: RetryPolicy, clock_s: Callable[[], float], draw: Callable[[], float]
    ) -> None:
        self.timeout_s = check_timeout(timeout_s)
        self._retry = retry
        self._clock_s = clock_s
        self._draw = draw

    def start_deadline(self, timeout_s: float | None) -> float:
        """The clock's time at which a call that starts now must be over."""
        return self._clock_s() + (self.timeout_s if timeout_s is None else check_timeout(timeout_s))

    def is_over(self, deadline_s: float) -> bool:
        """Whether that time of the clock has come."""
        return self._clock_s() >= deadline_s

    def remaining_s(self, deadline_s: float, method: str) -> float:
        """The seconds that are left; UnavailableError where there are none."""
        remaining_s = deadline_s - self._clock_s()
        if remaining_s <= 0:
            raise UnavailableError(
                f"the time for {method} was over before it could be sent; give it a longer timeout_s",
                code=grpc.StatusCode.DEADLINE_EXCEEDED,
            )
        return remaining_s

    def _call(self, method: str, request: Any, deadline_s: float, *, is_repeatable: bool = True) -> Steps[Any]:
        for attempt in itertools.count(1):
            remaining_s = self.remaining_s(deadline_s, method)
            try:
                return (yield Send(method, request, remaining_s))
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error)
                pause_s = self._retry.pause_s(attempt, error, self._draw()) if is_repeatable else None
                if pause_s is None or self._clock_s() + pause_s >= deadline_s:
                    raise error from rpc_error
            yield Pause(pause_s)
        raise AssertionError("itertools.count has no end")


def check_timeout(timeout_s: float) -> float:
    """``timeout_s`` itself; RequestError unless it is a positive number of seconds."""
    # a year is as good as for ever, and what gRPC's own arithmetic can take
    if not 0 < timeout_s <= 31_536_000:
        raise RequestError(f"timeout_s is {timeout_s}, expected seconds above 0 and at most a year")
    return timeout_s
