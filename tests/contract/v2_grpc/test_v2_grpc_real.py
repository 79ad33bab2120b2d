"""The V2 service over the real planes, asked by NVIDIA's client: right answers, and its words where it is wrong."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import h2.connection
import h2.events
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from aiorch_proto.v2 import inference_pb2 as pb
from loop_lag import measure_lag
from ml_dtypes import bfloat16
from tritonclient.utils import InferenceServerException

A = np.array([[0.5, 1, 2, 3], [4, 5, 6, 7]], np.float32)
B = np.array([[1, 2, 3], [4, 5, 6]], np.int64)


@pytest.fixture
async def client(real_site: SimpleNamespace) -> AsyncIterator[Any]:
    async with triton_aio.InferenceServerClient(real_site.url) as client:
        yield client


def build(name: str, array: Any, datatype: str, shape: list[int] | None = None) -> Any:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    if shape is not None:
        tensor.set_shape(shape)
    return tensor


def build_pair() -> list[Any]:
    return [build("A", A, "FP32"), build("B", B, "INT64")]


async def check_right(client: Any) -> None:
    result = await client.infer("identity", build_pair(), request_id="after")
    np.testing.assert_array_equal(result.as_numpy("X"), A)
    np.testing.assert_array_equal(result.as_numpy("Y"), B)
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("identity", "3", "after")


FOUND_NOTHING = "Request for unknown model: "
CORE = "[request id: q] "
WRONG = {
    "name": ({"model_name": "nobody"}, "INVALID_ARGUMENT", FOUND_NOTHING + "'nobody' is not found"),
    "path": ({"model_name": "../identity"}, "INVALID_ARGUMENT", FOUND_NOTHING + "'../identity' is not found"),
    "version": ({"model_version": "9"}, "NOT_FOUND", FOUND_NOTHING + "'identity' version 9 is not found"),
    "version text": (
        {"model_version": "last"},
        "INVALID_ARGUMENT",
        "failed to get model version from specified version string 'last' (details: ",
    ),
    "shape": (
        {"inputs": [build("A", A[:, :3].copy(), "FP32"), build("B", B, "INT64")]},
        "INVALID_ARGUMENT",
        CORE + "unexpected shape for input 'A' for model 'identity'. Expected [-1,4], got [2,3]. ",
    ),
    "negative shape": (
        {"inputs": [build("A", A, "FP32", [-2, 4]), build("B", B, "INT64")]},
        "INVALID_ARGUMENT",
        CORE + "unexpected shape for input 'A' for model 'identity'. Expected [-1,4], got [-2,4]. ",
    ),
    "overflowing shape": (
        {"inputs": [build("A", A[:1].copy(), "FP32"), build("B", B, "INT64", [1, 2**61])]},
        "INVALID_ARGUMENT",
        CORE + f"input byte size mismatch for input 'B' for model 'identity'. Expected {2**64}, got 48",
    ),
    "datatype": (
        {"inputs": [build("A", A.astype(np.float64), "FP64"), build("B", B, "INT64")]},
        "INVALID_ARGUMENT",
        CORE + "inference input 'A' data-type is 'FP64', but model 'identity' expects 'FP32'",
    ),
    "missing input": (
        {"inputs": [build("A", A, "FP32")]},
        "INVALID_ARGUMENT",
        CORE + "expected 2 inputs but got 1 inputs for model 'identity'. Got input(s) ['A'], but missing required "
        "input(s) ['B']. Please provide all required input(s).",
    ),
    "extra input": (
        {"inputs": [*build_pair(), build("C", A, "FP32")]},
        "INVALID_ARGUMENT",
        CORE + "unexpected inference input 'C' for model 'identity'",
    ),
    "extra output": (
        {"outputs": [triton.InferRequestedOutput("Z")]},
        "INVALID_ARGUMENT",
        CORE + "unexpected inference output 'Z' for model 'identity'",
    ),
    "batch": (
        {"inputs": [build("A", np.zeros((9, 4), np.float32), "FP32"), build("B", np.zeros((9, 1), int), "INT64")]},
        "INVALID_ARGUMENT",
        CORE + "inference request batch-size must be <= 8 for 'identity'",
    ),
    "size": (
        {"inputs": [build("A", A, "FP32", [1, 4]), build("B", B[:1].copy(), "INT64")]},
        "INVALID_ARGUMENT",
        CORE + "input byte size mismatch for input 'A' for model 'identity'. Expected 16, got 32",
    ),
    "no id": (
        {"outputs": [triton.InferRequestedOutput("Z")], "request_id": ""},
        "INVALID_ARGUMENT",
        "[request id: <id_unk",
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_wrong_request(client: Any, name: str) -> None:
    change, status, text = WRONG[name]
    arguments = {"model_name": "identity", "inputs": build_pair(), "request_id": "q"} | change
    with pytest.raises(InferenceServerException) as caught:
        await client.infer(**arguments)
    assert caught.value.status() == f"StatusCode.{status}"
    assert str(caught.value.message()).startswith(text)
    await check_right(client)


async def test_metadata_and_config_agree(client: Any) -> None:
    metadata = await client.get_model_metadata("identity", as_json=True)
    assert metadata["versions"] == ["3"]
    assert metadata["inputs"] == [
        {"name": "A", "datatype": "FP32", "shape": ["-1", "4"]},
        {"name": "B", "datatype": "INT64", "shape": ["-1", "-1"]},
    ]
    config = (await client.get_model_config("identity")).config
    assert [tensor.name for tensor in config.input] == ["A", "B"]
    assert [list(tensor.dims) for tensor in config.output] == [[4], [-1]]
    assert config.max_batch_size == 8
    assert config.dynamic_batching.max_queue_delay_microseconds == 100


async def test_statistics_count_requests_and_rows(client: Any) -> None:
    for _ in range(3):
        await check_right(client)
    model = (await client.get_inference_statistics("identity")).model_stats[0]
    stats = model.inference_stats
    assert (model.version, model.inference_count, stats.success.count) == ("3", 6, 3)
    assert stats.compute_infer.count == stats.compute_input.count == stats.compute_output.count
    assert stats.success.ns >= stats.compute_infer.ns > 0
    assert {stats.name for stats in (await client.get_inference_statistics()).model_stats} >= {"identity", "slow"}
    with pytest.raises(InferenceServerException, match="requested model 'x' is not available"):
        await client.get_inference_statistics("x")


async def test_all_datatypes_in_one_request(client: Any) -> None:
    arrays = {
        "BOOL": np.array([[True, False]]),
        "FP16": np.array([[0.5, -np.inf]], np.float16),
        "BF16": np.array([[0.5, -2.0]], bfloat16),
        "BYTES": np.array([[b"", b"\xff\x00text"]], np.object_),
    }
    numbers = "UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64"
    arrays |= {name: np.array([[0, np.iinfo(name.lower()).max]], name.lower()) for name in numbers.split()}
    arrays |= {"FP32": np.array([[0.5, np.inf]], np.float32), "FP64": np.array([[0.5, 1e300]])}
    result = await client.infer("all_types", [build(name, array, name) for name, array in arrays.items()])
    for name, array in arrays.items():
        np.testing.assert_array_equal(result.as_numpy(f"OUT_{name}"), array)


async def test_typed_contents_give_the_same_answer(real_site: SimpleNamespace) -> None:
    request = pb.ModelInferRequest(model_name="identity", id="ü")
    request.inputs.add(name="A", datatype="FP32", shape=A.shape).contents.fp32_contents.extend(A.ravel().tolist())
    request.inputs.add(name="B", datatype="INT64", shape=B.shape).contents.int64_contents.extend(B.ravel().tolist())
    response = await real_site.stub.ModelInfer(request)
    assert list(response.raw_output_contents) == [A.tobytes(), B.tobytes()]
    assert response.id == "ü"


async def test_cancel_while_it_runs(real_site: SimpleNamespace) -> None:
    """A cancelled request of the slow model harms neither its neighbours nor the next one."""

    def request(value: float) -> pb.ModelInferRequest:
        message = pb.ModelInferRequest(model_name="slow", raw_input_contents=[np.float32(value).tobytes()])
        message.inputs.add(name="A", datatype="FP32", shape=[1, 1])
        return message

    calls = [real_site.stub.ModelInfer(request(value)) for value in range(4)]
    scheduler = real_site.manager.find("slow").scheduler
    async with asyncio.timeout(20):
        while scheduler.in_flight < 4:
            await asyncio.sleep(0.001)
    calls[0].cancel()
    calls[2].cancel()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [True, False, True, False]
    for value in (1, 3):
        assert answers[value].raw_output_contents[0] == np.float32(value).tobytes()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real_site.stub.ModelInfer(request(9), timeout=0.05)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def call_by_hand(site: SimpleNamespace, method: str, message: pb.ModelInferRequest, timeout: str) -> Any:
    """One call of a client that sends a deadline and does not look at it; gives the trailer and the messages' bytes."""
    body = message.SerializeToString()
    client = h2.connection.H2Connection()
    client.initiate_connection()
    head = {":method": "POST", ":scheme": "http", ":path": f"/inference.GRPCInferenceService/{method}"}
    head |= {":authority": "x", "te": "trailers", "content-type": "application/grpc", "grpc-timeout": timeout}
    client.send_headers(1, list(head.items()))
    client.send_data(1, b"\0" + len(body).to_bytes(4, "big") + body, end_stream=True)
    host, port = site.url.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    fields: dict[bytes, bytes] = {}
    data = b""
    async with asyncio.timeout(20):
        while b"grpc-status" not in fields:
            writer.write(client.data_to_send())
            for event in client.receive_data(await reader.read(65536)):
                fields |= dict(getattr(event, "headers", None) or ())
                data += getattr(event, "data", b"") if isinstance(event, h2.events.DataReceived) else b""
    writer.close()
    return fields, data


