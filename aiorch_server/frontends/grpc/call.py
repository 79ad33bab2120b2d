"""Runs one call of the Python plane: from its handler to exactly one status."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Final

from aiorch_server.errors import Code
from aiorch_server.frontends.grpc.context import CallFailed, ServicerContext

if TYPE_CHECKING:
    import grpc

logger = logging.getLogger(__name__)

_END: Final = object()
_NO_REQUEST: Final = "A unary call carries exactly one request message, received none"


async def run_call(path: str, handler: grpc.RpcMethodHandler, context: ServicerContext, executor: Executor) -> None:
    """Runs the handler and finishes the call, whatever happens; only CancelledError passes through.

    Statuses as grpc.aio gives them: what the servicer set; what it aborted with; UNKNOWN with type and text for an
    exception that nobody expected, which is logged.
    """
    try:
        await _invoke(handler, context, executor)
    except asyncio.CancelledError:
        if context.is_ok:
            context.set_code(Code.CANCELLED)
            context.set_details("RPC cancelled by the server")
        raise
    except context.abort_error:
        if context.is_ok:
            context.set_code(Code.UNKNOWN)
    except CallFailed as failure:
        context.set_code(failure.code)
        context.set_details(failure.details)
    except Exception as error:
        if not context.cancelled():
            logger.exception("unexpected error in the servicer of %s", path)
        if context.is_ok:
            context.set_code(Code.UNKNOWN)
            context.set_details(f"Unexpected {type(error)}: {error}")
    finally:
        context.finish()


async def _invoke(handler: grpc.RpcMethodHandler, context: ServicerContext, executor: Executor) -> None:
    function = _choose_function(handler)
    if _is_async(function):
        argument = _iterate(context) if handler.request_streaming else await _read_one(context)
        result = function(argument, context)
    else:
        from aiorch_server.frontends.grpc.sync import SyncRequestIterator, SyncServicerContext  # with grpc's interface

        loop = asyncio.get_running_loop()
        sync_context = SyncServicerContext(context, loop)
        argument = SyncRequestIterator(context, sync_context) if handler.request_streaming else await _read_one(context)
        result = await loop.run_in_executor(executor, function, argument, sync_context)
    if inspect.isawaitable(result):
        result = await result
    if not handler.response_streaming:
        if context.is_ok:
            await context.send(result)
    elif hasattr(result, "__aiter__"):
        async for message in result:
            await context.write(message)
    elif result is not None:
        await _write_from_thread(iter(result), context, executor)


async def _write_from_thread(messages: Any, context: ServicerContext, executor: Executor) -> None:
    """Pulls a plain iterator on a thread, one message at a time."""
    loop = asyncio.get_running_loop()
    while (message := await loop.run_in_executor(executor, next, messages, _END)) is not _END:
        await context.write(message)


async def _iterate(context: ServicerContext) -> AsyncIterator[Any]:
    while (message := await context.read()) is not context.end:
        yield message


async def _read_one(context: ServicerContext) -> Any:
    message = await context.read()
    if message is context.end:
        raise CallFailed(Code.UNIMPLEMENTED, _NO_REQUEST)
    await context.expect_end()
    return message


def _choose_function(handler: grpc.RpcMethodHandler) -> Callable[..., Any]:
    kind = ("stream_" if handler.request_streaming else "unary_") + (
        "stream" if handler.response_streaming else "unary"
    )
    function: Callable[..., Any] = getattr(handler, kind)
    return function


def _is_async(function: Callable[..., Any]) -> bool:
    return any(
        inspect.iscoroutinefunction(candidate) or inspect.isasyncgenfunction(candidate)
        for candidate in (function, getattr(function, "__call__", None))  # noqa: B004 - looked into, not tested for
    )
