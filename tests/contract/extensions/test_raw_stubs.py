"""Every call of the service by stubs that know nothing but the messages: grpcio's and grpclib's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpclib.client
import pytest
from aiorch_proto.v2.service import METHODS
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from running_site import SERVICE, TIMEOUT_S, decode_values, encode_values
from served import Served
from tritonclient.grpc import service_pb2 as pb

SERVING = health_pb2.HealthCheckResponse.SERVING
Unary = Callable[[str, Any, Any], Awaitable[Any]]
Stream = Callable[[str, list[Any], Any], Awaitable[list[Any]]]


@pytest.fixture(params=["grpcio", "grpclib"])
async def stubs(request: pytest.FixtureRequest, controlled: Served) -> AsyncIterator[tuple[Unary, Stream]]:
    """How to make a call of one answer and one of any number; refused calls give the status' name and text."""
    if request.param == "grpcio":
        async with grpc.aio.insecure_channel(controlled.grpc) as channel:

            async def ask(path: str, message: Any, answer: Any) -> Any:
                try:
                    call = channel.unary_unary(path, type(message).SerializeToString, answer.FromString)
                    return await call(message, timeout=TIMEOUT_S)
                except grpc.aio.AioRpcError as error:
                    return error.code().name, error.details()

            async def converse(path: str, messages: list[Any], answer: Any) -> list[Any]:
                call = channel.stream_stream(path, type(messages[0]).SerializeToString, answer.FromString)
                return [each async for each in call(iter(messages), timeout=TIMEOUT_S)]

            yield ask, converse
    else:
        host, _, port = controlled.grpc.rpartition(":")
        async with grpclib.client.Channel(host, int(port)) as other:

            async def ask(path: str, message: Any, answer: Any) -> Any:
                try:
                    method: Any = grpclib.client.UnaryUnaryMethod(other, path, type(message), answer)
                    return await method(message, timeout=TIMEOUT_S)
                except grpclib.GRPCError as error:
                    return error.status.name, error.message

            async def converse(path: str, messages: list[Any], answer: Any) -> list[Any]:
                method: Any = grpclib.client.StreamStreamMethod(other, path, type(messages[0]), answer)
                return list(await method(messages, timeout=TIMEOUT_S))

            yield ask, converse


def infer(model: str = "identity") -> Any:
    return pb.ModelInferRequest.FromString(encode_values([1.5, -2.0], model))


def list_calls(key: str) -> list[tuple[str, dict[str, Any], Callable[[Any], Any]]]:
    """Each call, its request's fields, and what is true of the answer; in an order in which each has work to do."""
    config = {"config": pb.ModelRepositoryParameter(string_param='{"backend": "identity", "max_batch_size": 3}')}
    rate = {"trace_rate": pb.TraceSettingRequest.SettingValue(value=["9"])}
    verbose = {"log_verbose_level": pb.LogSettingsRequest.SettingValue(uint32_param=0)}
    region = {"name": "raw", "key": key, "byte_size": 64}
    return [
        ("ServerLive", {}, lambda a: a.live),
        ("ServerReady", {}, lambda a: a.ready),
        ("ModelReady", {"name": "identity", "version": "1"}, lambda a: a.ready),
        ("ModelReady", {"name": "nobody"}, lambda a: a == pb.ModelReadyResponse(ready=False)),
        ("ServerMetadata", {}, lambda a: a.name == "aiorchestrator" and "statistics" in a.extensions),
        ("ModelMetadata", {"name": "identity"}, lambda a: list(a.inputs[0].shape) == [-1, -1]),
        ("ModelConfig", {"name": "identity"}, lambda a: a.config.max_batch_size == 8),
        ("ModelConfig", {"name": "nobody"}, lambda a: a[0] == "INVALID_ARGUMENT"),
        ("ModelStatistics", {"name": "identity"}, lambda a: a.model_stats[0].version == "1"),
        ("RepositoryModelLoad", {"model_name": "column", "parameters": config}, lambda a: not a.ListFields()),
        ("RepositoryIndex", {"ready": True}, lambda a: "column" in {model.name for model in a.models}),
        ("RepositoryModelUnload", {"model_name": "column"}, lambda a: not a.ListFields()),
        ("RepositoryIndex", {"ready": True}, lambda a: "column" not in {model.name for model in a.models}),
        ("SystemSharedMemoryRegister", region, lambda a: not a.ListFields()),
        ("SystemSharedMemoryStatus", {"name": "raw"}, lambda a: a.regions["raw"].byte_size == 64),
        ("SystemSharedMemoryUnregister", {"name": "raw"}, lambda a: not a.ListFields()),
        ("SystemSharedMemoryStatus", {"name": "raw"}, lambda a: a[0] == "NOT_FOUND"),
        ("CudaSharedMemoryRegister", {"name": "raw", "byte_size": 64}, lambda a: a[0] == "UNAVAILABLE"),
        ("CudaSharedMemoryStatus", {}, lambda a: not a.regions),
        ("CudaSharedMemoryUnregister", {}, lambda a: not a.ListFields()),
        ("TraceSetting", {"settings": rate, "model_name": "text"}, lambda a: a.settings["trace_rate"].value == ["9"]),
        ("LogSettings", {"settings": verbose}, lambda a: a.settings["log_verbose_level"].uint32_param == 0),
    ]


@pytest.mark.proves("GRPCInferenceService/*", by=("grpcio", "grpclib"))
async def test_every_call(stubs: tuple[Unary, Stream], new_key: Callable[[str], str]) -> None:
    ask, converse = stubs
    key = new_key("raw")
    Path("/dev/shm", key[1:]).write_bytes(bytes(64))
    asked = {"ModelInfer", "ModelStreamInfer"}
    for name, fields, is_right in list_calls(key):
        asked.add(name)
        answer = await ask(
            f"/{SERVICE}/{name}", getattr(pb, f"{name}Request")(**fields), getattr(pb, f"{name}Response")
        )
        assert is_right(answer), (name, fields, answer)
    assert asked == set(METHODS)
    answer = await ask(f"/{SERVICE}/ModelInfer", infer(), pb.ModelInferResponse)
    assert decode_values(answer.SerializeToString()) == [1.5, -2.0]
    requests = [infer(), infer("nobody"), infer()]
    answers = await converse(f"/{SERVICE}/ModelStreamInfer", requests, pb.ModelStreamInferResponse)
    assert [bool(each.error_message) for each in answers] == [False, True, False]
    assert decode_values(answers[2].infer_response.SerializeToString()) == [1.5, -2.0]


@pytest.mark.proves("Health/Check", "ServerReflection/*", by=("grpcio", "grpclib"))
async def test_what_every_server_has(stubs: tuple[Unary, Stream]) -> None:
    ask, converse = stubs
    for name in ("", SERVICE):
        request = health_pb2.HealthCheckRequest(service=name)
        assert (await ask("/grpc.health.v1.Health/Check", request, health_pb2.HealthCheckResponse)).status == SERVING
    request = health_pb2.HealthCheckRequest(service="nobody")
    assert (await ask("/grpc.health.v1.Health/Check", request, health_pb2.HealthCheckResponse))[0] == "NOT_FOUND"
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    for version in ("v1", "v1alpha"):
        path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
        (answer,) = await converse(path, [question], reflection_pb2.ServerReflectionResponse)
        assert SERVICE in {each.name for each in answer.list_services_response.service}