async def test_a_deadline_beyond_64_bits_of_nanoseconds(real_site: SimpleNamespace) -> None:
    """The longest that the header can say; grpc's own clients cannot, so the frames are written by hand."""
    message = pb.ModelInferRequest(model_name="slow", id="é", raw_input_contents=[np.float32(1).tobytes()])
    message.inputs.add(name="A", datatype="FP32", shape=[1, 1])
    fields, _ = await call_by_hand(real_site, "ModelInfer", message, "99999999H")
    assert fields[b"grpc-status"] == b"0", fields


async def test_a_stream_whose_time_is_up_ends_with_that_status(real_site: SimpleNamespace) -> None:
    """Its requests' time is up at the same moment: none of them may end the stream well first."""
    message = pb.ModelInferRequest(model_name="slow", raw_input_contents=[np.float32(1).tobytes()])
    message.inputs.add(name="A", datatype="FP32", shape=[1, 1])
    problems: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    calls = [call_by_hand(real_site, "ModelStreamInfer", message, f"{150 + number}m") for number in range(50)]
    ends = [fields[b"grpc-status"] + data for fields, data in await asyncio.gather(*calls)]
    assert ends == [b"4"] * 50
    gc.collect()
    assert not problems, problems


async def test_unload_and_load(client: Any) -> None:
    await client.unload_model("identity")
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'identity'"):
        await client.infer("identity", build_pair())
    index = {entry.name: entry for entry in (await client.get_model_repository_index()).models}
    assert (index["identity"].state, index["identity"].reason) == ("UNAVAILABLE", "unloaded")
    assert await client.is_model_ready("identity") is False
    await client.load_model("identity")
    await check_right(client)
    config = {
        "backend": "identity",
        "max_batch_size": 2,
        "input": [{"name": "A", "data_type": "TYPE_FP32", "dims": [4]}],
    }
    await client.load_model("identity", config=json.dumps(config), files={"file:5/nothing": b""})
    assert (await client.get_model_config("identity")).config.max_batch_size == 2
    assert list((await client.get_model_metadata("identity")).versions) == ["5"]


