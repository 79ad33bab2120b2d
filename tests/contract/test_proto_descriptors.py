"""Field by field: our messages against the descriptors that tritonclient brings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from aiorch_proto.v2 import inference_pb2, model_config_pb2
from aiorch_proto.v2.service import METHODS, PACKAGE_SERVICE_NAME, SERVICE_NAME, InferenceStub
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2 as triton_config_pb2
from tritonclient.grpc import service_pb2 as triton_pb2

OURS = "aiorch.v2."
THEIRS = "inference."


def walk(messages: Any) -> Iterator[Any]:
    for message in messages:
        yield message
        yield from walk(message.nested_types)


def walk_file(*modules: Any) -> dict[str, Any]:
    """All messages, nested and map entries too, by name without the package."""
    found = {}
    for module in modules:
        package = module.DESCRIPTOR.package + "."
        for message in walk(module.DESCRIPTOR.message_types_by_name.values()):
            found[message.full_name.removeprefix(package)] = message
    return found


def walk_enums(*modules: Any) -> dict[str, dict[str, int]]:
    found = {}
    for module in modules:
        package = module.DESCRIPTOR.package + "."
        enums = list(module.DESCRIPTOR.enum_types_by_name.values())
        enums += [
            enum for message in walk(module.DESCRIPTOR.message_types_by_name.values()) for enum in message.enum_types
        ]
        for enum in enums:
            found[enum.full_name.removeprefix(package)] = {value.name: value.number for value in enum.values}
    return found


def describe(message: Any, package: str) -> dict[str, Any]:
    """Everything about a message that the wire or its users can see."""
    return {
        "is_map_entry": message.GetOptions().map_entry,
        "oneofs": {oneof.name: sorted(field.name for field in oneof.fields) for oneof in message.oneofs},
        "fields": {
            field.name: (
                field.number,
                field.type,
                field.is_repeated,
                field.is_required,
                field.has_presence,
                field.is_packed if hasattr(field, "is_packed") else None,
                field.json_name,
                field.message_type.full_name.removeprefix(package) if field.message_type else None,
                field.enum_type.full_name.removeprefix(package) if field.enum_type else None,
                field.containing_oneof.name if field.containing_oneof else None,
            )
            for field in message.fields
        },
    }


OUR_MESSAGES = walk_file(inference_pb2, model_config_pb2)
THEIR_MESSAGES = walk_file(triton_pb2, triton_config_pb2)


def test_same_set_of_messages() -> None:
    assert sorted(OUR_MESSAGES) == sorted(THEIR_MESSAGES)
    assert len(OUR_MESSAGES) > 100


@pytest.mark.parametrize("name", sorted(THEIR_MESSAGES))
def test_message(name: str) -> None:
    assert describe(OUR_MESSAGES[name], OURS) == describe(THEIR_MESSAGES[name], THEIRS)


def test_enums() -> None:
    ours, theirs = walk_enums(inference_pb2, model_config_pb2), walk_enums(triton_pb2, triton_config_pb2)
    assert ours == theirs
    assert ours["DataType"]["TYPE_BF16"] == 14


def test_methods() -> None:
    theirs = triton_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    ours = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]

    def describe_methods(service: Any) -> dict[str, tuple[str, str, bool, bool]]:
        return {
            method.name: (
                method.input_type.name,
                method.output_type.name,
                method.client_streaming,
                method.server_streaming,
            )
            for method in service.methods
        }

    assert describe_methods(ours) == describe_methods(theirs)
    assert len(METHODS) == 20
    assert theirs.full_name == SERVICE_NAME
    assert ours.full_name == PACKAGE_SERVICE_NAME
    for name, method in METHODS.items():
        assert method.path == f"/{theirs.full_name}/{name}"
        assert method.request.DESCRIPTOR.name == theirs.methods_by_name[name].input_type.name
        assert method.response.DESCRIPTOR.name == theirs.methods_by_name[name].output_type.name
        assert method.is_streaming == (name == "ModelStreamInfer")


def test_stub_has_all_methods() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[tuple[str, str]] = []

        def unary_unary(self, path: str, **_: Any) -> str:
            self.calls.append(("unary", path))
            return path

        def stream_stream(self, path: str, **_: Any) -> str:
            self.calls.append(("stream", path))
            return path

    recorder = Recorder()
    stub = InferenceStub(recorder)
    assert [path for _, path in recorder.calls] == [method.path for method in METHODS.values()]
    assert [path for kind, path in recorder.calls if kind == "stream"] == [f"/{SERVICE_NAME}/ModelStreamInfer"]
    assert set(InferenceStub.__annotations__) == set(METHODS) == set(vars(stub))


def fill(message: Any, depth: int = 0) -> None:
    """Sets every field, in a oneof the last one, to something that is not its default."""
    for number, field in enumerate(message.DESCRIPTOR.fields, start=3):
        value: Any = None
        if field.cpp_type == field.CPPTYPE_STRING:
            value = b"\x00\xff" if field.type == field.TYPE_BYTES else f"text {number}"
        elif field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
            value = number + 0.5
        elif field.cpp_type == field.CPPTYPE_BOOL:
            value = True
        elif field.cpp_type == field.CPPTYPE_ENUM:
            value = field.enum_type.values[-1].number
        elif field.cpp_type != field.CPPTYPE_MESSAGE:
            value = number
        if field.message_type and field.message_type.GetOptions().map_entry:
            key: Any = "key" if field.message_type.fields_by_name["key"].type == field.TYPE_STRING else 9
            entry = field.message_type.fields_by_name["value"]
            if entry.message_type:
                fill(getattr(message, field.name)[key], depth + 1)
            else:
                getattr(message, field.name)[key] = "value"
        elif field.message_type:
            part = getattr(message, field.name)
            if field.is_repeated:
                fill(part.add(), depth + 1)
            else:
                part.SetInParent()
                fill(part, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend([value, value])
        else:
            setattr(message, field.name, value)


@pytest.mark.parametrize("name", [name for name in sorted(THEIR_MESSAGES) if "." not in name])
def test_filled_message_round_trips(name: str) -> None:
    module, their_module = (
        (inference_pb2, triton_pb2) if hasattr(inference_pb2, name) else (model_config_pb2, triton_config_pb2)
    )
    ours, theirs = getattr(module, name)(), getattr(their_module, name)()
    fill(theirs)
    data = theirs.SerializeToString(deterministic=True)
    ours.ParseFromString(data)
    assert ours.SerializeToString(deterministic=True) == data
    as_dict = json_format.MessageToDict(ours, preserving_proto_field_name=True)
    assert as_dict == json_format.MessageToDict(theirs, preserving_proto_field_name=True)


ROUND_TRIP = """
request = {first}.ModelInferRequest(model_name="m", id="7", raw_input_contents=[b"12"])
request.parameters["priority"].uint64_param = 2**63
other = {second}.ModelInferRequest.FromString(request.SerializeToString())
assert other.parameters["priority"].uint64_param == 2**63 and other.raw_input_contents[0] == b"12"
assert type(request) is not type(other)
import pickle
assert pickle.loads(pickle.dumps({ours}.ServerLiveResponse(live=True))).live
"""


@pytest.mark.parametrize("ours_first", [True, False])
def test_both_packages_in_one_process(ours_first: bool) -> None:
    imports = [
        "from aiorch_proto.v2 import inference_pb2 as ours",
        "from tritonclient.grpc import service_pb2 as theirs",
    ]
    names = ["ours", "theirs"]
    if not ours_first:
        imports.reverse()
        names.reverse()
    script = "\n".join(imports) + ROUND_TRIP.format(first=names[0], second=names[1], ours="ours")
    script += "\nimport tritonclient.grpc, tritonclient.grpc.aio, aiorch_server.frontends.grpc.descriptors as made"
    script += "\nmade.build_pool()"
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
