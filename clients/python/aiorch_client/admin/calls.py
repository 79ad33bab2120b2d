"""The calls of the admin API as values, and the layer that makes steps of them: see ``aiorch_client.steps``."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from aiorch_client.errors import ClientError
from aiorch_client.retry import RetryPolicy
from aiorch_client.steps import CallLayer, Pause, Steps

T = TypeVar("T")
Item = TypeVar("Item")

#: A server that starts anew, or a database that fails over, is back after some seconds.
ADMIN_RETRIES: Final = RetryPolicy(max_attempts=6, initial_backoff_s=0.1, max_backoff_s=2.0)
PAGE_SIZE: Final = 200


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """``Service.Method`` with its request, and how its answer is read.

    A request that has a field ``idempotency_key`` gets one, which it keeps over retries.
    """

    method: str
    request: Any
    decode: Callable[[Any], T]


@dataclass(frozen=True, slots=True)
class ListCall(Generic[Item]):
    """A call whose answer is a page; ``field`` holds its items."""

    method: str
    request: Any
    field: str
    decode: Callable[[Any], Item]


class AdminLayer(CallLayer):
    """Makes the steps of every call; usable from several threads at once."""

    @property
    def max_attempts(self) -> int:
        """How often something is tried before it is given up."""
        return self._retry.max_attempts

    def call(self, call: Call[T], timeout_s: float | None) -> Steps[T]:
        """One call, tried again as the policy says: with its idempotency key no change is made twice."""
        request = call.request
        if "idempotency_key" in request.DESCRIPTOR.fields_by_name and not request.idempotency_key:
            request.idempotency_key = str(uuid.uuid4())
        reply = yield from self._call(call.method, request, self.start_deadline(timeout_s))
        return call.decode(reply)

    def list_page(self, call: ListCall[Item], token: str, timeout_s: float | None) -> Steps[tuple[list[Item], str]]:
        """The page at ``token``, and the token of the next one, "" behind the last."""
        call.request.page_size = PAGE_SIZE
        call.request.page_token = token
        reply = yield from self._call(call.method, call.request, self.start_deadline(timeout_s))
        return [call.decode(each) for each in getattr(reply, call.field)], reply.next_page_token

    def pause(self, attempt: int, error: ClientError, deadline_s: float) -> Pause | None:
        """What to do after failed attempt ``attempt`` (from 1) of what may be repeated; None: too long."""
        fraction = self._draw()
        pause_s = self._retry.backoff_s(attempt, fraction)
        if error.retry_after_s is not None:
            pause_s = self._retry.spread_s(error.retry_after_s, fraction)
        return None if self._clock_s() + pause_s >= deadline_s else Pause(pause_s)


def forget(message: Any) -> None:
    """Reads an answer that says nothing."""
