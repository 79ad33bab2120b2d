"""Both clients against the real server, on both gRPC doors."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
from aiorch_client import (
    AsyncClient,
    Client,
    ClientError,
    InferRequest,
    NotFoundError,
    RequestError,
    ServerError,
    UnavailableError,
)

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig

BACKENDS = ["aiorch_backends.identity:IdentityBackend", "aiorch_backends.python:PythonBackend"]
#: Model name -> datatype and dims of its input x and output y; all but ``whole`` batch.
ECHOES = {
    "fp32": ("TYPE_FP32", "4", 8),
    "fp16": ("TYPE_FP16", "-1", 8),
    "bf16": ("TYPE_BF16", "-1", 8),
    "text": ("TYPE_STRING", "-1", 8),
    "whole": ("TYPE_INT64", "2", 0),
}
PICKY = """
import numpy as np

class Model:
    inputs = [("x", "INT32", [1])]
    outputs = [("y", "INT32", [1])]
    max_batch_size = 8

    def execute(self, inputs):
        if (inputs["x"] < 0).any():
            raise ArithmeticError("negative")
        return {"y": inputs["x"] + 1}
"""


def write_echo(root, name, datatype, dims, max_batch_size, extra=""):
    (root / name / "1").mkdir(parents=True)
    tensors = "".join(
        f'{kind} {{ name: "{tensor}" data_type: {datatype} dims: [{dims}] }}\n'
        for kind, tensor in (("input", "x"), ("output", "y"))
    )
    (root / name / "config.pbtxt").write_text(
        f'backend: "identity"\nmax_batch_size: {max_batch_size}\n{tensors}{extra}'
    )


@pytest.fixture
def repository(tmp_path):
    for name, parts in ECHOES.items():
        write_echo(tmp_path, name, *parts)
    write_echo(
        tmp_path, "slow", "TYPE_FP32", "1", 1, 'parameters { key: "execute_delay_us" value { string_value: "400000" } }'
    )
    (tmp_path / "picky" / "1").mkdir(parents=True)
    (tmp_path / "picky" / "1" / "model.py").write_text(PICKY)
    return tmp_path


@pytest.fixture(params=["native", "grpcio"])
def serving(request, repository):
    @asynccontextmanager
    async def serve(**lifecycle):
        config = ServerConfig(
            grpc={"port": 0, "transport": request.param},
            http={"enabled": False},
            metrics={"enabled": False},
            repository={"paths": [repository]},
            lifecycle=lifecycle,
            execution={"backends": BACKENDS},
        )
        async with Application(config) as application, AsyncClient(f"127.0.0.1:{application.grpc_port}") as client:
            yield application, client

    return serve


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_cancelled_infer_leaves_nothing_in_flight(serving):
    async with serving() as (application, client):
        row = np.zeros((1, 1), np.float32)
        await client.metadata("slow")
        scheduler = application.manager.find("slow").scheduler
        tasks = [asyncio.create_task(client.infer("slow", row)) for _ in range(3)]
        await until(lambda: scheduler.in_flight == 3)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await until(lambda: scheduler.in_flight == 0)
        assert (await client.infer("slow", row))["y"].shape == (1, 1)


async def test_a_deadline_is_told_as_such(serving):
    async with serving() as (_, client):
        with pytest.raises(UnavailableError) as caught:
            await client.infer("slow", np.zeros((1, 1), np.float32), timeout_s=0.1)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_errors_of_the_model_and_of_the_caller_are_told_apart(serving):
    async with serving() as (_, client):
        assert (await client.infer("picky", [[1], [2]]))["y"].tolist() == [[2], [3]]
        with pytest.raises(ServerError, match="ArithmeticError: negative"):
            await client.infer("picky", [[-1]])
        with pytest.raises(RequestError, match="batch-size must be <= 8"):
            await client.infer("picky", [[1]] * 9)
        with pytest.raises(RequestError, match=r"shape \[1\], expected \[-1, 1\]; the first dimension is the batch"):
            await client.infer("picky", [1])
        with pytest.raises(NotFoundError, match="unknown model: 'none'"):
            await client.infer("none", [1])
        with pytest.raises(NotFoundError, match="version 7 is not found"):
            await client.infer("fp32", np.zeros((1, 4), np.float32), version="7")


async def test_every_special_datatype_comes_back_as_it_was(serving):
    async with serving() as (_, client):
        half = np.array([[0.1, -65504.0]], np.float16)
        assert (await client.infer("fp16", half))["y"].tobytes() == half.tobytes()
        brain = (await client.infer("bf16", np.array([[1.0, 1.00390625, -np.inf]], np.float32)))["y"]
        assert brain.tolist() == [[1.0, 1.0, -np.inf]]
        assert (await client.infer("text", [["ü", b"\0", ""]]))["y"].tolist() == [["ü".encode(), b"\0", b""]]
        assert (await client.infer("whole", [1, -(2**63)]))["y"].tolist() == [1, -(2**63)]
        large = np.random.default_rng(0).random((8, 4), np.float32)
        result = await client.infer("fp32", {"x": large}, outputs=["y"], request_id="id 1", version="1")
        assert np.array_equal(result["y"], large)
        assert (result.id, result.model_version) == ("id 1", "1")


@pytest.mark.proves("ModelStreamInfer", by="aiorch_client")
async def test_streams(serving):
    requests = [InferRequest("fp32", np.full((1, 4), i, np.float32), request_id=str(i)) for i in range(50)]
    bad = InferRequest("picky", [[-1]], request_id="bad")
    async with serving() as (_, client):
        results = [result async for result in client.stream(requests)]
        assert [(each.id, each["y"][0, 0]) for each in results] == [(str(i), i) for i in range(50)]
        items = [item async for item in client.stream([requests[0], bad, requests[1]], raise_errors=False)]
        assert [isinstance(item, ClientError) for item in items] == [False, True, False]
        assert (items[1].request_id, "negative" in items[1].details) == ("bad", True)
        with pytest.raises(ServerError, match="negative"):
            async for _ in client.stream([bad]):
                pass


@pytest.mark.proves("Server*", "ModelReady", "ModelConfig", "ModelStatistics", "RepositoryIndex", by="aiorch_client")
async def test_what_operators_ask(serving):
    async with serving() as (_, client):
        await client.connect()
        assert await client.is_live()
        assert await client.is_ready()
        assert await client.is_model_ready("fp32", "1")
        assert not await client.is_model_ready("fp32", "2")
        assert not await client.is_model_ready("none")
        assert "statistics" in (await client.server_metadata()).extensions
        config = await client.config("fp32")
        assert (config["max_batch_size"], config["input"][0]["dims"]) == (8, [4])
        await client.infer("fp32", np.zeros((3, 4), np.float32))
        (statistics,) = await client.statistics("fp32")
        assert (statistics.success.count, statistics.inference_count, statistics.execution_count) == (1, 3, 1)
        assert {entry.state for entry in await client.index()} == {"READY"}
        with pytest.raises(UnavailableError, match="not allowed"):
            await client.load("fp32")


@pytest.mark.proves("ModelMetadata", "ModelInfer", "Repository*", by="aiorch_client")
async def test_a_model_that_changes_under_a_client(serving):
    changed = {
        "name": "fp32",
        "backend": "identity",
        "max_batch_size": 8,
        "input": [{"name": "x", "data_type": "TYPE_FP64", "dims": [2]}],
        "output": [{"name": "y", "data_type": "TYPE_FP64", "dims": [2]}],
    }
    async with serving(control_mode="explicit", load_models=["fp32"]) as (application, client):
        assert (await client.infer("fp32", [[1, 2, 3, 4]]))["y"].dtype == np.float32
        async with AsyncClient(f"127.0.0.1:{application.grpc_port}") as operator:
            await operator.load("fp32", config=changed)
        assert (await client.infer("fp32", [[1, 2]]))["y"].dtype == np.float64
        with pytest.raises(RequestError, match=r"expected \[-1, 2\]"):
            await client.infer("fp32", [[1, 2, 3, 4]])
        await client.unload("fp32")
        with pytest.raises((NotFoundError, UnavailableError)):
            await client.infer("fp32", [[1, 2]])
        await client.load("fp32")
        assert (await client.infer("fp32", [[1, 2, 3, 4]]))["y"].dtype == np.float32
        with pytest.raises(ClientError, match="failed to poll from model repository"):
            await client.load("none")


async def test_the_blocking_client_from_many_threads(serving):
    async with serving() as (application, _):

        def call(client, number):
            return client.infer("fp32", np.full((1, 4), number, np.float32))["y"][0, 0] == number

        with Client(f"127.0.0.1:{application.grpc_port}") as client:
            answers = await asyncio.gather(*(asyncio.to_thread(call, client, number) for number in range(100)))
        assert all(answers)


async def test_a_server_that_stops_answers_what_is_under_way(serving):
    async with serving() as (application, client):
        row = np.zeros((1, 1), np.float32)
        await client.metadata("slow")
        task = asyncio.create_task(client.infer("slow", row))
        scheduler = application.manager.find("slow").scheduler
        await until(lambda: scheduler.in_flight == 1)
        await application.stop(10)
        assert (await task)["y"].shape == (1, 1)
        with pytest.raises(UnavailableError) as caught:
            await client.infer("slow", row)
        assert caught.value.retryable
