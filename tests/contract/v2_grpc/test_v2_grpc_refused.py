"""Cancelled, broken and malformed first: the client gets code and text, nothing leaks, the server lives on."""

from __future__ import annotations

import asyncio
import logging
import time
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import METHODS, InferenceStub

from aiorch_server.frontends.grpc.stream import MAX_IN_FLIGHT

TIMEOUT_S = 20.0


def build(model: str = "echo", id: str = "1", data: bytes = b"1234") -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, id=id, raw_input_contents=[data])
    request.inputs.add(name="A", datatype="FP32", shape=[1])
    return request


async def refuse(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, TIMEOUT_S)
    return caught.value.code(), caught.value.details()


async def check_alive(site: SimpleNamespace) -> None:
    response = await site.stub.ModelInfer(build(), timeout=TIMEOUT_S)
    assert list(response.raw_output_contents) == [b"1234"]


async def test_cancelled_call_cancels_the_request(site: SimpleNamespace) -> None:
    call = site.stub.ModelInfer(build("slow"))
    await site.dataplane.wait_until(lambda: site.dataplane.running == 1)
    call.cancel()
    await site.dataplane.wait_cancelled(1)
    await check_alive(site)


async def test_deadline_reaches_the_data_plane(site: SimpleNamespace) -> None:
    now_ns = time.monotonic_ns()
    code, _ = await refuse(site.stub.ModelInfer(build("slow"), timeout=0.5))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await site.dataplane.wait_cancelled(1)
    # the client sends what is left of its time in whole milliseconds
    assert now_ns + 200e6 < site.dataplane.deadlines_ns[0] < time.monotonic_ns() + 10e6
    await site.stub.ModelInfer(build())
    assert site.dataplane.deadlines_ns[1] == 0


async def test_cancelled_stream_cancels_all_in_flight(site: SimpleNamespace) -> None:
    call = site.stub.ModelStreamInfer()
    for index in range(10):
        await call.write(build("slow", str(index)))
    await site.dataplane.wait_until(lambda: site.dataplane.running == 10)
    call.cancel()
    await site.dataplane.wait_cancelled(10)
    await check_alive(site)


async def test_disconnected_client_cancels_its_stream(site: SimpleNamespace) -> None:
    channel = grpc.aio.insecure_channel(site.url, options=[("grpc.use_local_subchannel_pool", 1)])
    call = InferenceStub(channel).ModelStreamInfer()
    for index in range(3):
        await call.write(build("slow", str(index)))
    await site.dataplane.wait_until(lambda: site.dataplane.running == 3)
    await channel.close()
    await site.dataplane.wait_cancelled(3)
    await check_alive(site)


async def test_stream_is_bounded(site: SimpleNamespace) -> None:
    """More requests than may be in flight, none of which finishes: no more than the bound run."""
    call = site.stub.ModelStreamInfer()
    total = MAX_IN_FLIGHT + 16
    for index in range(total):
        await call.write(build("slow", str(index)))
    await call.done_writing()
    await site.dataplane.wait_until(lambda: site.dataplane.running == MAX_IN_FLIGHT)
    site.dataplane.release.set()
    ids = [response.infer_response.id async for response in call]
    assert ids == [str(index) for index in range(total)]
    assert site.dataplane.most_running == MAX_IN_FLIGHT


async def test_cancellation_inside_the_server_is_answered(site: SimpleNamespace) -> None:
    code, text = await refuse(site.stub.ModelInfer(build("dropped")))
    assert (code, text) == (grpc.StatusCode.CANCELLED, "the request was cancelled inside the server")
    call = site.stub.ModelStreamInfer(iter([build("dropped", "1"), build("echo", "2")]))
    responses = [response async for response in call]
    assert [response.error_message for response in responses] == ["the request was cancelled inside the server", ""]


async def test_model_error(site: SimpleNamespace) -> None:
    code, text = await refuse(site.stub.ModelInfer(build("broken", "9")))
    assert (code, text) == (grpc.StatusCode.INTERNAL, "[request id: 9] the model said no")
    await check_alive(site)


async def test_bug_is_logged_not_told(site: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert await refuse(site.stub.ModelInfer(build("buggy"))) == (grpc.StatusCode.INTERNAL, "internal error")
    assert "secret of the house" in caplog.text
    await check_alive(site)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.is_streaming])
