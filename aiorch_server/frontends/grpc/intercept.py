"""Interceptors of calls, as ``grpc.aio.server(interceptors=...)`` has them.

An interceptor sees every call before its handler is chosen, and may choose another. That needs Python, so a server with
interceptors has no fast path, unless each of them declares that it does not want to see those calls: an attribute
``skipped_methods`` with full method names such as ``/inference.GRPCInferenceService/ModelInfer``. What is skipped is
skipped always, also for the calls of such a method that the fast path declines.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

FindHandler = Callable[[Any], Awaitable[grpc.RpcMethodHandler | None]]


def check_interceptors(interceptors: Sequence[grpc.aio.ServerInterceptor] | None) -> tuple[Any, ...]:
    """The interceptors; ValueError for what is none, as grpc.aio says it."""
    chosen = tuple(interceptors or ())
    invalid = [interceptor for interceptor in chosen if not isinstance(interceptor, grpc.aio.ServerInterceptor)]
    if invalid:
        raise ValueError(f"Interceptor must be ServerInterceptor, the following are invalid: {invalid}")
    return chosen


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