async def test_stream(client: Any) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number in range(30):
            array = np.full((1, 4), number, np.float32)
            other = np.full((1, 1 + number % 3), number, np.int64)
            yield {
                "model_name": "nobody" if number == 7 else "identity",
                "inputs": [build("A", array, "FP32"), build("B", other, "INT64")],
                "request_id": str(number),
            }

    seen = []
    async for result, error in client.stream_infer(requests()):
        if error is not None:
            assert "Request for unknown model: 'nobody' is not found" in str(error)
            seen.append("7")
            continue
        response = result.get_response()
        seen.append(response.id)
        np.testing.assert_array_equal(result.as_numpy("X"), np.full((1, 4), int(response.id), np.float32))
        assert result.as_numpy("Y").shape == (1, 1 + int(response.id) % 3)
        assert response.parameters["triton_final_response"].bool_param is True
    assert seen == [str(number) for number in range(30)]


@pytest.mark.alone
async def test_millions_of_strings_do_not_hold_up_others(real_site: SimpleNamespace) -> None:
    """Each element has a length that has to be looked at before the next one is found."""
    count = 3 << 20
    request = pb.ModelInferRequest(model_name="text", raw_input_contents=[bytes(4 * count)])
    request.inputs.add(name="A", datatype="BYTES", shape=[count + 1])
    async with measure_lag() as lag:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await real_site.stub.ModelInfer(request)
    assert f"unexpected number of string elements {count} " in caught.value.details()
    assert lag.worst_s < 0.5
