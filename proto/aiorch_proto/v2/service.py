"""The methods of the V2 service as a table, and a stub over it; what client and server agree on beside the messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from aiorch_proto.v2 import inference_pb2

_DESCRIPTOR = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]

#: The name under which clients of the V2 protocol call the service.
SERVICE_NAME: Final = "inference.GRPCInferenceService"
#: The name that stubs use which were generated from our .proto files; served as well.
PACKAGE_SERVICE_NAME: Final[str] = _DESCRIPTOR.full_name


@dataclass(frozen=True, slots=True)
class Method:
    """One method: its ``path`` on the wire, its message classes, and whether either side streams."""

    name: str
    path: str
    request: Any
    response: Any
    is_streaming: bool


#: All methods by name, in the order of the .proto file.
METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        method.name: Method(
            name=method.name,
            path=f"/{SERVICE_NAME}/{method.name}",
            request=getattr(inference_pb2, method.input_type.name),
            response=getattr(inference_pb2, method.output_type.name),
            is_streaming=method.client_streaming and method.server_streaming,
        )
        for method in _DESCRIPTOR.methods
    }
)


class InferenceStub:
    """The service as callables on ``channel``, a ``grpc.Channel`` or ``grpc.aio.Channel``, at the standard paths.

    Attributes are what ``channel.unary_unary`` and ``channel.stream_stream`` give, as in stubs that grpc generates.
    """

    ServerLive: Any
    ServerReady: Any
    ModelReady: Any
    ServerMetadata: Any
    ModelMetadata: Any
    ModelInfer: Any
    ModelStreamInfer: Any
    ModelConfig: Any
    ModelStatistics: Any
    RepositoryIndex: Any
    RepositoryModelLoad: Any
    RepositoryModelUnload: Any
    SystemSharedMemoryStatus: Any
    SystemSharedMemoryRegister: Any
    SystemSharedMemoryUnregister: Any
    CudaSharedMemoryStatus: Any
    CudaSharedMemoryRegister: Any
    CudaSharedMemoryUnregister: Any
    TraceSetting: Any
    LogSettings: Any

    def __init__(self, channel: Any) -> None:
        for method in METHODS.values():
            connect = channel.stream_stream if method.is_streaming else channel.unary_unary
            callable_ = connect(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
            setattr(self, method.name, callable_)
