"""Server reflection under the standard names.

Our messages live under a package of our own, because protobuf refuses a second declaration of ``package inference`` in
one process (tritonclient brings the first). Reflection must show the standard names all the same, so their
descriptors are made from ours and kept in a pool that nobody else sees.
"""

from __future__ import annotations

from typing import Any, Final

import grpc
from aiorch_proto.v2 import inference_pb2, model_config_pb2
from aiorch_proto.v2.service import SERVICE_NAME
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

_HEALTH: Final = "grpc.health.v1.Health"
_V1ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
#: v1 has v1alpha's messages under another package; newer clients ask for it first.
_V1: Final = "grpc.reflection.v1.ServerReflection"
_STANDARD_FILES: Final = {
    "aiorch/v2/model_config.proto": "model_config.proto",
    "aiorch/v2/inference.proto": "grpc_service.proto",
    "grpc_reflection/v1alpha/reflection.proto": "grpc_reflection/v1/reflection.proto",
}


def add_reflection_service(server: Any) -> None:
    """Registers reflection (v1 and v1alpha) of the V2, health and reflection services with ``server``."""
    servicer = reflection.aio.ReflectionServicer((SERVICE_NAME, _HEALTH, _V1, _V1ALPHA), pool=build_pool())
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for service in (_V1, _V1ALPHA):
        handlers = {"ServerReflectionInfo": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


def build_pool() -> DescriptorPool:
    """A private pool with the descriptors of all services under their standard names."""
    pool = DescriptorPool()
    for module in (model_config_pb2, inference_pb2):
        pool.Add(rename_package(_copy_file(module), "inference"))
    pool.Add(_copy_file(health_pb2))
    pool.Add(_copy_file(reflection_pb2))
    pool.Add(rename_package(_copy_file(reflection_pb2), "grpc.reflection.v1"))
    return pool


def rename_package(file: FileDescriptorProto, package: str) -> FileDescriptorProto:
    """``file`` itself, moved to ``package`` and to its standard file name, with all references to its old package."""
    old, new = f".{file.package}.", f".{package}."

    def rename(name: str) -> str:
        return new + name.removeprefix(old) if name.startswith(old) else name

    def rename_fields(message: DescriptorProto) -> None:
        for field in message.field:
            if field.type_name:
                field.type_name = rename(field.type_name)
        for nested in message.nested_type:
            rename_fields(nested)

    file.package = package
    file.name = _STANDARD_FILES[file.name]
    for index, dependency in enumerate(file.dependency):
        file.dependency[index] = _STANDARD_FILES.get(dependency, dependency)
    for message in file.message_type:
        rename_fields(message)
    for service in file.service:
        for method in service.method:
            method.input_type = rename(method.input_type)
            method.output_type = rename(method.output_type)
    return file


def _copy_file(module: Any) -> FileDescriptorProto:
    file = FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)
    return file
