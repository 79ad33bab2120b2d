"""Every RPC with NVIDIA's clients, the synchronous and the asyncio one."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from aiorch_proto.v2 import inference_pb2 as pb
from ml_dtypes import bfloat16
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

TIMEOUT_S = 20.0


class InThread:
    """The synchronous client with its calls made awaitable on threads, so that both clients share the tests."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            return await asyncio.wait_for(asyncio.to_thread(method, *arguments, **options), TIMEOUT_S)

        return call


@pytest.fixture(params=["sync", "aio"])
async def client(request: pytest.FixtureRequest, site: SimpleNamespace) -> AsyncIterator[Any]:
    if request.param == "sync":
        with triton.InferenceServerClient(site.url) as client:
            yield InThread(client)
    else:
        async with triton_aio.InferenceServerClient(site.url) as client:
            yield client


async def refuse(call: Any, status: str) -> str:
    with pytest.raises(InferenceServerException) as caught:
        await call
    assert caught.value.status() == f"StatusCode.{status}"
    return str(caught.value.message())


@pytest.mark.proves("ServerLive", "ServerReady", "ModelReady", by="tritonclient.grpc*")
async def test_health(site: SimpleNamespace, client: Any) -> None:
    assert await client.is_server_live() is True
    assert await client.is_server_ready() is True
    site.controlplane.ready = False
    assert await client.is_server_ready() is False
    assert await client.is_model_ready("echo") is True
    assert await client.is_model_ready("echo", "7") is True
    assert await client.is_model_ready("echo", "8") is False


@pytest.mark.proves("ServerMetadata", by="tritonclient.grpc*")
async def test_server_metadata(client: Any) -> None:
    metadata = await client.get_server_metadata()
    assert (metadata.name, metadata.version) == ("aiorchestrator", "0.1.0")
    assert list(metadata.extensions) == ["statistics", "model_repository"]


@pytest.mark.proves("ModelMetadata", by="tritonclient.grpc*")
async def test_model_metadata(client: Any) -> None:
    metadata = await client.get_model_metadata("echo", as_json=True)
    assert metadata == {
        "name": "echo",
        "versions": ["7"],
        "platform": "identity",
        "inputs": [{"name": "A", "datatype": "FP32", "shape": ["-1", "4"]}],
        "outputs": [{"name": "OUT_A", "datatype": "FP32", "shape": ["-1", "4"]}],
    }
    assert "unknown model: 'x'" in await refuse(client.get_model_metadata("x"), "INVALID_ARGUMENT")


@pytest.mark.proves("ModelConfig", by="tritonclient.grpc*")
async def test_model_config(client: Any) -> None:
    config = (await client.get_model_config("echo", "7")).config
    assert (config.name, config.backend, config.max_batch_size) == ("echo", "identity", 8)
    assert config.input[0].data_type == 11
    assert list(config.input[0].dims) == [4]
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (2, 2)
    assert config.dynamic_batching.max_queue_delay_microseconds == 100
    assert config.parameters["version_label.blue"].string_value == "3"


@pytest.mark.proves("ModelStatistics", by="tritonclient.grpc*")
@pytest.mark.parametrize("name", ["echo", ""])
async def test_statistics(client: Any, name: str) -> None:
    statistics = (await client.get_inference_statistics(name)).model_stats
    assert len(statistics) == 1
    model = statistics[0]
    assert (model.name, model.version, model.last_inference) == ("echo", "7", 1_700_000_000_123)
    assert (model.inference_count, model.execution_count) == (6, 2)
    phases = model.inference_stats
    assert (phases.success.count, phases.success.ns, phases.fail.count, phases.fail.ns) == (3, 300, 1, 10)
    assert [
        (phase.count, phase.ns)
        for phase in (phases.queue, phases.compute_input, phases.compute_infer, phases.compute_output)
    ] == [(3, 30), (3, 31), (3, 32), (3, 33)]
    assert phases.HasField("cache_hit")
    assert phases.HasField("cache_miss")
    batch = model.batch_stats[0]
    assert (batch.batch_size, batch.compute_input.ns, batch.compute_infer.ns, batch.compute_output.ns) == (3, 1, 2, 3)
    assert batch.compute_infer.count == 2


