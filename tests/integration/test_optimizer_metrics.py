"""What tuners tell on /metrics: of a version with an objective, as long as there is one."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import InferenceStub
from grpc import aio
from prometheus_client.parser import text_string_to_metric_families

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig

DEADLINE_S = 30
MODEL = """
backend: "identity"
max_batch_size: 4
input [ { name: "X" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ 1 ] } ]
"""
OFF = 'parameters { key: "tuning" value { string_value: "off" } }'
SAID = 'parameters { key: "objective" value { string_value: "p95=200ms, error_budget=0.1, instances=1..2" } }'
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(client: httpx.AsyncClient) -> Samples:
    """All samples of tuners, by name and labels without the version, which is 1."""
    text = (await client.get("/metrics")).raise_for_status().text
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            if each.name.startswith(("aiorch_tuner_", "aiorch_objective_")):
                assert each.labels.pop("version") == "1"
                found[each.name, tuple(sorted(each.labels.items()))] = each.value
    return found


async def call(stub: InferenceStub) -> None:
    request = pb.ModelInferRequest(model_name="told", raw_input_contents=[np.float32(7).tobytes()])
    request.inputs.add(name="X", datatype="FP32", shape=[1, 1])
    await stub.ModelInfer(request)


async def test_the_series_of_a_tuned_version_come_and_go(tmp_path: Path) -> None:
    for name, said in (("told", SAID), ("plain", ""), ("left", OFF)):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "config.pbtxt").write_text(MODEL + said)
    config = ServerConfig.model_validate(
        {
            "repository": {"paths": [str(tmp_path)]},
            "lifecycle": {"control_mode": "explicit", "load_models": ["*"]},
            "grpc": {"port": 0},
            "http": {"enabled": False},
            "metrics": {"port": 0},
        }
    )
    told = (("model", "told"),)
    async with (
        Application(config) as app,
        aio.insecure_channel(f"127.0.0.1:{app.grpc_port}") as channel,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{app.metrics_port}", verify=False) as client,
        asyncio.timeout(DEADLINE_S),
    ):
        stub = InferenceStub(channel)
        in_time = ("aiorch_objective_requests_total", (("end", "in_time"), *told))
        while (found := await scrape(client)).get(in_time, 0) < 40:
            await asyncio.gather(*(call(stub) for _ in range(20)))
        plain = {each: value for each, value in found.items() if ("model", "plain") in each[1]}
        assert not any(name.startswith("aiorch_objective_") for name, _ in plain)
        assert ("aiorch_tuner_max_batch_size", (("model", "plain"),)) in plain
        found = {each: value for each, value in found.items() if each not in plain}
        assert {dict(labels)["model"] for _, labels in found} == {"told"}
        assert found["aiorch_objective_latency_seconds", told] == 0.2
        assert found["aiorch_objective_quantile", told] == 0.95
        assert found["aiorch_objective_error_budget", told] == 0.1
        assert found["aiorch_tuner_instances", told] in (1, 2)
        assert found["aiorch_tuner_max_batch_size", told] in (1, 2, 4)
        assert found["aiorch_tuner_delay_seconds", told] >= 0
        assert 0 < found["aiorch_tuner_measured_latency_seconds", told] < 10
        assert 0 < found["aiorch_tuner_cpu_seconds_total", told] < DEADLINE_S
        names = Counter(name for name, _ in found)
        assert sum(found[each] for each in found if each[0] == "aiorch_tuner_state") == 1
        assert names["aiorch_tuner_decisions_total"] == 9
        assert names["aiorch_objective_requests_total"] == 6
        assert (len(found), len(plain)) == (28, 19)
        await app.manager.unload("told")
        await app.manager.unload("plain")
        while await scrape(client):
            await asyncio.sleep(0.05)
