"""The gRPC doors: ``NativeGrpcServer`` over the compiled core, ``create_grpcio_server`` over grpc.aio."""

from aiorch_server.frontends.grpc.compression import COMPRESSIONS, ResponseCompression
from aiorch_server.frontends.grpc.credentials import ServerCredentials
from aiorch_server.frontends.grpc.grpcio_server import create_grpcio_server, make_grpcio_credentials
from aiorch_server.frontends.grpc.intercept import import_interceptor
from aiorch_server.frontends.grpc.limits import ConnectionLife, ConnectionLimits, ServerLimits
from aiorch_server.frontends.grpc.server import (
    FAST_PATH,
    MAX_MESSAGE_BYTES,
    NativeGrpcServer,
    is_native_available,
)

__all__ = [
    "COMPRESSIONS",
    "FAST_PATH",
    "MAX_MESSAGE_BYTES",
    "ConnectionLife",
    "ConnectionLimits",
    "NativeGrpcServer",
    "ResponseCompression",
    "ServerCredentials",
    "ServerLimits",
    "create_grpcio_server",
    "import_interceptor",
    "is_native_available",
    "make_grpcio_credentials",
]
