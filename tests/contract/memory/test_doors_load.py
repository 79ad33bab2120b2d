"""Through every door, the first request loads the model; so does a question that only the loaded model can answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import InferenceStub
from demand_site import MIB, TIMEOUT_S, BallastBackend, DemandSite, configure, running, write_model

Ask = Callable[[DemandSite, httpx.AsyncClient], Awaitable[Any]]


def make_request(model: str, value: float = 1.0) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="INPUT0", datatype="FP32", shape=[1, 1]).contents.fp32_contents.append(value)
    return request


async def ask_metadata(site: DemandSite, web: httpx.AsyncClient) -> Any:
    answer = await InferenceStub(site.channel).ModelMetadata(pb.ModelMetadataRequest(name="m"), timeout=TIMEOUT_S)
    return [each.name for each in answer.inputs]


async def ask_config(site: DemandSite, web: httpx.AsyncClient) -> Any:
    answer = await InferenceStub(site.channel).ModelConfig(pb.ModelConfigRequest(name="m"), timeout=TIMEOUT_S)
    return [each.name for each in answer.config.input]


async def ask_stream(site: DemandSite, web: httpx.AsyncClient) -> Any:
    async def send() -> AsyncIterator[pb.ModelInferRequest]:
        yield make_request("m")

    answers = [each async for each in InferenceStub(site.channel).ModelStreamInfer(send(), timeout=TIMEOUT_S)]
    return [np.frombuffer(each.infer_response.raw_output_contents[0], "<f4").tolist() for each in answers]


async def ask_typed(site: DemandSite, web: httpx.AsyncClient) -> Any:
    answer = await InferenceStub(site.channel).ModelInfer(make_request("m"), timeout=TIMEOUT_S)
    return np.frombuffer(answer.raw_output_contents[0], "<f4").tolist()


async def ask_rest(site: DemandSite, web: httpx.AsyncClient) -> Any:
    tensor = {"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [1]}
    return (await web.post("/v2/models/m/infer", json={"inputs": [tensor]})).json()["outputs"][0]["data"]


async def ask_rest_metadata(site: DemandSite, web: httpx.AsyncClient) -> Any:
    return [each["name"] for each in (await web.get("/v2/models/m")).json()["inputs"]]


async def ask_rest_config(site: DemandSite, web: httpx.AsyncClient) -> Any:
    return [each["name"] for each in (await web.get("/v2/models/m/config")).json()["input"]]


async def ask_generate(site: DemandSite, web: httpx.AsyncClient) -> Any:
    return (await web.post("/v2/models/m/generate", json={"INPUT0": [1]})).json()["OUTPUT0"]


async def ask_predict(site: DemandSite, web: httpx.AsyncClient) -> Any:
    return (await web.post("/v1/models/m:predict", json={"instances": [[1]]})).json()["predictions"]


async def ask_serving_metadata(site: DemandSite, web: httpx.AsyncClient) -> Any:
    return (await web.get("/v1/models/m/versions/1/metadata")).json()["model_spec"]["name"]


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (ask_metadata, ["INPUT0"]),
        (ask_config, ["INPUT0"]),
        (ask_stream, [[3.0]]),
        (ask_typed, [3.0]),
        (ask_rest, [3.0]),
        (ask_rest_metadata, ["INPUT0"]),
        (ask_rest_config, ["INPUT0"]),
        (ask_generate, 3.0),
        (ask_predict, [[3.0]]),
        (ask_serving_metadata, "m"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_who_comes_first_loads_the_model(tmp_path: Path, ask: Ask, expected: Any) -> None:
    write_model(tmp_path, "m", add=2)
    config = configure(tmp_path, http={"host": "127.0.0.1", "port": 0})
    async with running(config) as site:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{site.application.http_port}", timeout=TIMEOUT_S
        ) as web:
            assert (await web.get("/v2/models/m/ready")).status_code == 200
            assert site.ready() == []
            answers = await asyncio.gather(*(ask(site, web) for _ in range(3)))
        assert answers == [expected] * 3
        assert BallastBackend.loads == {"m": 1}


async def test_a_stream_keeps_the_order_of_what_waited_for_the_load(tmp_path: Path) -> None:
    write_model(tmp_path, "m", add=2)
    async with running(configure(tmp_path)) as site:

        async def send() -> AsyncIterator[pb.ModelInferRequest]:
            for value in range(50):
                yield make_request("m", value)

        answers = [each async for each in InferenceStub(site.channel).ModelStreamInfer(send(), timeout=TIMEOUT_S)]
        values = [np.frombuffer(each.infer_response.raw_output_contents[0], "<f4")[0] for each in answers]
        assert values == [value + 2.0 for value in range(50)]


async def test_tensorflow_serving_tells_what_a_request_would_load_as_its_start(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_model(tmp_path, name, mib=60)
    config = configure(tmp_path, budget_mib=100, http={"host": "127.0.0.1", "port": 0})
    async with running(config) as site:
        address = f"http://127.0.0.1:{site.application.http_port}"
        async with httpx.AsyncClient(base_url=address, timeout=TIMEOUT_S) as web:

            async def ask(path: str) -> tuple[int, list[tuple[str, str, str]]]:
                answer = await web.get(f"/v1/models/{path}")
                rows = answer.json().get("model_version_status", [])
                return answer.status_code, [
                    (each["version"], each["state"], each["status"]["error_code"]) for each in rows
                ]

            assert await ask("a") == (200, [("1", "START", "OK")])
            assert await ask("a/versions/1") == (200, [("1", "START", "OK")])
            assert (await ask("a/versions/2"))[0] == (await ask("c"))[0] == 404
            assert BallastBackend.loads == {}, "who only asks loads nothing"
            await site.infer("a")
            assert await ask("a") == (200, [("1", "AVAILABLE", "OK")])
            await site.infer("b")  # evicts a
            assert await ask("a") == (200, [("1", "START", "OK")])


async def test_metrics_tell_what_models_are_counted_with_and_who_had_to_go(tmp_path: Path) -> None:
    write_model(tmp_path, "a", mib=60)
    write_model(tmp_path, "b", mib=60)
    config = configure(tmp_path, budget_mib=100, metrics={"host": "127.0.0.1", "port": 0})
    async with running(config) as site, httpx.AsyncClient(timeout=TIMEOUT_S) as web:
        await site.infer("a")
        await site.infer("b")
        shown = (await web.get(f"http://127.0.0.1:{site.application.metrics_port}/metrics")).text
    (line,) = (each for each in shown.splitlines() if each.startswith("aiorch_model_memory_bytes{"))
    assert line.rpartition(" ")[0] == 'aiorch_model_memory_bytes{device="cpu",model="b",version="1"}', line
    assert float(line.rpartition(" ")[2]) // MIB == 60
    assert "aiorch_model_evictions_total 1" in shown


CALLER = """
import asyncio
import numpy as np
from aiorch_backends.python.calling import call

