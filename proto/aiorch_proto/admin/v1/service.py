"""The methods of the admin services as a table, and a stub over it; what client and server agree on beside the messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any, Final

from google.protobuf import message_factory

from aiorch_proto.admin.v1 import access_pb2, audit_pb2, deployments_pb2, registry_pb2, tuning_pb2

_MODULES: Final[tuple[ModuleType, ...]] = (registry_pb2, deployments_pb2, tuning_pb2, access_pb2, audit_pb2)


@dataclass(frozen=True, slots=True)
class Method:
    """One method: its ``service`` and ``path`` on the wire, its message classes, and which sides stream."""

    name: str
    service: str
    path: str
    request: Any
    response: Any
    client_streams: bool
    server_streams: bool


def _list_methods() -> dict[str, Method]:
    methods = {}
    for module in _MODULES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                methods[path] = Method(
                    name=method.name,
                    service=service.full_name,
                    path=path,
                    request=message_factory.GetMessageClass(method.input_type),
                    response=message_factory.GetMessageClass(method.output_type),
                    client_streams=method.client_streaming,
                    server_streams=method.server_streaming,
                )
    return methods


#: All methods of all admin services by path, in the order of the .proto files.
METHODS: Final[Mapping[str, Method]] = MappingProxyType(_list_methods())
#: The full names of the services.
SERVICE_NAMES: Final[tuple[str, ...]] = tuple(dict.fromkeys(method.service for method in METHODS.values()))


class AdminStub:
    """A stub over a channel, one attribute per service and in it one callable per method.

    ``AdminStub(channel).Deployments.Deploy(request)``; grpc and grpc.aio channels alike.
    """

    def __init__(self, channel: Any) -> None:
        for service in SERVICE_NAMES:
            setattr(self, service.rpartition(".")[2], ServiceStub(channel, service))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no admin service {name!r}")


class ServiceStub:
    """The methods of one service."""

    def __init__(self, channel: Any, service: str) -> None:
        kinds = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }
        for method in METHODS.values():
            if method.service == service:
                connect = kinds[method.client_streams, method.server_streams]
                callable_ = connect(
                    method.path,
                    request_serializer=method.request.SerializeToString,
                    response_deserializer=method.response.FromString,
                )
                setattr(self, method.name, callable_)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no method {name!r}")
