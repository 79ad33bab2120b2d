"""Unmodified tritonclient.http, in both forms, against the REST door."""

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from aiorch_server.errors import ModelNotReady
from aiorch_server.types import Tensor

MODEL = "echo"
#: The synchronous client runs on gevent, whose event loop belongs to the thread: all its calls share one.
GEVENT_THREAD = ThreadPoolExecutor(1, thread_name_prefix="gevent")
ARRAYS = {
    "BOOL": np.array([[True, False, True]]),
    "UINT8": np.array([0, 255], np.uint8),
    "UINT16": np.array([0, 65535], np.uint16),
    "UINT32": np.array([0, 2**32 - 1], np.uint32),
    "UINT64": np.array([0, 2**64 - 1, 2**53 + 1], np.uint64),
    "INT8": np.array([-128, 127], np.int8),
    "INT16": np.array([-(2**15), 2**15 - 1], np.int16),
    "INT32": np.array([[-(2**31)], [2**31 - 1]], np.int32),
    "INT64": np.array([-(2**63), 2**63 - 1, 2**53 + 1], np.int64),
    "FP16": np.array([0.5, -1.0, np.inf], np.float16),
    "FP32": np.array([[0.1, -1e38, 3.0]], np.float32),
    "FP64": np.array([0.1, -1e300, 5e-324], np.float64),
    "BYTES": np.array([[b"", "grün 漢字".encode(), b"a\nb\x00c"]], dtype=np.object_),
    "BF16": np.array([1.5, -2.0], ml_dtypes.bfloat16),
}
JSON_DATATYPES = sorted(ARRAYS.keys() - {"FP16", "BF16"})


def make_input(datatype: str, array: np.ndarray, *, binary: bool, name: str = "IN") -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    return tensor.set_data_from_numpy(array, binary_data=binary)


async def call_sync(url: str, call: Callable[[triton.InferenceServerClient], Any]) -> Any:
    def run() -> Any:
        with triton.InferenceServerClient(url) as client:
            return call(client)

    return await asyncio.get_running_loop().run_in_executor(GEVENT_THREAD, run)


@pytest.mark.proves("ModelInfer", by="tritonclient.http")
@pytest.mark.parametrize("datatype", sorted(ARRAYS.keys() - {"BF16"}))
async def test_every_datatype_round_trips_as_binary(door, datatype):
    array = ARRAYS[datatype]
    tensor = make_input(datatype, array, binary=True)
    result = await call_sync(door.url, lambda client: client.infer(MODEL, [tensor]))
    got = result.as_numpy("IN")
    assert got.dtype == array.dtype and got.shape == array.shape
    assert got.tolist() == array.tolist()


async def test_bf16_bytes_are_untouched(door):
    array = ARRAYS["BF16"]
    async with triton_aio.InferenceServerClient(door.url) as client:
        result = await client.infer(MODEL, [make_input("BF16", array, binary=True)])
    assert result.get_output("IN")["datatype"] == "BF16"
    assert bytes(result._buffer) == array.tobytes()


@pytest.mark.parametrize("datatype", JSON_DATATYPES)
async def test_every_json_datatype_round_trips_as_json(door, datatype):
    array = ARRAYS[datatype]
    tensor = make_input(datatype, array, binary=False)
    wanted = [triton.InferRequestedOutput("IN", binary_data=False)]
    result = await call_sync(door.url, lambda client: client.infer(MODEL, [tensor], outputs=wanted))
    assert "data" in result.get_output("IN")
    got = result.as_numpy("IN").tolist()
    expected = array.tolist()
    if datatype == "BYTES":
        expected = [[element.decode() for element in row] for row in expected]
    assert got == expected


async def test_nan_and_infinities_round_trip_as_json(door):
    array = np.array([np.nan, np.inf, -np.inf], np.float32)
    wanted = [triton.InferRequestedOutput("IN", binary_data=False)]
    tensor = make_input("FP32", array, binary=False)
    result = await call_sync(door.url, lambda client: client.infer(MODEL, [tensor], outputs=wanted))
    got = result.as_numpy("IN").tolist()
    assert math.isnan(got[0]) and got[1:] == [math.inf, -math.inf]


@pytest.mark.parametrize("binary", [True, False])
async def test_empty_tensors(door, binary):
    for datatype in ("FP32", "BYTES"):
        array = np.zeros((2, 0), np.float32 if datatype == "FP32" else np.object_)
        tensor = make_input(datatype, array, binary=binary)
        wanted = [triton.InferRequestedOutput("IN", binary_data=binary)]
        result = await call_sync(door.url, lambda client, t=tensor, w=wanted: client.infer(MODEL, [t], outputs=w))
        assert result.as_numpy("IN").shape == (2, 0)


