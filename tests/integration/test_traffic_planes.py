"""Shares of versions where Python carries the requests: every door, sequences, ensembles, samples."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from aiorch_proto.tfserving import serving_pb2 as tf
from aiorch_proto.tfserving.service import METHODS as SERVING_METHODS
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import InferenceStub
from ensembles import write_ensemble
from sequence_models import write_tally

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig
from aiorch_server.errors import ModelExecutionError, ModelNotReady, RequestCancelled
from aiorch_server.routing import Replay, Sample, Share, Traffic
from aiorch_server.types import InferenceRequest, InferenceResponse, Tensor

DEADLINE_S = 20.0
QUARTER = (Share(1, 7_500), Share(2, 2_500))
HALF = (Share(1, 5_000), Share(2, 5_000))

MODEL = """
import threading
import numpy as np

class Model:
    inputs = [("X", "INT32", [1])]
    outputs = [("V", "INT32", [1])]

    def execute(self, i):
        if (i["X"] == 666).any():
            raise ValueError("bad luck")
        return {"V": np.full_like(i["X"], {version})}
"""
#: Takes another tensor than MODEL.
OTHER = MODEL.replace('"X"', '"Z"')


def write_versions(root: Path, name: str, config: str = "", *codes: str) -> None:
    for version, code in enumerate(codes or (MODEL, MODEL), 1):
        (root / name / str(version)).mkdir(parents=True)
        (root / name / str(version) / "model.py").write_text(code.replace("{version}", str(version)))
    text = f'backend: "python" max_batch_size: 8 version_policy {{ all {{}} }} {config}'
    (root / name / "config.pbtxt").write_text(text)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_versions(root, "plain")
    write_versions(root, "cached", "response_cache { enable: true }")
    write_versions(root, "odd", "", MODEL, OTHER)
    write_ensemble(root, "chain", [("plain", {"X": "IN"}, {"V": "OUT"})], datatype="TYPE_INT32", dims="[1]")
    cached = "response_cache { enable: true }"
    write_ensemble(root, "kept", [("plain", {"X": "IN"}, {"V": "OUT"})], datatype="TYPE_INT32", dims="[1]", more=cached)
    write_tally(root, "tally")
    shutil.copytree(root / "tally" / "1", root / "tally" / "2")
    with (root / "tally" / "config.pbtxt").open("a") as config:
        config.write("\nversion_policy { all {} }\n")
    return root


class Site:
    def __init__(self, app: Application, stub: InferenceStub, serving: Any, web: httpx.AsyncClient) -> None:
        self.app, self.stub, self.serving, self.web = app, stub, serving, web
        self.manager, self.samples = app.manager, app.dataplane.samples

    def turns(self, model: str) -> int:
        """Requests that were counted to shares."""
        route = self.manager._routes[model]
        return 0 if route.shares is None else route.shares.turns


@contextlib.asynccontextmanager
async def serving(root: Path, transport: str = "native") -> AsyncIterator[Site]:
    config = {
        "grpc": {"port": 0, "transport": transport},
        "http": {"port": 0},
        "metrics": {"port": 0},
        "repository": {"paths": [str(root)]},
        "cache": {"kind": "local"},
        "execution": {"backends": ["aiorch_backends.python:PythonBackend"]},
    }
    async with (
        Application(ServerConfig.model_validate(config)) as app,
        grpc.aio.insecure_channel(f"127.0.0.1:{app.grpc_port}") as channel,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{app.http_port}", timeout=DEADLINE_S) as web,
    ):
        method = SERVING_METHODS["Predict"]
        predict = channel.unary_unary(
            method.path, request_serializer=tf.PredictRequest.SerializeToString,
            response_deserializer=tf.PredictResponse.FromString,
        )  # fmt: skip
        yield Site(app, InferenceStub(channel), predict, web)


@pytest.fixture
async def site(repository: Path) -> AsyncIterator[Site]:
    async with serving(repository) as site:
        yield site


def make_request(model: str, value: int = 1, name: str = "X", **parameters: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, raw_input_contents=[np.array([[value]], np.int32).tobytes()])
    tensor = request.inputs.add()
    tensor.name, tensor.datatype, tensor.shape[:] = name, "INT32", [1, 1]
    for key, given in parameters.items():
        field = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(given)]
        setattr(request.parameters[key], field, given)
    return request


async def infer(site: Site, model: str, count: int, **options: Any) -> list[int]:
    request = make_request(model, name="IN" if model in ("chain", "kept") else "X")
    answers = [await site.stub.ModelInfer(request, timeout=DEADLINE_S, **options) for _ in range(count)]
    return [int.from_bytes(answer.raw_output_contents[0], "little") for answer in answers]


async def stream(site: Site, model: str, count: int, **options: Any) -> list[int]:
    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        for _ in range(count):
            yield make_request(model)

    call = site.stub.ModelStreamInfer(requests(), timeout=DEADLINE_S, **options)
    return [int(answer.infer_response.model_version) async for answer in call]


async def post(site: Site, path: str, count: int, document: Any, **options: Any) -> list[Any]:
    answers = [await site.web.post(path, json=document, **options) for _ in range(count)]
    assert {answer.status_code for answer in answers} == {200}, answers[0].text
    return [answer.json() for answer in answers]


async def ask(site: Site, way: str, model: str, count: int, key: str = "") -> list[int]:
    """The versions that answered; by metadata or header with a key."""
    metadata = {"metadata": (("aiorch-route-key", key),)} if key else {}
    headers = {"headers": {"aiorch-route-key": key}} if key else {}
    tensor = {"name": "X", "datatype": "INT32", "shape": [1, 1], "data": [1]}
    match way:
        case "infer":
            return await infer(site, model, count, **metadata)
        case "stream":
            return await stream(site, model, count, **metadata)
        case "rest":
            answers = await post(site, f"/v2/models/{model}/infer", count, {"inputs": [tensor]}, **headers)
            return [int(each["model_version"]) for each in answers]
        case "generate":
            answers = await post(site, f"/v2/models/{model}/generate", count, {"X": 1}, **headers)
            return [int(each["model_version"]) for each in answers]
        case "predict":
            request = tf.PredictRequest(model_spec={"name": model})
            request.inputs["X"].dtype = 3
            request.inputs["X"].tensor_shape.dim.add(size=1)
            request.inputs["X"].tensor_shape.dim.add(size=1)
            request.inputs["X"].int_val.append(1)
            found = [await site.serving(request, timeout=DEADLINE_S, **metadata) for _ in range(count)]
            assert all(each.outputs["V"].int_val[0] == each.model_spec.version.value for each in found)
            return [each.model_spec.version.value for each in found]
        case "v1":
            answers = await post(site, f"/v1/models/{model}:predict", count, {"instances": [[1]]}, **headers)
            return [each["predictions"][0][0] for each in answers]
    raise AssertionError(way)


WAYS = pytest.mark.parametrize("way", ["infer", "stream", "rest", "generate", "predict", "v1"])


@WAYS
@pytest.mark.parametrize("model", ["plain", "cached"])
@pytest.mark.parametrize("sampled", [0, 3_000])
async def test_each_door_keeps_the_shares_and_counts_each_request_once(
    site: Site, way: str, model: str, sampled: int
) -> None:
    assert set(await ask(site, way, model, 3)) == {2}
    site.manager.set_traffic(model, Traffic(QUARTER, sampled=sampled))
    assert abs(Counter(await ask(site, way, model, 40))[2] - 10) <= 2
    assert site.turns(model) == 40


@WAYS
async def test_each_door_knows_the_key(site: Site, way: str) -> None:
    site.manager.set_traffic("plain", Traffic(HALF, is_sticky=True, sampled=3_000))
    places = {}
    for key in ("anna", "berta", "carl", "dora", "emil", "frieda"):
        (places[key],) = set(await ask(site, way, "plain", 3, key))
    assert places == {key: (await infer(site, "plain", 1, metadata=(("aiorch-route-key", key),)))[0] for key in places}
    assert set(places.values()) == {1, 2}


async def test_grpcio_has_the_same_shares(repository: Path) -> None:
    async with serving(repository, "grpcio") as site:
        site.manager.set_traffic("plain", Traffic(QUARTER, is_sticky=True))
        assert abs(Counter(await ask(site, "infer", "plain", 40))[2] - 10) <= 2
        assert len(set(await ask(site, "infer", "plain", 5, "anna"))) == 1


async def test_looking_counts_nothing_and_sees_the_stable_version(site: Site) -> None:
    site.manager.set_traffic("odd", Traffic((Share(1, 5_000), Share(2, 5_000))))
    for _ in range(3):
        metadata = await site.stub.ModelMetadata(pb.ModelMetadataRequest(name="odd"), timeout=DEADLINE_S)
        assert [tensor.name for tensor in metadata.inputs] == ["X"]
        assert (await site.stub.ModelReady(pb.ModelReadyRequest(name="odd"), timeout=DEADLINE_S)).ready
        await site.stub.ModelConfig(pb.ModelConfigRequest(name="odd"), timeout=DEADLINE_S)
        await site.stub.ModelStatistics(pb.ModelStatisticsRequest(name="odd"), timeout=DEADLINE_S)
        assert (await site.web.get("/v1/models/odd/metadata")).status_code == 200
        assert "X" in (await site.web.get("/v1/models/odd/metadata")).text
    assert site.turns("odd") == 0
    site.manager.set_traffic("odd", None)
    metadata = await site.stub.ModelMetadata(pb.ModelMetadataRequest(name="odd"), timeout=DEADLINE_S)
    assert [tensor.name for tensor in metadata.inputs] == ["Z"]


async def test_a_version_with_another_signature_refuses_its_share(site: Site) -> None:
    site.manager.set_traffic("odd", Traffic(HALF))
    outcomes = []
    for _ in range(20):
        try:
            outcomes.append((await infer(site, "odd", 1))[0])
        except grpc.aio.AioRpcError as error:
            outcomes.append(error.code())
            assert "missing required input(s) ['Z']" in str(error.details())
    assert Counter(outcomes) == {1: 10, grpc.StatusCode.INVALID_ARGUMENT: 10}
    assert site.turns("odd") == 20


async def test_steps_of_ensembles_have_the_shares(site: Site) -> None:
    assert set(await infer(site, "chain", 3)) == {2}
    site.manager.set_traffic("plain", Traffic(QUARTER, is_sticky=True))
    assert abs(Counter(await infer(site, "chain", 40))[2] - 10) <= 2
    for key in ("anna", "berta", "carl", "dora"):
        metadata = (("aiorch-route-key", key),)
        assert await infer(site, "chain", 1, metadata=metadata) == await infer(site, "plain", 1, metadata=metadata)


async def test_an_ensemble_keeps_no_answers_of_a_version_without_a_share(site: Site) -> None:
    for shares, expected in (((Share(1, 10_000),), 1), ((Share(2, 10_000), Share(1, 0)), 2), (None, 2)):
        site.manager.set_traffic("plain", None if shares is None else Traffic(shares))
        assert await infer(site, "kept", 2) == [expected] * 2


async def test_shares_without_a_ready_version_refuse(site: Site) -> None:
    site.manager.set_traffic("plain", Traffic((Share(8, 6_000), Share(9, 4_000), Share(2, 0))))
    with pytest.raises(grpc.aio.AioRpcError, match="'plain' version 8, 9 is not at ready state"):
        await infer(site, "plain", 1)
    with pytest.raises(ModelNotReady, match="'plain' version 8, 9 is not at ready state"):
        site.manager.find("plain")
    assert site.manager.find("plain", "2").version == 2
    assert not site.manager.is_ready("plain")


# sequences


async def say(site: Site, id: int | str, value: int, *, start: bool = False, end: bool = False) -> tuple[int, int]:
    """The version that answered, and the sum of the sequence."""
    request = make_request("tally", sequence_id=id, sequence_start=start, sequence_end=end)
    request.inputs[0].name, request.inputs[0].datatype = "value", "INT64"
    request.raw_input_contents[0] = np.array([[value]], np.int64).tobytes()
    answer = await site.stub.ModelInfer(request, timeout=DEADLINE_S)
    names = [output.name for output in answer.outputs]
    return int(answer.model_version), int(np.frombuffer(answer.raw_output_contents[names.index("total")], np.int64)[0])


async def test_a_sequence_stays_where_it_began_whatever_the_shares_become(site: Site) -> None:
    site.manager.set_traffic("tally", Traffic(HALF))
    begun = {id: (await say(site, id, 1, start=True))[0] for id in range(1, 5)}
    assert set(begun.values()) == {1, 2}
    for shares in ((Share(1, 10_000), Share(2, 0)), (Share(2, 10_000),), None):
        site.manager.set_traffic("tally", None if shares is None else Traffic(shares))
        for id, version in begun.items():
            assert (await say(site, id, 1))[0] == version
    for id, version in begun.items():
        assert await say(site, id, 1, end=True) == (version, 5)
    site.manager.set_traffic("tally", Traffic((Share(2, 10_000), Share(1, 0))))
    for id in begun:  # anew: by the shares of now
        assert await say(site, id, 1, start=True, end=True) == (2, 1)
    assert site.turns("tally") >= 4


async def test_sequences_in_one_stream_each_stay(site: Site) -> None:
    site.manager.set_traffic("tally", Traffic(HALF))
    ids, steps = range(1, 5), 5

    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        for step in range(steps):
            for id in ids:
                request = make_request(
                    "tally", sequence_id=id, sequence_start=step == 0, sequence_end=step == steps - 1
                )
                request.id = str(id)
                request.inputs[0].name, request.inputs[0].datatype = "value", "INT64"
                request.raw_input_contents[0] = np.array([[1]], np.int64).tobytes()
                yield request

    places: dict[str, list[str]] = {}
    async for answer in site.stub.ModelStreamInfer(requests(), timeout=DEADLINE_S):
        assert not answer.error_message
        places.setdefault(answer.infer_response.id, []).append(answer.infer_response.model_version)
    assert {tuple(versions) for versions in places.values()} == {("1",) * steps, ("2",) * steps}


# samples


class Recorder:
    """An observer that keeps what it gets, holds it at its gate, and runs it on version 2 too if it shall."""

    def __init__(self, replays: bool = False) -> None:
        self.samples: list[Sample] = []
        self.replayed: list[InferenceResponse] = []
        self.replays = replays
        self.gate = asyncio.Event()
        self.gate.set()
        self.arrived = asyncio.Semaphore(0)

    async def observe(self, sample: Sample, replay: Replay) -> None:
        await self.gate.wait()
        self.samples.append(sample)
        if self.replays:
            self.replayed.append(await replay(sample.request, 2))
        self.arrived.release()

    async def wait(self, count: int = 1) -> None:
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(count):
                await self.arrived.acquire()


def sample_all(site: Site, *observers: Any, model: str = "plain", shares: tuple[Share, ...] = QUARTER) -> None:
    site.samples.set_sampling(model, *observers)
    site.manager.set_traffic(model, Traffic(shares, sampled=10_000))


async def test_an_observer_gets_request_answer_and_time_and_can_run_it_again(site: Site) -> None:
    recorder = Recorder(replays=True)
    sample_all(site, recorder, shares=(Share(1, 10_000),))
    assert await infer(site, "plain", 3) == [1, 1, 1]
    await recorder.wait(3)
    for sample in recorder.samples:
        assert (sample.servable.name, sample.servable.version, sample.error) == ("plain", 1, None)
        assert [tensor.data for tensor in sample.request.inputs] == [np.array([1], np.int32).tobytes()]
        assert sample.answer is not None and type(sample.answer.outputs[0].data) is bytes
        assert 0 < sample.latency_ns < DEADLINE_S * 1e9
    assert [answer.model_version for answer in recorder.replayed] == ["2", "2", "2"]
    counts = {
        each.version: each.statistics().success.count for each in site.manager.servables() if each.name == "plain"
    }
    assert counts == {1: 3, 2: 3}
    assert site.turns("plain") == 3  # a replay is no request of the shares
    async with asyncio.timeout(DEADLINE_S):
        while site.samples.held_bytes:
            await asyncio.sleep(0.001)


async def test_an_observer_hears_of_errors_and_of_callers_who_left(site: Site) -> None:
    recorder = Recorder()
    sample_all(site, recorder)
    with pytest.raises(grpc.aio.AioRpcError):
        await site.stub.ModelInfer(make_request("plain", 666), timeout=DEADLINE_S)
    await recorder.wait()
    (sample,) = recorder.samples
    assert sample.answer is None and isinstance(sample.error, ModelExecutionError)
    request = InferenceRequest("plain", "", [Tensor("X", "INT32", (1, 1), bytes(4))])
    caller = asyncio.create_task(site.app.dataplane.infer(request))
    await asyncio.sleep(0)
    caller.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await caller
    await recorder.wait()
    assert isinstance(recorder.samples[1].error, RequestCancelled)


async def test_nobody_waits_for_an_observer_and_what_is_too_much_is_dropped(site: Site) -> None:
    recorder = Recorder()
    recorder.gate.clear()
    sample_all(site, recorder)
    assert len(await infer(site, "plain", 50)) == 50
    counts = site.samples.counts()["plain"]
    assert (counts.taken, counts.dropped) == (32, 18)
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://127.0.0.1:{site.app.metrics_port}/metrics")).text
    assert 'aiorch_samples_dropped_total{model="plain"} 18' in text
    assert 'aiorch_samples_total{model="plain"} 32' in text
    recorder.gate.set()
    await recorder.wait(32)
    assert await infer(site, "plain", 1)
    await recorder.wait()


async def test_an_observer_that_fails_harms_nobody(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        async def observe(self, sample: Sample, replay: Replay) -> None:
            raise RuntimeError("a fault")

    recorder = Recorder()
    sample_all(site, Broken(), recorder)
    assert len(await infer(site, "plain", 5)) == 5
    await recorder.wait(5)
    assert [record.levelname for record in caplog.records if "an observer of 'plain' failed" in record.message] == [
        "WARNING"
    ]


async def test_the_end_does_not_wait_for_observers(repository: Path) -> None:
    recorder = Recorder()
    recorder.gate.clear()
    async with serving(repository) as site:
        sample_all(site, recorder)
        assert len(await infer(site, "plain", 2)) == 2
        async with asyncio.timeout(DEADLINE_S):
            await site.app.stop()
    assert recorder.samples == []


async def test_sequences_and_named_versions_are_in_no_sample(site: Site) -> None:
    recorder = Recorder()
    for model in ("plain", "tally"):
        sample_all(site, recorder, model=model)
    request = make_request("plain")
    request.model_version = "1"
    await site.stub.ModelInfer(request, timeout=DEADLINE_S)
    await say(site, 5, 1, start=True, end=True)
    assert await ask(site, "rest", "plain", 1)
    await recorder.wait()
    assert [sample.request.model_version for sample in recorder.samples] == [""]
