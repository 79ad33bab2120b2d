"""Field by field: our messages against the descriptors that tensorflow-serving-api and TensorFlow bring."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from aiorch_proto.tfserving import core_pb2, error_pb2, serving_pb2
from aiorch_proto.tfserving.names import METHOD_NAMES
from aiorch_proto.tfserving.service import METHODS, SERVICE_NAMES
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool

from aiorch_server.frontends.grpc.descriptors import build_pool

#: Prints the serialized files, TensorFlow itself left out: its package is replaced by one that only finds modules.
PRINT_FILES = """
import importlib.util, json, sys, types
found = importlib.util.find_spec("tensorflow")
tensorflow = types.ModuleType("tensorflow")
tensorflow.__path__ = list(found.submodule_search_locations)
sys.modules["tensorflow"] = tensorflow
from tensorflow_serving.apis import model_service_pb2, prediction_service_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto
files = {}
def walk(file):
    for dependency in file.dependencies:
        walk(dependency)
    files[file.name] = file.serialized_pb.hex()
for module in (model_service_pb2, prediction_service_pb2):
    walk(module.DESCRIPTOR)
print(json.dumps(files))
"""
PACKAGES = {
    "aiorch.tfserving.core.": "tensorflow.",
    "aiorch.tfserving.error.": "tensorflow.error.",
    "aiorch.tfserving.": "tensorflow.serving.",
}


def rename(name: str) -> str:
    old = next((old for old in PACKAGES if name.startswith(old)), "")
    return PACKAGES.get(old, "") + name.removeprefix(old)


@pytest.fixture(scope="module")
def theirs() -> DescriptorPool:
    done = subprocess.run([sys.executable, "-c", PRINT_FILES], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    pool = DescriptorPool()
    for content in json.loads(done.stdout).values():
        pool.Add(FileDescriptorProto.FromString(bytes.fromhex(content)))
    return pool


def walk(messages: Any) -> Any:
    for message in messages:
        yield message
        yield from walk(message.nested_types)


OUR_MESSAGES = {
    message.full_name: message
    for module in (core_pb2, serving_pb2)
    for message in walk(module.DESCRIPTOR.message_types_by_name.values())
}


def describe(field: Any) -> tuple[Any, ...]:
    return (
        field.name,
        field.type,
        field.is_repeated,
        field.has_presence,
        field.json_name,
        rename(field.message_type.full_name) if field.message_type else None,
        rename(field.enum_type.full_name) if field.enum_type else None,
        field.containing_oneof.name if field.containing_oneof else None,
    )


@pytest.mark.parametrize("name", sorted(OUR_MESSAGES))
def test_message(theirs: DescriptorPool, name: str) -> None:
    """Each of our fields is theirs; fields of theirs may be left out."""
    message = theirs.FindMessageTypeByName(rename(name))
    for field in OUR_MESSAGES[name].fields:
        assert describe(field) == describe(message.fields_by_number[field.number])
    assert OUR_MESSAGES[name].GetOptions().map_entry == message.GetOptions().map_entry


def test_enums(theirs: DescriptorPool) -> None:
    for ours in (
        core_pb2.DataType.DESCRIPTOR,
        error_pb2.Code.DESCRIPTOR,
        serving_pb2.ModelVersionStatus.State.DESCRIPTOR,
    ):
        known = {value.name: value.number for value in theirs.FindEnumTypeByName(rename(ours.full_name)).values}
        mine = {value.name: value.number for value in ours.values}
        assert mine.items() <= known.items()
        left_out = {name for name in known.keys() - mine.keys() if not name.startswith("DO_NOT_USE")}
        assert all(name.endswith("_REF") for name in left_out)


def test_services(theirs: DescriptorPool) -> None:
    assert SERVICE_NAMES == ("tensorflow.serving.PredictionService", "tensorflow.serving.ModelService")
    assert tuple(METHOD_NAMES) == SERVICE_NAMES
    assert [name for names in METHOD_NAMES.values() for name in names] == list(METHODS)
    for service in SERVICE_NAMES:
        assert all(METHODS[name].service == service for name in METHOD_NAMES[service])
        methods = theirs.FindServiceByName(service).methods
        assert {method.name for method in methods} == {m.name for m in METHODS.values() if m.service == service}
        for method in methods:
            mine = METHODS[method.name]
            assert mine.path == f"/{service}/{method.name}"
            assert rename(mine.request.DESCRIPTOR.full_name) == method.input_type.full_name
            assert rename(mine.response.DESCRIPTOR.full_name) == method.output_type.full_name
            assert not method.client_streaming and not method.server_streaming


def test_reflection_shows_the_standard_names(theirs: DescriptorPool) -> None:
    pool = build_pool()
    for name, message in OUR_MESSAGES.items():
        shown = pool.FindMessageTypeByName(rename(name))
        assert [describe(field) for field in shown.fields] == [describe(field) for field in message.fields]
    assert set(SERVICE_NAMES) == {pool.FindServiceByName(name).full_name for name in SERVICE_NAMES}