async def test_several_inputs_mixed_forms_and_requested_outputs(door):
    a, b = np.arange(6, dtype=np.int64).reshape(2, 3), np.array([b"x", b"yy"], np.object_)
    inputs = [
        make_input("INT64", a, binary=True, name="A"),
        make_input("FP32", ARRAYS["FP32"], binary=False, name="J"),
        make_input("BYTES", b, binary=True, name="B"),
    ]
    wanted = [
        triton.InferRequestedOutput("B", binary_data=True),
        triton.InferRequestedOutput("A", binary_data=False),
    ]
    async with triton_aio.InferenceServerClient(door.url) as client:
        result = await client.infer(MODEL, inputs, outputs=wanted, request_id="mixed", model_version="1")
    response = result.get_response()
    assert [output["name"] for output in response["outputs"]] == ["B", "A"]
    assert response["id"] == "mixed" and response["model_name"] == MODEL and response["model_version"] == "1"
    assert result.as_numpy("B").tolist() == [b"x", b"yy"] and result.as_numpy("A").tolist() == a.tolist()
    assert "data" in result.get_output("A") and "data" not in result.get_output("B")
    request = door.plane.requests[-1]
    assert [tensor.name for tensor in request.inputs] == ["A", "J", "B"]
    assert request.model_version == "1" and not request.inputs[0].parameters


async def test_parameters_reach_the_data_plane(door):
    tensor = make_input("INT8", ARRAYS["INT8"], binary=True)
    async with triton_aio.InferenceServerClient(door.url) as client:
        await client.infer(
            MODEL,
            [tensor],
            outputs=[triton.InferRequestedOutput("IN", class_count=3)],
            priority=2**63,
            timeout=5000,
            sequence_id="s-1",
            sequence_start=True,
            parameters={"tenant": "x", "ratio": 0.5, "flag": True, "n": -3},
        )
    request = door.plane.requests[-1]
    assert request.parameters == {
        "priority": 2**63,
        "timeout": 5000,
        "sequence_id": "s-1",
        "sequence_start": True,
        "sequence_end": False,
        "tenant": "x",
        "ratio": 0.5,
        "flag": True,
        "n": -3,
    }
    assert request.outputs[0].parameters == {"classification": 3}
    assert request.id == ""


@pytest.mark.parametrize("asked", ["gzip", "deflate"])
@pytest.mark.parametrize("sent", ["gzip", "deflate", None])
async def test_compression_both_ways(door, asked, sent):
    array = np.zeros((64, 64), np.float32)
    tensor = make_input("FP32", array, binary=True)

    def infer(client):
        return client.infer(MODEL, [tensor], request_compression_algorithm=sent, response_compression_algorithm=asked)

    assert np.array_equal((await call_sync(door.url, infer)).as_numpy("IN"), array)
    async with triton_aio.InferenceServerClient(door.url) as client:
        assert np.array_equal((await infer(client)).as_numpy("IN"), array)


async def test_large_tensor_is_compressed_off_the_loop(door):
    array = np.zeros(200_000, np.float32)
    tensor = make_input("FP32", array, binary=True)
    async with triton_aio.InferenceServerClient(door.url) as client:
        result = await client.infer(
            MODEL, [tensor], request_compression_algorithm="gzip", response_compression_algorithm="gzip"
        )
    assert np.array_equal(result.as_numpy("IN"), array)


async def test_async_infer_of_the_sync_client(door):
    tensor = make_input("INT8", ARRAYS["INT8"], binary=True)

    def run(client):
        return [pending.get_result(timeout=20) for pending in [client.async_infer(MODEL, [tensor]) for _ in range(8)]]

    results = await call_sync(door.url, run)
    assert [result.as_numpy("IN").tolist() for result in results] == [[-128, 127]] * 8


async def test_64_concurrent_requests_get_their_own_answers(door):
    async with triton_aio.InferenceServerClient(door.url, conn_limit=64) as client:
        arrays = [np.full((1, 5), index, np.int32) for index in range(64)]
        results = await asyncio.gather(
            *(
                client.infer(MODEL, [make_input("INT32", array, binary=index % 2 == 0)], request_id=str(index))
                for index, array in enumerate(arrays)
            )
        )
    for index, result in enumerate(results):
        assert result.get_response()["id"] == str(index)
        assert result.as_numpy("IN").tolist() == [[index] * 5]


def ask_everything(client: Any) -> dict[str, Any]:
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(MODEL),
        "version_ready": client.is_model_ready(MODEL, "1"),
        "other_ready": client.is_model_ready("nobody"),
        "other_version_ready": client.is_model_ready(MODEL, "7"),
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata(MODEL),
        "model_version": client.get_model_metadata(MODEL, "1"),
        "config": client.get_model_config(MODEL, "1"),
        "index": client.get_model_repository_index(),
        "statistics": client.get_inference_statistics(),
        "model_statistics": client.get_inference_statistics(MODEL, "1"),
        "load": client.load_model(MODEL, config='{"max_batch_size":4}', files={"file:1/model.onnx": b"\x00\xff"}),
        "plain_load": client.load_model(MODEL),
        "unload": client.unload_model(MODEL, unload_dependents=True),
    }


