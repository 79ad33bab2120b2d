"""Puts both services of the protocol on a gRPC server; apart, because most servers never meet a client of theirs."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiorch_proto.tfserving.service import METHODS, SERVICE_NAMES

from aiorch_server.frontends.grpc.methods import add_methods
from aiorch_server.frontends.grpc.unary import build_unary_method

if TYPE_CHECKING:
    from aiorch_server.dataplane import DataPlane
    from aiorch_server.frontends.tfserving.models import ModelCatalogue


def add_serving_services(
    server: Any, dataplane: DataPlane, catalogue: ModelCatalogue, *, max_tensor_bytes: int
) -> None:
    """Registers both services with ``server``, a ``grpc.aio.Server`` or one with its surface, at the standard paths.

    What answers them, see ServingServicer, is imported and made with the first call.
    """

    @functools.cache
    def get_servicer() -> Any:
        from aiorch_server.frontends.tfserving.service import ServingServicer

        return ServingServicer(dataplane, catalogue, max_tensor_bytes=max_tensor_bytes)

    def build(name: str) -> Callable[[Any, Any], Awaitable[Any]]:
        async def rpc(request: Any, context: Any) -> Any:
            return await getattr(get_servicer(), name)(request, context)

        return rpc

    for service in SERVICE_NAMES:
        names = [name for name, method in METHODS.items() if method.service == service]
        add_methods(server, service, {name: build_unary_method(build(name), METHODS[name].request) for name in names})
