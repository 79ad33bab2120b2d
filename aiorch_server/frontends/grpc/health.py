"""The standard health service (grpc.health.v1, Check and Watch) following the server's readiness."""

from __future__ import annotations

from typing import Any

from aiorch_proto.v2.service import SERVICE_NAME
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


class HealthService:
    """What the health service says of the server as a whole (``""``) and of the V2 service."""

    def __init__(self, servicer: Any) -> None:
        self._servicer = servicer

    async def set_serving(self, is_serving: bool) -> None:
        """From now on Check answers SERVING or NOT_SERVING, and everybody who watches is told."""
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE_NAME):
            await self._servicer.set(service, status)


async def add_health_service(server: Any) -> HealthService:
    """Registers the health service with ``server``; it says NOT_SERVING until told otherwise."""
    servicer = health.aio.HealthServicer()
    service = HealthService(servicer)
    await service.set_serving(False)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return service
