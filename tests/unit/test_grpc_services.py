"""What stands in for the package grpc in the native door is what grpc has, field by field."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from aiorch_server.errors import Code
from aiorch_server.frontends.grpc import Compression, GrpcDoor, NativeGrpcServer
from aiorch_server.frontends.grpc.context import ServicerContext
from aiorch_server.frontends.grpc.descriptors import build_pool
from aiorch_server.frontends.grpc.embedded import GrpcServicerContext
from aiorch_server.frontends.grpc.health import HealthService
from aiorch_server.frontends.grpc.methods import RpcMethod, RpcService
from aiorch_server.frontends.grpc.reflection import ReflectionService
from aiorch_server.frontends.grpc.servicer import InferenceServicer
from aiorch_server.frontends.grpc.status import to_status
from aiorch_server.types import FINAL_RESPONSE, InferenceResponse

SERVICES = ("grpc.health.v1.Health", "inference.GRPCInferenceService")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
TIMEOUT_S = 10.0


def test_compressions_are_numbered_as_grpcs() -> None:
    assert [int(each) for each in Compression] == sorted(int(each) for each in grpc.Compression)
    for ours, theirs in (("GZIP", "Gzip"), ("DEFLATE", "Deflate"), ("NONE", "NoCompression")):
        assert Compression[ours] == grpc.Compression[theirs]


def test_a_status_is_grpcs_where_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_status(Code.UNAUTHENTICATED) is grpc.StatusCode.UNAUTHENTICATED
    monkeypatch.setitem(sys.modules, "grpc", None)
    assert to_status(Code.UNAUTHENTICATED) is Code.UNAUTHENTICATED


def test_methods_have_the_fields_of_grpcs_handlers() -> None:
    def answer(request: Any, context: Any) -> None: ...

    theirs: Any = grpc.unary_stream_rpc_method_handler(answer, int, str)
    ours = RpcMethod(False, True, int, str, unary_stream=answer)
    assert ours._asdict() == {name: getattr(theirs, name) for name in ours._fields}
    assert set(ours._fields) == set(theirs._fields)
    service = RpcService("a.B", {"C": ours})
    assert service.service_name() == grpc.method_handlers_generic_handler("a.B", {}).service_name()
    assert service.service(SimpleNamespace(method="/a.B/C")) is ours
    assert service.service(SimpleNamespace(method="/a.B/D")) is None


def test_only_the_embedded_door_is_grpcs() -> None:
    assert issubclass(NativeGrpcServer, grpc.aio.Server) and issubclass(GrpcServicerContext, grpc.aio.ServicerContext)
    assert not issubclass(GrpcDoor, grpc.aio.Server) and not issubclass(ServicerContext, grpc.aio.ServicerContext)
    surface = {name for name in vars(grpc.aio.ServicerContext) if not name.startswith("_")}
    assert surface <= set(dir(ServicerContext))
    assert {name for name in vars(grpc.aio.Server) if not name.startswith("_")} <= set(dir(GrpcDoor))


EXTENSION = reflection_pb2.ExtensionRequest(containing_type="inference.ModelInferRequest", extension_number=7)
QUESTIONS = [
    {},
    {"list_services": ""},
    {"list_services": "anything", "host": "there"},
    {"file_by_filename": "grpc_service.proto"},
    {"file_by_filename": "grpc_health/v1/health.proto"},
    {"file_by_filename": "aiorch/v2/inference.proto"},
    {"file_containing_symbol": "inference.GRPCInferenceService"},
    {"file_containing_symbol": "inference.GRPCInferenceService.ModelInfer"},
    {"file_containing_symbol": "inference.ModelInferRequest.InferInputTensor"},
    {"file_containing_symbol": "nobody"},
    {"file_containing_symbol": ""},
    {"file_containing_extension": EXTENSION},
    {"file_containing_extension": reflection_pb2.ExtensionRequest(containing_type="nobody", extension_number=7)},
    {"all_extension_numbers_of_type": "inference.ModelInferRequest"},
    {"all_extension_numbers_of_type": "nobody"},
]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return reflection.aio.ReflectionServicer(SERVICES, pool=build_pool())


@pytest.mark.parametrize("question", QUESTIONS, ids=str)
async def test_reflection_answers_as_grpcio_reflection(theirs: Any, question: dict[str, Any]) -> None:
    request = reflection_pb2.ServerReflectionRequest(**question)

    async def ask(message: Any) -> Any:
        yield message

    expected = [answer async for answer in theirs.ServerReflectionInfo(ask(request), None)]
    answers = ReflectionService(SERVICES[::-1]).reflect(ask(request.SerializeToString()), None)
    got = [reflection_pb2.ServerReflectionResponse.FromString(answer) async for answer in answers]
    for answer in expected + got:
        # which of the imported files comes first is nobody's business
        files = answer.file_descriptor_response.file_descriptor_proto
        if files:
            files[1:] = sorted(files[1:])
    assert got == expected
    assert len(got) == 1


async def test_health_watch_tells_each_status_once_and_the_last_for_sure() -> None:
    service = HealthService()
    watched = service.watch(health_pb2.HealthCheckRequest(service="").SerializeToString(), None)
    unknown = service.watch(health_pb2.HealthCheckRequest(service="nobody").SerializeToString(), None)
    assert (await anext(watched)).status == NOT_SERVING
    assert (await anext(unknown)).status == SERVICE_UNKNOWN
    await service.set_serving(True)
    await service.set_serving(True)
    assert (await anext(watched)).status == SERVING
    for is_serving in (False, True, False):  # while nobody looks
        await service.set_serving(is_serving)
    assert (await anext(watched)).status == NOT_SERVING
    silent = [asyncio.ensure_future(anext(each)) for each in (watched, unknown)]
    await service.set_serving(False)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(each.done() for each in silent)
    await service.set_serving(True)
    assert (await asyncio.wait_for(silent[0], TIMEOUT_S)).status == SERVING
    silent[1].cancel()
    await asyncio.gather(*silent, return_exceptions=True)


async def test_a_stream_whose_client_has_just_gone_ends_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """The call is over before the task that answers is told."""
    is_over = asyncio.Event()

    async def stream(request: Any, deadline_ns: int) -> AsyncGenerator[InferenceResponse, None]:
        is_over.set()
        yield InferenceResponse("m", "1", [], request.id, {FINAL_RESPONSE: True})

    async def write(message: bytes) -> None:
        raise ServicerContext.usage_error("the RPC is over")

    async def read() -> AsyncIterator[bytes]:
        yield pb.ModelInferRequest(model_name="m", id="1").SerializeToString()

    context = SimpleNamespace(
        done=is_over.is_set,
        write=write,
        invocation_metadata=tuple,
        time_remaining=lambda: None,
    )
    dataplane: Any = SimpleNamespace(is_decoupled=lambda *_: False, stream=stream)

    async def bring(name: str, version: str, *, deadline_ns: int) -> bool:
        return False

    controlplane: Any = SimpleNamespace(check_running=lambda text: None, bring=bring)
    await asyncio.wait_for(InferenceServicer(dataplane, controlplane).ModelStreamInfer(read(), context), TIMEOUT_S)
    assert not caplog.records
