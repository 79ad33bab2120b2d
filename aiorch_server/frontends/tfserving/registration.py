"""Puts both services of the protocol on a gRPC server; apart, because most servers never meet a client of theirs."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from aiorch_proto.tfserving.names import METHOD_NAMES

from aiorch_server.frontends.grpc.methods import RpcMethod, add_methods
from aiorch_server.frontends.grpc.unary import build_unary_method, watch_call

_WITH_EXAMPLES: Final = ("Classify", "Regress", "MultiInference")
Answer = Callable[[bytes, Any], Awaitable[bytes]]

if TYPE_CHECKING:
    from aiorch_server.dataplane import DataPlane
    from aiorch_server.frontends.tfserving.models import ModelCatalogue


def add_serving_services(
    server: Any, dataplane: DataPlane, catalogue: ModelCatalogue, *, max_tensor_bytes: int
) -> None:
    """Registers both services with ``server``, a ``grpc.aio.Server`` or one with its surface, at the standard paths.

    What answers them, see ServingServicer, is imported with its messages and made with the first call.
    """

    @functools.cache
    def get_servicer() -> Any:
        from aiorch_server.frontends.tfserving.service import ServingServicer

        return ServingServicer(dataplane, catalogue, max_tensor_bytes=max_tensor_bytes)

    @functools.cache
    def get_answer(service: str, name: str) -> Answer:
        from aiorch_proto.tfserving.service import METHODS

        method = getattr(get_servicer(), name)

        async def rpc(request: Any, context: Any) -> Any:
            with watch_call(context, f"{service}/{name}"):
                return await method(request, context)

        check = _check_features if name in _WITH_EXAMPLES else None
        answer = build_unary_method(rpc, METHODS[name].request, check).unary_unary
        assert answer is not None
        return answer

    def build(service: str, name: str) -> RpcMethod:
        async def answer(message: bytes, context: Any) -> bytes:
            return await get_answer(service, name)(message, context)

        return RpcMethod(request_streaming=False, response_streaming=False, unary_unary=answer)

    for service, names in METHOD_NAMES.items():
        add_methods(server, service, {name: build(service, name) for name in names})


async def _check_features(message: bytes) -> None:
    from aiorch_server.frontends.tfserving.feature_count import SMALL_BYTES, check_features

    if len(message) > SMALL_BYTES:
        await asyncio.to_thread(check_features, message)