@pytest.mark.proves("Repository*", by="tritonclient.grpc*")
async def test_repository(site: SimpleNamespace, client: Any) -> None:
    index = await client.get_model_repository_index(as_json=True)
    assert index == {
        "models": [
            {"name": "echo", "version": "7", "state": "READY"},
            {"name": "gone", "state": "UNAVAILABLE", "reason": "unloaded"},
        ]
    }
    await client.load_model("echo")
    await client.load_model("echo", config='{"backend": "x"}', files={"file:1/model.onnx": b"\x00\x01"})
    await client.unload_model("echo")
    await client.unload_model("echo", unload_dependents=True)
    assert site.controlplane.loads == [("echo", None, {}), ("echo", '{"backend": "x"}', {"1/model.onnx": b"\x00\x01"})]
    assert site.controlplane.unloads == [("echo", False), ("echo", True)]


async def test_shared_memory(client: Any) -> None:
    assert len((await client.get_system_shared_memory_status()).regions) == 0
    assert len((await client.get_cuda_shared_memory_status()).regions) == 0
    await client.unregister_system_shared_memory()
    await client.unregister_cuda_shared_memory()
    text = await refuse(client.register_system_shared_memory("r", "/key", 64), "UNIMPLEMENTED")
    assert text.startswith("Client shared memory is disabled.")
    text = await refuse(client.register_cuda_shared_memory("r", b"aGFuZGxl", 0, 64), "UNAVAILABLE")
    assert "this server has no GPU" in text


ARRAYS = {
    "BOOL": np.array([[True, False]]),
    "UINT8": np.array([[0, 255]], np.uint8),
    "UINT16": np.array([[0, 65535]], np.uint16),
    "UINT32": np.array([[0, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 127]], np.int8),
    "INT16": np.array([[-32768, 32767]], np.int16),
    "INT32": np.array([[-1, 2**31 - 1]], np.int32),
    "INT64": np.array([[-1, 2**63 - 1]], np.int64),
    "FP16": np.array([[0.5, -np.inf]], np.float16),
    "FP32": np.array([[0.5, -np.inf]], np.float32),
    "FP64": np.array([[0.5, 1e300]], np.float64),
    "BYTES": np.array([[b"", b"\xff\x00text"]], np.object_),
    "BF16": np.array([[0.5, -2.0]], bfloat16),
}


def build_input(name: str, datatype: str) -> Any:
    array = ARRAYS[datatype]
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


@pytest.mark.proves("ModelInfer", by="tritonclient.grpc*")
@pytest.mark.parametrize("datatype", sorted(ARRAYS))
async def test_infer(site: SimpleNamespace, client: Any, datatype: str) -> None:
    result = await client.infer("echo", [build_input("A", datatype)], request_id="r-1", model_version="7")
    assert result.get_response().id == "r-1"
    assert result.get_response().model_version == "7"
    answer = result.as_numpy("OUT_A")
    np.testing.assert_array_equal(answer, ARRAYS[datatype])
    assert np_to_triton_dtype(answer.dtype) == datatype


@pytest.mark.proves("ModelInfer", by="tritonclient.grpc*")
async def test_infer_many_tensors_and_parameters(site: SimpleNamespace, client: Any) -> None:
    inputs = [build_input(datatype, datatype) for datatype in ARRAYS]
    outputs = [triton.InferRequestedOutput("OUT_FP32", class_count=3), triton.InferRequestedOutput("OUT_INT8")]
    result = await client.infer(
        "echo",
        inputs,
        outputs=outputs,
        priority=2,
        timeout=1000,
        sequence_id=5,
        sequence_start=True,
        parameters={"mine": "value"},
    )
    for datatype, array in ARRAYS.items():
        np.testing.assert_array_equal(result.as_numpy(f"OUT_{datatype}"), array)
    request = site.dataplane.requests[0]
    assert [(output.name, dict(output.parameters)) for output in request.outputs] == [
        ("OUT_FP32", {"classification": 3}),
        ("OUT_INT8", {}),
    ]
    assert {key: request.parameters[key] for key in ("priority", "timeout", "sequence_id", "mine")} == {
        "priority": 2,
        "timeout": 1000,
        "sequence_id": 5,
        "mine": "value",
    }
    assert request.parameters["sequence_start"] is True