@pytest.mark.proves(
    "Server*", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "Repository*", by="tritonclient.http*"
)
@pytest.mark.parametrize("form", ["sync", "aio"])
async def test_every_other_call(door, form):
    if form == "sync":
        answers = await call_sync(door.url, ask_everything)
    else:
        async with triton_aio.InferenceServerClient(door.url) as client:
            answers = {name: await pending for name, pending in ask_everything(client).items()}
    assert answers["live"] and answers["ready"] and answers["model_ready"] and answers["version_ready"]
    assert answers["other_ready"] is False and answers["other_version_ready"] is False
    assert answers["server"] == {
        "name": "aiorchestrator",
        "version": "0.1.0",
        "extensions": ["statistics", "binary_tensor_data"],
    }
    assert answers["model"] == answers["model_version"]
    assert answers["model"] == {
        "name": MODEL,
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "IN", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "IN", "datatype": "FP32", "shape": [-1, 4]}],
    }
    assert answers["config"]["max_batch_size"] == 8
    assert answers["index"] == [
        {"name": MODEL, "version": "1", "state": "READY"},
        {
            "name": "broken",
            "version": "2",
            "state": "UNAVAILABLE",
            "reason": "load failed for model 'broken': no artefact",
        },
        {"name": "idle"},
    ]
    assert answers["statistics"] == answers["model_statistics"]
    (model,) = answers["statistics"]["model_stats"]
    assert model["name"] == MODEL and model["last_inference"] == 1700000000000
    assert model["inference_stats"]["success"] == {"count": 3, "ns": 99}
    assert model["inference_stats"].keys() == {
        "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss"
    }  # fmt: skip
    assert model["batch_stats"] == [
        {
            "batch_size": 4,
            "compute_input": {"count": 1, "ns": 10},
            "compute_infer": {"count": 1, "ns": 20},
            "compute_output": {"count": 1, "ns": 30},
        }
    ]
    assert sorted(door.control.calls, key=str) == sorted(
        [
            ("load", MODEL, '{"max_batch_size":4}', {"1/model.onnx": b"\x00\xff"}),
            ("load", MODEL, None, {}),
            ("unload", MODEL, True),
        ],
        key=str,
    )


@pytest.mark.parametrize("form", ["sync", "aio"])
async def test_errors_arrive_as_client_exceptions(door, form):
    tensor = make_input("INT8", ARRAYS["INT8"], binary=True)

    async def fail(call: Callable[[Any], Any]) -> InferenceServerException:
        with pytest.raises(InferenceServerException) as caught:
            if form == "sync":
                await call_sync(door.url, call)
            else:
                async with triton_aio.InferenceServerClient(door.url) as client:
                    await call(client)
        return caught.value

    unknown = await fail(lambda client: client.infer("nobody", [tensor]))
    assert unknown.status() == "400" and unknown.message() == "Request for unknown model: 'nobody' is not found"
    version = await fail(lambda client: client.infer(MODEL, [tensor], model_version="9"))
    assert version.status() == "404"
    assert version.message() == f"Request for unknown model: '{MODEL}' version 9 is not found"
    assert (await fail(lambda client: client.infer(MODEL, [tensor], model_version="latest"))).status() == "404"
    assert (await fail(lambda client: client.get_model_metadata("nobody"))).status() == "400"
    door.plane.failure = ModelNotReady(f"Request for unknown model: '{MODEL}' version 1 is not at ready state")
    assert (await fail(lambda client: client.infer(MODEL, [tensor]))).status() == "503"
    door.plane.failure = None
    wanted = [triton.InferRequestedOutput("NOPE")]
    extra = await fail(lambda client: client.infer(MODEL, [tensor], outputs=wanted))
    assert extra.message() == f"unexpected inference output 'NOPE' for model '{MODEL}'"


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (Tensor("OUT", "FP16", (1,), b"\0\0"), "sending FP16 data via JSON is not supported"),
        (Tensor("OUT", "BF16", (1,), b"\0\0"), "sending BF16 data via JSON is not supported"),
        (Tensor("OUT", "BYTES", (1,), b"\1\0\0\0\xff"), "output 'OUT' holds bytes that are not UTF-8 text"),
    ],
)
async def test_outputs_that_json_cannot_hold(door, tensor, text):
    door.plane.outputs = [tensor]
    wanted = [triton.InferRequestedOutput("OUT", binary_data=False)]
    sent = make_input("INT8", ARRAYS["INT8"], binary=True)
    with pytest.raises(InferenceServerException, match=text) as caught:
        await call_sync(door.url, lambda client: client.infer(MODEL, [sent], outputs=wanted))
    assert caught.value.status() == "400"
    result = await call_sync(door.url, lambda client: client.infer(MODEL, [sent]))
    assert result.get_output("OUT")["parameters"]["binary_data_size"] == len(tensor.data)