class Model:
    inputs = [("INPUT0", "FP32", [1])]
    outputs = [("OUTPUT0", "FP32", [1])]
    max_batch_size = 8

    def load(self, context):
        self.context = context

    def execute(self, inputs):
        return {"OUTPUT0": call(self.context, "m", inputs)["OUTPUT0"]}
"""


async def test_a_model_that_calls_another_brings_it(tmp_path: Path) -> None:
    write_model(tmp_path, "m", add=2)
    (tmp_path / "caller" / "1").mkdir(parents=True)
    (tmp_path / "caller" / "1" / "model.py").write_text(CALLER)
    async with running(configure(tmp_path)) as site:
        assert await site.infer("caller") == 3.0
        assert site.ready() == ["caller", "m"]


async def test_a_caller_that_holds_the_room_its_model_needs_is_told(tmp_path: Path) -> None:
    write_model(tmp_path, "m", mib=60)
    (tmp_path / "caller" / "1").mkdir(parents=True)
    (tmp_path / "caller" / "1" / "model.py").write_text(CALLER)
    with (tmp_path / "caller" / "1" / "weights").open("wb") as file:
        file.truncate(60 << 20)
    async with running(configure(tmp_path, budget_mib=100)) as site:
        _, text = await site.refuse("caller")
        assert "taken by 'caller:1' 60 MiB" in text


async def test_models_that_call_each_other_while_they_load_are_told(tmp_path: Path) -> None:
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1" / "model.py").write_text(CALLER.replace('"m"', f'"{other}"'))
    async with running(configure(tmp_path, budget_mib=100)) as site:
        _, text = await asyncio.wait_for(site.refuse("one"), TIMEOUT_S / 2)
        assert "two" in text