async def test_infer_with_compression_and_large_tensors(site: SimpleNamespace, client: Any) -> None:
    array = np.arange(1 << 20, dtype=np.float32)
    tensor = triton.InferInput("A", [1 << 20], "FP32")
    tensor.set_data_from_numpy(array)
    for algorithm in (None, "gzip", "deflate"):
        result = await client.infer("echo", [tensor], compression_algorithm=algorithm)
        np.testing.assert_array_equal(result.as_numpy("OUT_A"), array)


async def test_infer_refused(client: Any) -> None:
    tensor = build_input("A", "FP32")
    text = await refuse(client.infer("nobody", [tensor]), "INVALID_ARGUMENT")
    assert text == "Request for unknown model: 'nobody' is not found"
    assert await refuse(client.infer("broken", [tensor], request_id="4"), "INTERNAL") == (
        "[request id: 4] the model said no"
    )


async def test_many_clients_at_once(site: SimpleNamespace) -> None:
    """Nobody gets another's answer."""
    async with triton_aio.InferenceServerClient(site.url) as client:

        async def ask(number: int) -> None:
            array = np.full((1, 3), number, np.int64)
            tensor = triton.InferInput("A", [1, 3], "INT64")
            tensor.set_data_from_numpy(array)
            result = await client.infer("echo", [tensor], request_id=str(number))
            assert result.get_response().id == str(number)
            np.testing.assert_array_equal(result.as_numpy("OUT_A"), array)

        await asyncio.gather(*(ask(number) for number in range(64)))


# -------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.proves("ModelStreamInfer", by="tritonclient.grpc")
async def test_stream_sync_client(site: SimpleNamespace) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def run() -> list[tuple[Any, Any]]:
        with triton.InferenceServerClient(site.url) as client:
            client.start_stream(callback=lambda result, error: answers.put((result, error)))
            for number in range(20):
                model = "broken" if number == 5 else "backwards"
                client.async_stream_infer(model, [build_input("A", "FP32")], request_id=str(number))
            collected = [answers.get(timeout=TIMEOUT_S) for _ in range(20)]
            client.stop_stream()
            return collected

    collected = await asyncio.to_thread(run)
    assert [error is not None for _, error in collected] == [number == 5 for number in range(20)]
    assert str(collected[5][1]) == "[request id: 5] the model said no"
    for number, (result, _) in enumerate(collected):
        if number != 5:
            response = result.get_response()
            assert response.id == str(number)
            assert response.parameters["triton_final_response"].bool_param is True
            np.testing.assert_array_equal(result.as_numpy("OUT_A"), ARRAYS["FP32"])
    assert site.dataplane.most_running > 1


@pytest.mark.proves("ModelStreamInfer", by="tritonclient.grpc.aio")
async def test_stream_aio_client(site: SimpleNamespace) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number in range(20):
            model = "broken" if number == 5 else "backwards"
            yield {"model_name": model, "inputs": [build_input("A", "BYTES")], "request_id": str(number)}

    async with triton_aio.InferenceServerClient(site.url) as client:
        collected = [answer async for answer in client.stream_infer(requests())]
    assert [error is not None for _, error in collected] == [number == 5 for number in range(20)]
    assert [result.get_response().id for result, error in collected if error is None] == [
        str(number) for number in range(20) if number != 5
    ]


async def test_stream_error_keeps_the_id(site: SimpleNamespace) -> None:
    """The clients drop the id of a failed request, the wire does not."""
    call = site.stub.ModelStreamInfer(iter([pb.ModelInferRequest(model_name="nobody", id="x")]))
    responses = [response async for response in call]
    assert responses[0].infer_response.id == "x"
    assert responses[0].infer_response.parameters["triton_final_response"].bool_param is True
    assert responses[0].error_message == "Request for unknown model: 'nobody' is not found"


async def test_stream_error_closes_on_request(site: SimpleNamespace) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "broken", "inputs": [build_input("A", "FP32")], "request_id": "1"}

    async with triton_aio.InferenceServerClient(site.url) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # this client lets grpc's own error through here
            async for _ in client.stream_infer(requests(), headers={"triton_grpc_error": "true"}):
                raise AssertionError("nothing was to come")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == "[request id: 1] the model said no"
