"""Each query of the Grafana dashboard, asked of a real Prometheus that scrapes a real server under load."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import InferenceStub
from prometheus_site import ask, scraping

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "aiorchestrator.json").read_text())
VARIABLES = {"server": ".*", "model": "watched", "version": "1", "__rate_interval": "5s", "__interval": "5s"}
#: What may have nothing to show: knobs need not move under a load so short.
ALLOWED_EMPTY = {"batch size moved", "delay moved", "instances moved", "undone"}
DEADLINE_S = 45
MODEL = """
backend: "identity"
max_batch_size: 4
input [ { name: "X" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ 1 ] } ]
parameters { key: "execute_delay_us" value { string_value: "20000" } }
parameters { key: "objective" value { string_value: "p95=60ms, instances=1" } }
"""
#: Requests/s in turn, each for so long; 200 of them can be answered.
OFFERED, TURN_S = (50.0, 300.0), 2.0


def queries() -> Iterator[tuple[str, str]]:
    """Panels and marks: (title and letter, query with Grafana's variables)."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for mark in DASHBOARD["annotations"]["list"]:
        yield mark["name"], mark["expr"]


def put_in(query: str) -> str:
    """The query with what Grafana would put in for its variables."""
    return re.sub(r"\$(\w+)", lambda found: VARIABLES[found[1]], query)


@asynccontextmanager
async def loading(port: int) -> AsyncIterator[None]:
    """Now few requests, now more than can be answered, as long as it lasts: that teaches what each batch takes."""

    async def call(stub: InferenceStub) -> None:
        request = pb.ModelInferRequest(model_name="watched", raw_input_contents=[np.float32(7).tobytes()])
        request.inputs.add(name="X", datatype="FP32", shape=[1, 1])
        try:
            await stub.ModelInfer(request)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE

    async def offer() -> None:
        random, began_s = np.random.default_rng(1), time.monotonic()
        due_s = began_s
        async with asyncio.TaskGroup() as calls:
            while not is_over.is_set():
                due_s += random.exponential(1 / OFFERED[int((due_s - began_s) / TURN_S) % len(OFFERED)])
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                calls.create_task(call(stub))

    is_over = asyncio.Event()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = InferenceStub(channel)
        offering = asyncio.create_task(offer())
        try:
            yield
        finally:
            is_over.set()
            await offering


async def find_silent(client: httpx.AsyncClient, since_s: float) -> dict[str, str]:
    """Queries that have given no number since then."""
    silent = {}
    for title, query in queries():
        asked = {"query": put_in(query), "start": since_s, "end": time.time(), "step": 0.5}
        response = await client.get("/api/v1/query_range", params=asked)
        assert response.status_code == 200, f"{title}: {response.text}"
        values = [float(value) for series in response.json()["data"]["result"] for _, value in series["values"]]
        if not any(math.isfinite(value) for value in values):
            silent[title] = asked["query"]
    return silent


async def test_every_panel_has_something_to_show(tmp_path: Path) -> None:
    (tmp_path / "models" / "watched" / "1").mkdir(parents=True)
    (tmp_path / "models" / "watched" / "config.pbtxt").write_text(MODEL)
    config = ServerConfig.model_validate(
        {
            "repository": {"paths": [str(tmp_path / "models")]},
            "grpc": {"port": 0},
            "http": {"enabled": False},
            "metrics": {"port": 0},
        }
    )
    since_s = time.time()
    async with Application(config) as app:
        assert app.grpc_port and app.metrics_port
        async with scraping(tmp_path, app.metrics_port) as client, loading(app.grpc_port):
            await ask(client, "aiorch_objective_requests_total")
            silent = await find_silent(client, since_s)
            while silent.keys() - ALLOWED_EMPTY and time.time() - since_s < DEADLINE_S:
                await asyncio.sleep(0.5)
                silent = await find_silent(client, since_s)
    assert {title: silent[title] for title in silent.keys() - ALLOWED_EMPTY} == {}


def test_the_file_is_what_its_script_writes() -> None:
    subprocess.run([sys.executable, FOLDER / "write_dashboard.py", "--check"], check=True, timeout=30)


def test_panels_are_told_apart_and_lie_apart() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    places = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24
