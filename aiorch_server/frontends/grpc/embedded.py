"""The native door for servicers and interceptors that bring the package grpc along.

Generated servicers, grpcio-health-checking and grpcio-reflection plug in unchanged: the server and what servicers are
given are subclasses of grpc.aio's, and raise what grpc.aio raises.
"""

from __future__ import annotations

from typing import Any, ClassVar

import grpc

from aiorch_server.frontends.grpc.context import ServicerContext
from aiorch_server.frontends.grpc.server import GrpcDoor


class GrpcServicerContext(ServicerContext, grpc.aio.ServicerContext):  # type: ignore[misc]
    """``ServicerContext`` with grpc.aio's exceptions and end of the messages."""

    abort_error: ClassVar[type[Exception]] = grpc.aio.AbortError
    usage_error: ClassVar[type[Exception]] = grpc.aio.UsageError
    end: ClassVar[Any] = grpc.aio.EOF


class NativeGrpcServer(GrpcDoor, grpc.aio.Server):  # type: ignore[misc]
    """``GrpcDoor`` as a ``grpc.aio.Server``: reflection looks at that."""

    context_class: ClassVar[type[ServicerContext]] = GrpcServicerContext
