"""The gRPC door: the server that the settings ask for, and all services on it. Imports gRPC when it is built."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aiorch_server._core import Passes, Router
from aiorch_server.assembly.planes import Planes
from aiorch_server.config.server import GrpcConfig, Scheduling, ServerConfig, Transport
from aiorch_server.execution.precedence import ask_short_slices, check_precedence, give_precedence

if TYPE_CHECKING:
    from aiorch_server.frontends.admin.services import AdminServices
    from aiorch_server.frontends.grpc import ConnectionLife
    from aiorch_server.frontends.grpc.health import HealthService
    from aiorch_server.security.gate import Gate

logger = logging.getLogger(__name__)


def build_grpc_server(config: ServerConfig, router: Router, passes: Passes | None) -> Any:
    """The gRPC server, a ``grpc.aio.Server`` or one with its surface, without port and services.

    ``router`` and ``passes`` are what the compiled door reads of the models and of who was let in. Raises
    InvalidSettings where I/O threads should have a precedence that the system refuses.
    """
    from aiorch_server.frontends import grpc as door

    grpc, limits = config.grpc, config.limits
    is_native = grpc.transport is Transport.NATIVE
    if is_native and not door.is_native_available():
        logger.warning(
            "built without libnghttp2: gRPC is served by grpcio, which is several times slower; "
            "for the fast door install libnghttp2-dev and pkg-config, then this package again"
        )
        is_native = False
    is_realtime = is_native and config.execution.scheduling is Scheduling.REALTIME
    if is_realtime:
        check_precedence()
        logger.info("the I/O threads run at real-time priority")
    interceptors = _make_interceptors(grpc)
    if not is_native:
        return door.create_grpcio_server(
            max_message_bytes=grpc.max_message_bytes,
            max_concurrent_streams=limits.max_concurrent_streams,
            max_header_bytes=limits.max_header_bytes,
            reuse_port=grpc.reuse_port,
            life=_make_life(grpc),
            compression=door.COMPRESSIONS[grpc.compression],
            interceptors=interceptors,
        )
    # interceptors are made with grpc, our own services are not
    open_door = door.NativeGrpcServer if interceptors else door.GrpcDoor
    return open_door(
        router=router,
        passes=passes,
        max_message_bytes=grpc.max_message_bytes,
        io_threads=grpc.io_threads,
        reuse_port=grpc.reuse_port,
        limits=door.ConnectionLimits(
            max_concurrent_streams=limits.max_concurrent_streams, max_header_list_bytes=limits.max_header_bytes
        ),
        life=_make_life(grpc),
        server_limits=door.ServerLimits(grpc.max_buffered_bytes, grpc.max_connections),
        compression=door.ResponseCompression(door.COMPRESSIONS[grpc.compression], grpc.min_compress_bytes),
        interceptors=interceptors,
        on_thread=give_precedence if is_realtime else ask_short_slices,
    )


async def add_services(
    server: Any, config: GrpcConfig, planes: Planes, *, gate: Gate | None, admin: AdminServices | None
) -> HealthService:
    """Registers all services with ``server``, behind the gate where there is one, and gives the health service."""
    from aiorch_server.frontends.grpc.health import add_health_service
    from aiorch_server.frontends.grpc.reflection import add_reflection_service
    from aiorch_server.frontends.grpc.servicer import InferenceServicer, add_inference_service
    from aiorch_server.frontends.tfserving.registration import add_serving_services

    dataplane, controlplane, guarded = planes.dataplane, planes.controlplane, server
    if gate is not None:
        from aiorch_server.frontends.grpc.guard import GuardedServer

        guarded = GuardedServer(server, gate)
    add_inference_service(InferenceServicer(dataplane, controlplane), guarded)
    add_serving_services(guarded, dataplane, controlplane, max_tensor_bytes=config.max_message_bytes)
    add_reflection_service(guarded, _add_admin(server, admin))
    health = await add_health_service(guarded)
    if guarded is not server:
        guarded.add_end()
    return health


def _add_admin(server: Any, admin: AdminServices | None) -> Sequence[str]:
    """Registers the admin services, which have a gate of their own, and gives their names."""
    if admin is None:
        return ()
    from aiorch_server.frontends.admin.services import SERVICE_NAMES

    admin.register(server)
    names: Sequence[str] = SERVICE_NAMES
    return names


def _make_life(config: GrpcConfig) -> ConnectionLife:
    from aiorch_server.frontends.grpc import ConnectionLife

    return ConnectionLife(
        keepalive_time_s=config.keepalive_time_ms / 1e3,
        keepalive_timeout_s=config.keepalive_timeout_ms / 1e3,
        keepalive_permit_without_calls=config.keepalive_permit_without_calls,
        min_ping_interval_s=config.http2_min_ping_interval_without_data_ms / 1e3,
        max_ping_strikes=config.http2_max_ping_strikes,
        max_connection_idle_s=config.max_connection_idle_ms / 1e3,
        max_connection_age_s=config.max_connection_age_ms / 1e3,
        max_connection_age_grace_s=config.max_connection_age_grace_ms / 1e3,
    )


def _make_interceptors(config: GrpcConfig) -> list[Any]:
    from aiorch_server.frontends.grpc import import_interceptor

    interceptors = [import_interceptor(name) for name in config.interceptors]
    if config.restricted_protocols:
        from aiorch_server.frontends.grpc.restricted import RestrictionInterceptor
        from aiorch_server.frontends.restriction import AccessRules

        interceptors.insert(0, RestrictionInterceptor(AccessRules.for_grpc(config.restricted_protocols)))
    return interceptors
