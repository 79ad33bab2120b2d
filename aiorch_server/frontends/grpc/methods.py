"""What a service registers with a server of ``grpc.aio.Server``'s surface, without the package grpc."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class RpcMethod(NamedTuple):
    """One method of a service: the fields of ``grpc.RpcMethodHandler``, which servers and interceptors look at.

    Of the last four the one that says how the method is called is set. Without a deserializer or serializer messages
    are bytes.
    """

    request_streaming: bool
    response_streaming: bool
    request_deserializer: Callable[[bytes], Any] | None = None
    response_serializer: Callable[[Any], bytes] | None = None
    unary_unary: Callable[..., Any] | None = None
    unary_stream: Callable[..., Any] | None = None
    stream_unary: Callable[..., Any] | None = None
    stream_stream: Callable[..., Any] | None = None


class RpcService:
    """The methods of one service, as ``grpc.ServiceRpcHandler`` has them."""

    def __init__(self, name: str, methods: Mapping[str, RpcMethod]) -> None:
        self._name = name
        self._methods = {f"/{name}/{method}": found for method, found in methods.items()}

    def service_name(self) -> str:
        """The full name of the service."""
        return self._name

    def service(self, details: Any) -> RpcMethod | None:
        """The method that the call with these details asks for, None where the service has it not."""
        return self._methods.get(details.method)


def add_methods(server: Any, service: str, methods: Mapping[str, RpcMethod]) -> None:
    """Registers the methods of a service by their names with ``server``, both ways that generated code uses."""
    server.add_generic_rpc_handlers((RpcService(service, methods),))
    server.add_registered_method_handlers(service, methods)