async def test_malformed_message(site: SimpleNamespace, name: str) -> None:
    method = METHODS[name]
    call = site.channel.unary_unary(method.path)(b"\x0a\xff\xff\xff", timeout=TIMEOUT_S)
    code, text = await refuse(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text == f"the 4 bytes of the request are not a valid {method.request.DESCRIPTOR.name} message"
    await check_alive(site)


async def test_malformed_message_in_a_stream_fails_alone(site: SimpleNamespace) -> None:
    messages = [build("echo", "1").SerializeToString(), b"\xff\xff", build("echo", "3").SerializeToString()]
    call = site.channel.stream_stream(METHODS["ModelStreamInfer"].path)(iter(messages))
    responses = [pb.ModelStreamInferResponse.FromString(data) async for data in call]
    assert [response.infer_response.id for response in responses] == ["1", "", "3"]
    assert responses[1].error_message == "the 2 bytes of the request are not a valid ModelInferRequest message"
    assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda r: r.inputs[0].contents.fp32_contents.append(1),
            "contents field must not be specified when using raw_input_contents for 'A' for model 'echo'",
        ),
        (
            lambda r: r.ClearField("raw_input_contents"),
            "unable to find data for input tensor 'A' for model 'echo' in request.",
        ),
        (
            lambda r: r.raw_input_contents.append(b""),
            "expected 1 raw_input_contents but got 2 for model 'echo': one for each input that is not in shared memory",
        ),
    ],
    ids=["both", "none", "surplus"],
)
async def test_contents(site: SimpleNamespace, change: Any, text: str) -> None:
    request = build()
    change(request)
    assert await refuse(site.stub.ModelInfer(request)) == (grpc.StatusCode.INVALID_ARGUMENT, text)
    assert site.dataplane.requests == []
    await check_alive(site)


async def test_unknown_model(site: SimpleNamespace) -> None:
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "Request for unknown model: 'nobody' is not found")
    assert await refuse(site.stub.ModelInfer(build("nobody"))) == expected
    assert await refuse(site.stub.ModelMetadata(pb.ModelMetadataRequest(name="nobody"))) == expected
    assert await refuse(site.stub.ModelConfig(pb.ModelConfigRequest(name="nobody"))) == expected
    code, text = await refuse(site.stub.ModelStatistics(pb.ModelStatisticsRequest(name="nobody")))
    assert (code, text) == (grpc.StatusCode.INVALID_ARGUMENT, "requested model 'nobody' is not available")


async def test_unknown_version(site: SimpleNamespace) -> None:
    code, text = await refuse(site.stub.ModelMetadata(pb.ModelMetadataRequest(name="echo", version="9")))
    assert (code, text) == (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'echo' version 9 is not found")


async def test_stopping_server(site: SimpleNamespace) -> None:
    site.controlplane.live = False
    assert await refuse(site.stub.ServerLive(pb.ServerLiveRequest())) == (
        grpc.StatusCode.UNAVAILABLE,
        "Server exiting",
    )


async def test_long_error_text_arrives(site: SimpleNamespace) -> None:
    code, text = await refuse(site.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="bad")))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text.startswith("failed to load 'bad', failed to poll from model repository\nlong reason é ")
    assert text.endswith(" [...]")


@pytest.mark.parametrize("name", ["RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"])
async def test_repository_name(site: SimpleNamespace, name: str) -> None:
    request = METHODS[name].request(repository_name="r")
    code, text = await refuse(getattr(site.stub, name)(request))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert text == "'repository_name' specification is not supported, expected it to be empty, got 'r'"


async def test_stream_error_with_status(site: SimpleNamespace) -> None:
    """With triton_grpc_error the first error ends the stream, and what runs behind it is cancelled."""
    call = site.stub.ModelStreamInfer(metadata=(("triton_grpc_error", "true"),))
    for request in (build("echo", "1"), build("broken_beside", "2"), build("slow", "3")):
        await call.write(request)
    first = await call.read()
    assert (first.infer_response.id, first.error_message) == ("1", "")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call.read(), TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == "[request id: 2] the model said no"
    await site.dataplane.wait_until(lambda: not site.dataplane.running)
    await check_alive(site)


async def test_stream_of_unknown_metadata_stays_open(site: SimpleNamespace) -> None:
    call = site.stub.ModelStreamInfer(
        iter([build("broken", "1"), build("echo", "2")]), metadata=(("triton_grpc_error", "false"),)
    )
    responses = [response async for response in call]
    assert [bool(response.error_message) for response in responses] == [True, False]
    assert await call.code() is grpc.StatusCode.OK
