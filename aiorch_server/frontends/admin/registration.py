"""Puts the admin services on a gRPC server, at the native door and at grpcio's alike.

Messages arrive as bytes, so that malformed ones get the same words at every door. What a method raises becomes a status
with details; a method gives its answer as a message, or as bytes where the same bytes were given before.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from aiorch_proto.admin.v1.service import METHODS, SERVICE_NAMES, Method

from aiorch_server.errors import PayloadTooLarge
from aiorch_server.frontends.admin.details import describe_failure, find_model
from aiorch_server.frontends.grpc.convert import parse_message
from aiorch_server.frontends.grpc.methods import RpcMethod, add_methods
from aiorch_server.frontends.grpc.unary import own_cancellation_only

if TYPE_CHECKING:
    from aiorch_server.frontends.admin.transactions import Transactions

#: Asked before each call whose request is one message; raises where the caller may not make it.
Authorize = Callable[[Method, Any], None]
#: Told of each such call that is refused, with the request where it could be read.
Refuse = Callable[[Method, Any, Exception], Awaitable[None]]
_END: Final = object()
#: One request that is no piece of an upload.
MAX_REQUEST_BYTES: Final = 1 << 20


def add_admin_services(
    server: Any, servicers: Mapping[str, Any], authorize: Authorize, transactions: Transactions | None = None
) -> None:
    """Registers ``servicers``, one object with the methods of its service by the service's short name, with ``server``.

    A method that is no coroutine function is an operation of ``transactions``. Methods that stream requests authorize
    themselves, with their first message. What no servicer has is left out: the door answers UNIMPLEMENTED.
    """
    for service in SERVICE_NAMES:
        servicer = servicers.get(service.rpartition(".")[2])
        methods = {
            method.name: _build(getattr(servicer, method.name), method, authorize, transactions)
            for method in METHODS.values()
            if method.service == service and hasattr(servicer, method.name)
        }
        add_methods(server, service, methods)


def _build(
    rpc: Callable[..., Any], method: Method, authorize: Authorize, transactions: Transactions | None
) -> RpcMethod:
    if method.client_streams:
        return RpcMethod(True, False, stream_unary=_take_stream(rpc, method))
    if method.server_streams:
        return RpcMethod(False, True, unary_stream=_give_stream(rpc, method, authorize))
    if transactions is not None and not inspect.iscoroutinefunction(rpc):
        rpc = transactions.bind(method, rpc)
    refuse = _ignore if transactions is None else transactions.refuse
    return RpcMethod(False, False, unary_unary=_take_one(rpc, method, authorize, refuse))


async def _ignore(method: Method, request: Any, error: Exception) -> None:
    pass


def _take_one(rpc: Callable[..., Any], method: Method, authorize: Authorize, refuse: Refuse) -> Callable[..., Any]:
    async def answer(message: bytes, context: Any) -> bytes:
        request = None
        try:
            request = _parse(method, message)
            authorize(method, request)
            return _serialize(await own_cancellation_only(rpc(request, context)))
        except Exception as error:
            failure = describe_failure(error, find_model(request))
            await refuse(method, request, error)
        await context.abort(*failure)
        raise AssertionError("abort returned")

    return answer


def _give_stream(rpc: Callable[..., Any], method: Method, authorize: Authorize) -> Callable[..., Any]:
    async def answer(message: bytes, context: Any) -> AsyncIterator[bytes]:
        request = None
        try:
            request = _parse(method, message)
            authorize(method, request)
            answers = rpc(request, context)
        except Exception as error:
            failure = describe_failure(error, find_model(request))
            await context.abort(*failure)
        try:
            while True:
                try:
                    given = await own_cancellation_only(anext(answers, _END))
                    if given is _END:
                        return
                    data = _serialize(given)
                except Exception as error:
                    failure = describe_failure(error, find_model(request))
                    break
                yield data
        finally:
            await answers.aclose()
        await context.abort(*failure)

    return answer


def _take_stream(rpc: Callable[..., Any], method: Method) -> Callable[..., Any]:
    async def parse(messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for message in messages:
            yield parse_message(method.request, message)

    async def answer(messages: AsyncIterator[bytes], context: Any) -> bytes:
        try:
            return _serialize(await own_cancellation_only(rpc(parse(messages), context)))
        except Exception as error:
            failure = describe_failure(error)
        await context.abort(*failure)
        raise AssertionError("abort returned")

    return answer


def _parse(method: Method, message: bytes) -> Any:
    """The request; PayloadTooLarge for what no call of the admin API needs, before anything looks into it."""
    if len(message) > MAX_REQUEST_BYTES:
        raise PayloadTooLarge(f"the request has {len(message)} bytes; {method.name} takes at most {MAX_REQUEST_BYTES}")
    return parse_message(method.request, message)


def _serialize(response: Any) -> bytes:
    return response if isinstance(response, bytes) else bytes(response.SerializeToString())
