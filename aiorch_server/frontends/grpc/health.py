"""The standard health service (grpc.health.v1, Check and Watch) following the server's readiness.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from aiorch_proto.v2.service import SERVICE_NAME
from grpc_health.v1 import health_pb2

from aiorch_server.errors import Code
from aiorch_server.frontends.grpc.methods import RpcMethod, add_methods
from aiorch_server.frontends.grpc.status import bound_text, to_status
from aiorch_server.frontends.grpc.unary import parse_or_abort

HEALTH_NAME: Final = "grpc.health.v1.Health"
_Status = health_pb2.HealthCheckResponse
#: What can be asked for: the server as a whole, and the V2 service.
_KNOWN: Final = ("", SERVICE_NAME)


class HealthService:
    """What the health service says of everything it knows: NOT_SERVING until told otherwise; for the loop's thread."""

    def __init__(self) -> None:
        self._status: int = _Status.NOT_SERVING
        self._changed = asyncio.Event()

    async def set_serving(self, is_serving: bool) -> None:
        """From now on Check answers SERVING or NOT_SERVING, and everybody who watches is told."""
        self._status = _Status.SERVING if is_serving else _Status.NOT_SERVING
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def check(self, message: bytes, context: Any) -> Any:
        """The status now; NOT_FOUND for a service that is not known."""
        request = await parse_or_abort(health_pb2.HealthCheckRequest, message, context)
        if request.service not in _KNOWN:
            await context.abort(to_status(Code.NOT_FOUND), bound_text(f"unknown service '{request.service}'"))
        return _Status(status=self._status)

    async def watch(self, message: bytes, context: Any) -> AsyncIterator[Any]:
        """The status now and after each change, for as long as the client listens; what it missed is left out."""
        request = await parse_or_abort(health_pb2.HealthCheckRequest, message, context)
        sent = None
        while True:
            changed = self._changed
            status = self._status if request.service in _KNOWN else _Status.SERVICE_UNKNOWN
            if status != sent:
                yield _Status(status=status)
                sent = status
            await changed.wait()


async def add_health_service(server: Any) -> HealthService:
    """Registers the health service with ``server``; it says NOT_SERVING until told otherwise."""
    service = HealthService()
    write = _Status.SerializeToString
    methods = {
        "Check": RpcMethod(False, False, None, write, unary_unary=service.check),
        "Watch": RpcMethod(False, True, None, write, unary_stream=service.watch),
    }
    add_methods(server, HEALTH_NAME, methods)
    return service
