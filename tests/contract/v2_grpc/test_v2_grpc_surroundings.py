"""Health, reflection, our own stubs and typed contents on a running server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import METHODS, PACKAGE_SERVICE_NAME, SERVICE_NAME
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2 as triton_pb2

from aiorch_server.frontends.grpc.descriptors import build_pool

TIMEOUT_S = 20.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.proves("Health/Check", by="grpcio")
@pytest.mark.parametrize("service", ["", SERVICE_NAME])
async def test_health_check(site: SimpleNamespace, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(site.channel)
    request = health_pb2.HealthCheckRequest(service=service)
    assert (await stub.Check(request)).status == NOT_SERVING
    await site.health.set_serving(True)
    assert (await stub.Check(request)).status == SERVING
    await site.health.set_serving(False)
    assert (await stub.Check(request)).status == NOT_SERVING


async def test_health_of_unknown_service(site: SimpleNamespace) -> None:
    stub = health_pb2_grpc.HealthStub(site.channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.proves("Health/Watch", by="grpcio")
async def test_health_watch(site: SimpleNamespace) -> None:
    call = health_pb2_grpc.HealthStub(site.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
    assert (await asyncio.wait_for(call.read(), TIMEOUT_S)).status == NOT_SERVING
    await site.health.set_serving(True)
    assert (await asyncio.wait_for(call.read(), TIMEOUT_S)).status == SERVING
    await site.health.set_serving(False)
    assert (await asyncio.wait_for(call.read(), TIMEOUT_S)).status == NOT_SERVING
    call.cancel()


@pytest.mark.parametrize("message", [b"\xff", b"\x0a\x05ab"])
@pytest.mark.parametrize(
    "path",
    [
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_malformed_messages_are_refused_and_not_logged(
    site: SimpleNamespace, caplog: pytest.LogCaptureFixture, path: str, message: bytes
) -> None:
    call = site.channel.stream_stream(path)(iter([message]), timeout=TIMEOUT_S)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    kind = "HealthCheckRequest" if "Health" in path else "ServerReflectionRequest"
    assert caught.value.details() == f"the {len(message)} bytes of the request are not a valid {kind} message"
    assert not caplog.records


def reflect_v1alpha(site: SimpleNamespace) -> Any:
    return reflection_pb2_grpc.ServerReflectionStub(site.channel).ServerReflectionInfo


def reflect_v1(site: SimpleNamespace) -> Any:
    return site.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )


async def ask(reflect: Any, **request: Any) -> reflection_pb2.ServerReflectionResponse:
    call = reflect(iter([reflection_pb2.ServerReflectionRequest(**request)]))
    responses = [response async for response in call]
    assert len(responses) == 1
    return responses[0]


@pytest.mark.proves("ServerReflection/*", "ServerMetadata", by="grpcio")
@pytest.mark.parametrize("connect", [reflect_v1, reflect_v1alpha])
async def test_reflection(site: SimpleNamespace, connect: Any) -> None:
    """A client that knows nothing lists the services, fetches the files, and makes a call with what it got."""
    reflect = connect(site)
    services = [service.name for service in (await ask(reflect, list_services="")).list_services_response.service]
    assert services == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        SERVICE_NAME,
        "tensorflow.serving.ModelService",
        "tensorflow.serving.PredictionService",
    ]
    for service in services:
        answer = await ask(reflect, file_containing_symbol=service)
        assert answer.file_descriptor_response.file_descriptor_proto, service
    answer = await ask(reflect, file_containing_symbol=SERVICE_NAME)
    pool = descriptor_pool.DescriptorPool()
    files = [FileDescriptorProto.FromString(data) for data in answer.file_descriptor_response.file_descriptor_proto]
    for file in sorted(files, key=lambda file: len(file.dependency)):
        pool.Add(file)
    service = pool.FindServiceByName(SERVICE_NAME)
    method = service.methods_by_name["ServerMetadata"]
    response_class = GetMessageClass(method.output_type)
    call = site.channel.unary_unary(
        f"/{service.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=response_class.FromString,
    )
    assert (await call(GetMessageClass(method.input_type)())).name == "aiorchestrator"
    assert response_class.DESCRIPTOR.full_name == "inference.ServerMetadataResponse"


async def test_reflection_of_unknown_symbol(site: SimpleNamespace) -> None:
    answer = await ask(reflect_v1(site), file_containing_symbol="aiorch.v2.ModelInferRequest")
    assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_reflection_shows_what_tritonclient_declares() -> None:
    """Same descriptors as tritonclient's under the same names, and nothing in the pool that everybody shares."""
    pool = build_pool()
    for name in ("grpc_service.proto", "model_config.proto"):
        ours, theirs = FileDescriptorProto(), FileDescriptorProto()
        pool.FindFileByName(name).CopyToProto(ours)
        triton_pb2.DESCRIPTOR.pool.FindFileByName(name).CopyToProto(theirs)
        assert {message.name: flatten(message) for message in ours.message_type} == {
            message.name: flatten(message) for message in theirs.message_type
        }
        assert ours.package == theirs.package
        assert list(ours.dependency) == list(theirs.dependency)
        assert describe_methods(ours) == describe_methods(theirs)
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindFileByName("grpc_reflection/v1/reflection.proto")


def describe_methods(file: FileDescriptorProto) -> list[Any]:
    return [
        (service.name, method.name, method.input_type, method.output_type, method.client_streaming)
        for service in file.service
        for method in service.method
    ]


def flatten(message: Any) -> Any:
    """A message's declaration as plain values, its fields by number."""
    fields = {
        field.number: (
            field.name,
            field.label,
            field.type,
            field.type_name,
            field.oneof_index if field.HasField("oneof_index") else None,
        )
        for field in message.field
    }
    return (
        fields,
        {nested.name: flatten(nested) for nested in message.nested_type},
        {enum.name: {value.name: value.number for value in enum.value} for enum in message.enum_type},
        [oneof.name for oneof in message.oneof_decl],
    )


async def test_stubs_of_our_own_files_work(site: SimpleNamespace) -> None:
    """Stubs generated from the published .proto files call the path of their package."""
    method = METHODS["ModelMetadata"]
    call = site.channel.unary_unary(
        f"/{PACKAGE_SERVICE_NAME}/{method.name}",
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )
    assert (await call(pb.ModelMetadataRequest(name="echo"))).platform == "identity"


async def test_unknown_method(site: SimpleNamespace) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await site.channel.unary_unary(f"/{SERVICE_NAME}/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_typed_contents(site: SimpleNamespace) -> None:
    request = pb.ModelInferRequest(model_name="echo")
    request.inputs.add(name="A", datatype="INT8", shape=[2]).contents.int_contents.extend([-1, 2])
    request.inputs.add(name="B", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"ab")
    response = await site.stub.ModelInfer(request)
    assert list(response.raw_output_contents) == [b"\xff\x02", b"\x02\0\0\0ab"]
    assert response.parameters["echoed"].bool_param is True


async def test_large_typed_contents(site: SimpleNamespace) -> None:
    request = pb.ModelInferRequest(model_name="echo")
    request.inputs.add(name="A", datatype="FP64", shape=[1 << 18]).contents.fp64_contents.extend([0.5] * (1 << 18))
    response = await site.stub.ModelInfer(request, timeout=TIMEOUT_S)
    assert len(response.raw_output_contents[0]) == 8 << 18
