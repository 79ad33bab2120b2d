"""The gRPC doors: ``NativeGrpcServer`` over the compiled core, ``create_grpcio_server`` over grpc.aio."""

from aiorch_server.frontends.grpc.compression import ResponseCompression
from aiorch_server.frontends.grpc.credentials import ServerCredentials
from aiorch_server.frontends.grpc.grpcio_server import create_grpcio_server, make_grpcio_credentials
from aiorch_server.frontends.grpc.limits import ConnectionLife, ServerLimits
from aiorch_server.frontends.grpc.server import (
    FAST_PATH,
    MAX_MESSAGE_BYTES,
    ConnectionLimits,
    NativeGrpcServer,
    is_native_available,
)

__all__ = [
    "FAST_PATH",
    "MAX_MESSAGE_BYTES",
    "ConnectionLife",
    "ConnectionLimits",
    "NativeGrpcServer",
    "ResponseCompression",
    "ServerCredentials",
    "ServerLimits",
    "create_grpcio_server",
    "is_native_available",
    "make_grpcio_credentials",
]
