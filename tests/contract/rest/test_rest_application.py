"""REST and metrics over the real planes: a repository, compiled schedulers and models that run."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig

DEADLINE_S = 20
LENGTH = "Inference-Header-Content-Length"
PAIR = """
backend: "identity"
max_batch_size: 8
dynamic_batching { max_queue_delay_microseconds: 2000 }
input [ { name: "INPUT0" data_type: TYPE_INT32 dims: [ 4 ] }, { name: "INPUT1" data_type: TYPE_STRING dims: [ 1 ] } ]
"""
SLOW = """
backend: "identity"
max_batch_size: 0
parameters { key: "execute_delay_us" value { string_value: "300000" } }
input [ { name: "INPUT0" data_type: TYPE_INT32 dims: [ 1 ] } ]
"""
PICKY = """
class Model:
    inputs = [("X", "INT32", [1])]
    outputs = [("Y", "INT32", [1])]
    max_batch_size = 4

    def execute(self, inputs):
        if (inputs["X"] == 13).any():
            raise ValueError("thirteen is refused")
        return {"Y": inputs["X"] * 2}
"""
ROW = {"name": "INPUT0", "shape": [1, 4], "datatype": "INT32", "data": [1, 2, 3, 4]}
TEXT = {"name": "INPUT1", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}
GOOD = {"inputs": [ROW, TEXT]}


@dataclass
class Served:
    app: Application
    http: httpx.AsyncClient

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.app.http_port}"

    async def infer(self, document: object, model: str = "pair") -> httpx.Response:
        return await self.http.post(f"/v2/models/{model}/infer", json=document)

    async def scrape(self) -> str:
        response = await self.http.get(f"http://127.0.0.1:{self.app.metrics_port}/metrics")
        assert response.status_code == 200
        return response.text


@pytest.fixture
async def served(tmp_path) -> AsyncIterator[Served]:
    for name, config in (("pair", PAIR), ("slow", SLOW)):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "config.pbtxt").write_text(config)
    (tmp_path / "picky" / "1").mkdir(parents=True)
    (tmp_path / "picky" / "1" / "model.py").write_text(PICKY)
    config = ServerConfig(
        grpc={"enabled": False},
        http={"port": 0, "max_body_bytes": 1 << 20},
        metrics={"port": 0},
        repository={"paths": (tmp_path,)},
        lifecycle={"control_mode": "explicit", "load_models": ("*",), "exit_timeout_secs": 5},
        execution={
            "backends": ("aiorch_backends.identity:IdentityBackend", "aiorch_backends.python:PythonBackend"),
            "allow_code": True,
        },
    )
    async with (
        Application(config) as app,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{app.http_port}", verify=False, timeout=20) as http,
    ):
        yield Served(app, http)


@pytest.mark.parametrize(
    ("model", "document", "status", "text"),
    [
        ("nobody", GOOD, 400, "Request for unknown model: 'nobody' is not found"),
        ("pair", {"inputs": [ROW]}, 400, "missing required input(s) ['INPUT1']"),
        ("pair", {"inputs": [ROW, TEXT, {**ROW, "name": "X"}]}, 400, "unexpected inference input 'X'"),
        ("pair", {"inputs": [ROW, TEXT, ROW]}, 400, "input 'INPUT0' is given 2 times"),
        ("pair", {"inputs": [{**ROW, "datatype": "INT64"}, TEXT]}, 400, "data-type is 'INT64', but model 'pair'"),
        ("pair", {"inputs": [{**ROW, "shape": [4]}, TEXT]}, 400, "Expected [-1,4], got [4]"),
        ("pair", {"inputs": [{**ROW, "shape": [4, 1]}, TEXT]}, 400, "Expected [-1,4], got [4,1]"),
        (
            "pair",
            {"inputs": [{**ROW, "shape": [9, 4], "data": [0] * 36}, {**TEXT, "shape": [9, 1], "data": ["a"] * 9}]},
            400,
            "inference request batch-size must be <= 8 for 'pair'",
        ),
        ("pair", {**GOOD, "outputs": [{"name": "NOPE"}]}, 400, "unexpected inference output 'NOPE' for model 'pair'"),
        ("pair", {**GOOD, "parameters": {"triton_x": 1}}, 400, "'triton_x' is refused"),
        ("pair", {**GOOD, "parameters": {"priority": -1}}, 400, "parameter 'priority' must be an integer"),
        (
            "pair",
            {**GOOD, "outputs": [{"name": "OUTPUT0", "parameters": {"classification": 0}}]},
            400,
            "invalid value for 'classification' parameter, expected >= 1, got 0",
        ),
        (
            "pair",
            {"inputs": [{**ROW, "data": ..., "parameters": {"shared_memory_region": "r"}}, TEXT]},
            501,
            "Client shared memory is disabled.",
        ),
        ("picky", {"inputs": [{"name": "X", "shape": [1, 1], "datatype": "INT32", "data": [13]}]}, 500, "thirteen"),
    ],
)
async def test_requests_that_the_model_cannot_take(served, model, document, status, text):
    document["inputs"] = [{k: v for k, v in tensor.items() if v is not ...} for tensor in document["inputs"]]
    response = await served.infer(document, model)
    assert response.status_code == status and text in response.json()["error"], response.text
    assert "Traceback" not in response.text and ".py" not in response.text
    healthy = await served.infer(GOOD)
    assert healthy.status_code == 200 and healthy.json()["outputs"][0]["data"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"\x05\0\0\0ab", "expecting string of length 5 but only 2 bytes available"),
        (b"\xff\xff\xff\xffab", "expecting string of length 4294967295 but only 2 bytes available"),
        (b"\x01\0", "incomplete string length indicator"),
        (b"\x01\0\0\0a\x01\0\0\0b", "unexpected number of string elements"),
        (b"", "unexpected number of string elements 0"),
    ],
)
async def test_bytes_elements_that_run_past_their_end(served, payload, text):
    tensor = {"name": "INPUT1", "shape": [1, 1], "datatype": "BYTES"}
    head = json.dumps({"inputs": [ROW, {**tensor, "parameters": {"binary_data_size": len(payload)}}]}).encode()
    response = await served.http.post("/v2/models/pair/infer", content=head + payload, headers={LENGTH: str(len(head))})
    assert response.status_code == 400 and text in response.json()["error"]
    assert (await served.infer(GOOD)).status_code == 200


async def test_binary_size_that_does_not_match_the_shape(served):
    tensor = {"name": "INPUT0", "shape": [1, 4], "datatype": "INT32", "parameters": {"binary_data_size": 12}}
    head = json.dumps({"inputs": [tensor, TEXT]}).encode()
    response = await served.http.post(
        "/v2/models/pair/infer", content=head + bytes(12), headers={LENGTH: str(len(head))}
    )
    assert response.status_code == 400
    assert "input byte size mismatch for input 'INPUT0' for model 'pair'. Expected 16, got 12" in response.text


async def test_body_limit_of_the_configuration(served):
    response = await served.http.post("/v2/models/pair/infer", content=bytes((1 << 20) + 1))
    assert response.status_code == 413
    assert (await served.infer(GOOD)).status_code == 200


async def test_64_concurrent_clients_get_their_own_rows(served):
    async with triton_aio.InferenceServerClient(served.url, conn_limit=64) as client:

        async def ask(value: int) -> None:
            rows = 1 + value % 3
            numbers = np.full((rows, 4), value, np.int32)
            texts = np.array([[f"{value}-{row}".encode()] for row in range(rows)], np.object_)
            inputs = [triton.InferInput("INPUT0", [rows, 4], "INT32"), triton.InferInput("INPUT1", [rows, 1], "BYTES")]
            inputs[0].set_data_from_numpy(numbers, binary_data=value % 2 == 0)
            inputs[1].set_data_from_numpy(texts)
            result = await client.infer("pair", inputs, request_id=f"r{value}")
            assert result.get_response()["id"] == f"r{value}"
            assert result.as_numpy("OUTPUT0").tolist() == numbers.tolist()
            assert result.as_numpy("OUTPUT1").tolist() == texts.tolist()

        for _ in range(3):
            await asyncio.gather(*(ask(value) for value in range(64)))
        (model,) = (await client.get_inference_statistics("pair"))["model_stats"]
    assert model["inference_stats"]["success"]["count"] == 192
    assert model["inference_count"] == 3 * sum(1 + value % 3 for value in range(64))
    assert model["execution_count"] < 192  # batched
    page = await served.scrape()
    assert 'nv_inference_request_success{model="pair",version="1"} 192.0\n' in page
    assert 'aiorch_request_phase_seconds_count{model="pair",phase="total",version="1"} 192.0\n' in page


async def test_a_poisoned_request_fails_alone(served):
    values = [1, 13, 2, 3]
    responses = await asyncio.gather(
        *(
            served.infer({"inputs": [{"name": "X", "shape": [1, 1], "datatype": "INT32", "data": [value]}]}, "picky")
            for value in values
        )
    )
    assert [response.status_code for response in responses] == [200, 500, 200, 200]
    answers = [response.json()["outputs"][0]["data"][0] for response in responses if response.status_code == 200]
    assert answers == [2, 4, 6]
    assert 'nv_inference_request_failure{model="picky",reason="BACKEND",version="1"} 1.0\n' in await served.scrape()


async def test_clients_that_leave_are_taken_out_of_the_queue(served):
    body = json.dumps({"inputs": [{"name": "INPUT0", "shape": [1], "datatype": "INT32", "data": [7]}]}).encode()
    head = f"POST /v2/models/slow/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    leaving = []
    for _ in range(6):
        _, writer = await asyncio.open_connection("127.0.0.1", served.app.http_port)
        writer.write(head + body)
        leaving.append(writer)
    servable = next(each for each in served.app.manager.servables() if each.name == "slow")
    async with asyncio.timeout(DEADLINE_S):
        while servable.scheduler.pending < 5:
            await asyncio.sleep(0.005)
        for writer in leaving:
            writer.transport.abort()
        while servable.scheduler.pending:
            await asyncio.sleep(0.005)
        response = await served.http.post("/v2/models/slow/infer", content=body)
    assert response.status_code == 200 and response.json()["outputs"][0]["data"] == [7]
    failures = servable.statistics().failures
    assert failures.get("CANCELED", 0) >= 5, failures


async def test_stopping_answers_what_runs_and_refuses_the_rest(served):
    document = {"inputs": [{"name": "INPUT0", "shape": [1], "datatype": "INT32", "data": [7]}]}
    servable = next(each for each in served.app.manager.servables() if each.name == "slow")
    running = asyncio.create_task(served.infer(document, "slow"))
    async with asyncio.timeout(DEADLINE_S):
        while not servable.scheduler.in_flight:
            await asyncio.sleep(0.005)
        stopping = asyncio.create_task(served.app.stop())
        response = await running
        await stopping
    assert response.status_code == 200 and response.json()["outputs"][0]["data"] == [7]
    with pytest.raises(httpx.ConnectError):
        await served.infer(document, "slow")


async def test_scrapes_never_fail_while_models_come_and_go(served):
    async with triton_aio.InferenceServerClient(served.url) as client:

        async def reload() -> None:
            while not is_enough.is_set():
                await client.unload_model("pair")
                await client.load_model("pair")

        is_enough = asyncio.Event()
        reloading = asyncio.create_task(reload())
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(20):
                assert "aiorch_build_info" in await served.scrape()
            is_enough.set()
            await reloading
        assert await client.is_model_ready("pair")
        assert 'nv_inference_count{model="pair",version="1"} 0.0\n' in await served.scrape()


async def test_load_with_a_configuration_and_unload(served):
    async with triton_aio.InferenceServerClient(served.url) as client:
        config = json.dumps(
            {
                "backend": "identity",
                "max_batch_size": 2,
                "input": [{"name": "INPUT0", "data_type": "TYPE_FP32", "dims": [3]}],
            }
        )
        await client.load_model("pair", config=config)
        metadata = await client.get_model_metadata("pair")
        assert metadata["inputs"] == [{"name": "INPUT0", "datatype": "FP32", "shape": [-1, 3]}]
        assert (await client.get_model_config("pair"))["max_batch_size"] == 2
        await client.unload_model("pair")
        assert not await client.is_model_ready("pair")
        index = {entry["name"]: entry for entry in await client.get_model_repository_index()}
        assert index["pair"] == {"name": "pair", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
        with pytest.raises(triton.InferenceServerException) as caught:
            await client.load_model("nobody")
        assert caught.value.status() in ("400", "500") and "failed to load 'nobody'" in caught.value.message()
