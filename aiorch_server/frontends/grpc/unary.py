"""What the services of this door have in common: a method that takes one message and gives one."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, TypeVar

from aiorch_server.errors import RequestCancelled, RequestError
from aiorch_server.frontends.grpc import convert
from aiorch_server.frontends.grpc.methods import RpcMethod
from aiorch_server.frontends.grpc.status import abort_call
from aiorch_server.tracing import Incoming, receive

#: gRPC's timeouts reach 11,000 years; 30 of them fit into 64 bits of nanoseconds and are as good.
_LONGEST_WAIT_S: Final = 1e9
_Result = TypeVar("_Result")


def build_unary_method(
    rpc: Callable[[Any, Any], Awaitable[Any]],
    request_class: Any,
    check: Callable[[bytes], Awaitable[None]] | None = None,
) -> RpcMethod:
    """What is registered of ``rpc``, which takes a message of ``request_class`` and a context.

    What it raises becomes a status; messages are parsed here, so that malformed ones get the same words at every door.
    ``check`` may refuse a message before.
    """

    async def answer(message: bytes, context: Any) -> bytes:
        try:
            if check is not None:
                await check(message)
            request = convert.parse_message(request_class, message)
            response = await own_cancellation_only(rpc(request, context))
            serialized: bytes = response.SerializeToString()
            return serialized
        except Exception as error:
            failure = error
        return await abort_call(failure, context)

    return RpcMethod(request_streaming=False, response_streaming=False, unary_unary=answer)


async def parse_or_abort(message_class: Any, message: bytes, context: Any) -> Any:
    """``message`` as one of ``message_class``; where it is none, the call ends with what every door says of that."""
    try:
        return convert.parse_message(message_class, message)
    except RequestError as error:
        failure = error
    return await abort_call(failure, context)


async def own_cancellation_only(awaitable: Awaitable[_Result]) -> _Result:
    """The awaited result; a cancellation that nobody asked of this task is raised as RequestCancelled.

    A door takes CancelledError for the caller's own wish and sends nothing: a future that was cancelled somewhere
    inside the server would leave the caller without an answer.
    """
    try:
        return await awaitable
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RequestCancelled("the request was cancelled inside the server") from None


@contextlib.contextmanager
def watch_call(context: Any, method: str) -> Iterator[Incoming]:
    """Surrounds a call to ``method`` (service and name) with what its metadata ask to be watched, and tells them."""
    with receive(context.invocation_metadata() or (), "grpc", method) as incoming:
        incoming.choice = getattr(context, "choice", None)  # grpc.aio's has none
        try:
            yield incoming
        finally:
            if incoming.wants_timing:
                context.set_trailing_metadata(incoming.trailing_metadata())


def read_deadline_ns(context: Any) -> int:
    """The call's deadline on the monotonic clock, 0 if it has none."""
    remaining_s = context.time_remaining()
    if remaining_s is None:
        return 0
    return time.monotonic_ns() + int(min(remaining_s, _LONGEST_WAIT_S) * 1e9)
