"""The gRPC doors: ``GrpcDoor`` over the compiled core, ``create_grpcio_server`` over grpc.aio.

``NativeGrpcServer`` is the first as a ``grpc.aio.Server``, for servicers and interceptors that are made with grpc.
Importing the package grpc costs 15 MB and a tenth of the start, so what needs it is imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from aiorch_server.frontends.grpc.compression import COMPRESSIONS, Compression, ResponseCompression
from aiorch_server.frontends.grpc.credential_files import CredentialFiles
from aiorch_server.frontends.grpc.credentials import ServerCredentials
from aiorch_server.frontends.grpc.intercept import import_interceptor
from aiorch_server.frontends.grpc.limits import ConnectionLife, ConnectionLimits, ServerLimits
from aiorch_server.frontends.grpc.server import FAST_PATH, MAX_MESSAGE_BYTES, GrpcDoor, is_native_available

if TYPE_CHECKING:
    from aiorch_server.frontends.grpc.embedded import NativeGrpcServer
    from aiorch_server.frontends.grpc.grpcio_server import (
        RenewableCredentials,
        create_grpcio_server,
        make_grpcio_credentials,
    )

__all__ = [
    "COMPRESSIONS",
    "FAST_PATH",
    "MAX_MESSAGE_BYTES",
    "Compression",
    "ConnectionLife",
    "ConnectionLimits",
    "CredentialFiles",
    "GrpcDoor",
    "NativeGrpcServer",
    "RenewableCredentials",
    "ResponseCompression",
    "ServerCredentials",
    "ServerLimits",
    "create_grpcio_server",
    "import_interceptor",
    "is_native_available",
    "make_grpcio_credentials",
]

_WITH_GRPC = {
    "NativeGrpcServer": "embedded",
    "RenewableCredentials": "grpcio_server",
    "create_grpcio_server": "grpcio_server",
    "make_grpcio_credentials": "grpcio_server",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_GRPC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WITH_GRPC[name]}"), name)
