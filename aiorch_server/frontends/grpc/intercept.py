"""Interceptors of calls, as ``grpc.aio.server(interceptors=...)`` has them.

An interceptor sees every call before its handler is chosen, and may choose another. That needs Python, so a server with
interceptors has no fast path, unless each of them declares that it does not want to see those calls: an attribute
``skipped_methods`` with full method names such as ``/inference.GRPCInferenceService/ModelInfer``. What is skipped is
skipped always, also for the calls of such a method that the fast path declines.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from aiorch_server.errors import InvalidSettings

if TYPE_CHECKING:
    import grpc

FindHandler = Callable[[Any], Awaitable[Any]]


def check_interceptors(interceptors: Sequence[grpc.aio.ServerInterceptor] | None) -> tuple[Any, ...]:
    """The interceptors; ValueError for what is none, as grpc.aio says it, or has no collection of skipped methods."""
    chosen = tuple(interceptors or ())
    if not chosen:
        return ()
    import grpc

    invalid = [interceptor for interceptor in chosen if not isinstance(interceptor, grpc.aio.ServerInterceptor)]
    if invalid:
        raise ValueError(f"Interceptor must be ServerInterceptor, the following are invalid: {invalid}")
    for interceptor in chosen:
        skipped = getattr(interceptor, "skipped_methods", ())
        # of a text every part would be skipped
        if isinstance(skipped, str | bytes) or not isinstance(skipped, Collection):
            raise ValueError(f"skipped_methods of {interceptor!r} is {skipped!r}; expected a collection of names")
    return chosen


def import_interceptor(name: str) -> grpc.aio.ServerInterceptor:
    """The object called ``module:attribute``, made if it is a class; InvalidSettings when it cannot be had."""
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for step in attribute.split("."):
            found = getattr(found, step)
        (interceptor,) = check_interceptors([found() if isinstance(found, type) else found])
    except (Exception, SystemExit) as error:  # foreign code
        raise InvalidSettings(f"grpc.interceptors: {name!r} cannot be had: {type(error).__name__}: {error}") from error
    return interceptor


def is_skipped(interceptor: grpc.aio.ServerInterceptor, method: str) -> bool:
    """Whether the interceptor does not want to see calls of this method."""
    return method in getattr(interceptor, "skipped_methods", ())


def chain_interceptors(interceptors: Sequence[Any], method: str, find: FindHandler) -> FindHandler:
    """``find`` with the interceptors before it, the first one outermost; each is given the next as continuation."""

    def precede(interceptor: Any, continuation: FindHandler) -> FindHandler:
        async def intercept(details: Any) -> grpc.RpcMethodHandler | None:
            handler: grpc.RpcMethodHandler | None = await interceptor.intercept_service(continuation, details)
            return handler

        return intercept

    for interceptor in reversed(interceptors):
        if not is_skipped(interceptor, method):
            find = precede(interceptor, find)
    return find
