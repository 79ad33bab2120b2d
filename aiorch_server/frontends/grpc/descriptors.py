"""What reflection tells about the services, under the standard names.

Our messages live under a package of our own, because protobuf refuses a second declaration of ``package inference`` in
one process (tritonclient brings the first). Reflection must show the standard names all the same, so their
descriptors are made from ours and kept in a pool that nobody else sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from aiorch_proto.tfserving import core_pb2, error_pb2, serving_pb2
from aiorch_proto.v2 import inference_pb2, model_config_pb2
from google.protobuf import any_pb2, wrappers_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2 as pb

from aiorch_server.errors import Code
from aiorch_server.frontends.grpc.convert import parse_message

_PACKAGES: Final = {
    "aiorch.v2": "inference",
    "aiorch.tfserving": "tensorflow.serving",
    "aiorch.tfserving.core": "tensorflow",
    "aiorch.tfserving.error": "tensorflow.error",
}
_STANDARD_FILES: Final = {
    "aiorch/v2/model_config.proto": "model_config.proto",
    "aiorch/v2/inference.proto": "grpc_service.proto",
    "aiorch/tfserving/core.proto": "tensorflow/core/core.proto",
    "aiorch/tfserving/error.proto": "tensorflow/core/protobuf/error_codes.proto",
    "aiorch/tfserving/serving.proto": "tensorflow_serving/apis/prediction_service.proto",
    "grpc_reflection/v1alpha/reflection.proto": "grpc_reflection/v1/reflection.proto",
}
_ADMIN: Final = "aiorch.admin."


class Descriptors:
    """Answers what is asked about the services' descriptors.

    https://github.com/grpc/grpc/blob/master/doc/server-reflection.md
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = sorted(services)
        self._pool = build_pool()
        if any(name.startswith(_ADMIN) for name in self._services):
            _add_admin_files(self._pool)

    def answer(self, message: bytes) -> bytes:
        """What one serialized request asks for; inside it an error where that is unknown, or nothing was asked.

        RequestError where the message is none.
        """
        request = parse_message(pb.ServerReflectionRequest, message)
        response = pb.ServerReflectionResponse(original_request=request)
        try:
            self._look_up(request, response)
        except KeyError:
            _write_error(Code.NOT_FOUND, response)
        serialized: bytes = response.SerializeToString()
        return serialized

    def _look_up(self, request: Any, response: Any) -> None:
        match request.WhichOneof("message_request"):
            case "list_services":
                services = [pb.ServiceResponse(name=name) for name in self._services]
                response.list_services_response.service.extend(services)
            case "file_by_filename":
                self._write_files(self._pool.FindFileByName(request.file_by_filename), response)
            case "file_containing_symbol":
                self._write_files(self._pool.FindFileContainingSymbol(request.file_containing_symbol), response)
            case "file_containing_extension":
                asked = request.file_containing_extension
                extended = self._pool.FindMessageTypeByName(asked.containing_type)
                extension = self._pool.FindExtensionByNumber(extended, asked.extension_number)
                self._write_files(extension.file, response)
            case "all_extension_numbers_of_type":
                extended = self._pool.FindMessageTypeByName(request.all_extension_numbers_of_type)
                numbers = sorted(extension.number for extension in self._pool.FindAllExtensions(extended))
                response.all_extension_numbers_response.base_type_name = extended.full_name
                response.all_extension_numbers_response.extension_number.extend(numbers)
            case _:
                _write_error(Code.INVALID_ARGUMENT, response)

    def _write_files(self, file: Any, response: Any) -> None:
        """The file's declaration and those of all that it imports, each once."""
        found = {file.name: file}
        waiting = [file]
        while waiting:
            for dependency in waiting.pop().dependencies:
                if dependency.name not in found:
                    found[dependency.name] = dependency
                    waiting.append(dependency)
        files = response.file_descriptor_response.file_descriptor_proto
        files.extend(each.serialized_pb for each in found.values())


def _write_error(code: Code, response: Any) -> None:
    response.error_response.error_code = code
    response.error_response.error_message = code.name.lower().replace("_", " ")


def build_pool() -> DescriptorPool:
    """A private pool with the descriptors of all services under their standard names."""
    pool = DescriptorPool()
    for module in (any_pb2, wrappers_pb2):
        pool.Add(_copy_file(module))
    for module in (model_config_pb2, inference_pb2, core_pb2, error_pb2, serving_pb2):
        pool.Add(rename_packages(_copy_file(module), _PACKAGES))
    pool.Add(_copy_file(health_pb2))
    pool.Add(_copy_file(pb))
    pool.Add(rename_packages(_copy_file(pb), {"grpc.reflection.v1alpha": "grpc.reflection.v1"}))
    return pool


def _add_admin_files(pool: DescriptorPool) -> None:
    """The admin services' files, which are named as they are published."""
    from aiorch_proto.admin.v1 import access_pb2, audit_pb2, deployments_pb2, registry_pb2, tuning_pb2
    from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2

    for module in (duration_pb2, field_mask_pb2, timestamp_pb2):
        pool.Add(_copy_file(module))
    for module in (registry_pb2, deployments_pb2, tuning_pb2, access_pb2, audit_pb2):
        pool.Add(_copy_file(module))


def rename_packages(file: FileDescriptorProto, packages: Mapping[str, str]) -> FileDescriptorProto:
    """``file`` itself, moved to its new package and standard file name, with all references to the old ``packages``."""

    def rename(name: str) -> str:
        # a package may be the beginning of another one's name
        old = max((old for old in packages if name.startswith(f".{old}.")), key=len, default=None)
        return name if old is None else f".{packages[old]}{name.removeprefix(f'.{old}')}"

    def rename_fields(message: DescriptorProto) -> None:
        for field in message.field:
            if field.type_name:
                field.type_name = rename(field.type_name)
        for nested in message.nested_type:
            rename_fields(nested)

    file.package = packages[file.package]
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
