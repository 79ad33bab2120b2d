"""A real Prometheus scrapes the metrics door and answers queries about it."""

import asyncio
import contextlib
import shutil
import socket

import httpx

from aiorch_server.frontends.metrics import MetricsServer
from aiorch_server.types import Duration, ModelStatistics, PhaseHistogram

PROMETHEUS = shutil.which("prometheus")
DEADLINE_S = 60
BOUNDS_S = tuple((1 << bit) / 1e9 for bit in range(13, 37))
CONFIG = """
global: {{scrape_interval: 250ms, scrape_timeout: 250ms}}
scrape_configs:
  - job_name: aiorch
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


class Model:
    def statistics(self) -> ModelStatistics:
        return ModelStatistics("digits", "2", inference_count=21, success=Duration(7, 9000), failures={"BACKEND": 2})

    def phase_histograms(self) -> dict[str, PhaseHistogram]:
        return {"total": PhaseHistogram(BOUNDS_S, (0, 4, *(0,) * (len(BOUNDS_S) - 1)), 4e-5)}


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


async def ask(client: httpx.AsyncClient, query: str) -> list[dict]:
    """The result of an instant query as soon as there is one."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(httpx.TransportError):
                response = await client.get("/api/v1/query", params={"query": query})
                if response.status_code == 200 and response.json()["data"]["result"]:
                    return response.json()["data"]["result"]
            await asyncio.sleep(0.1)


async def test_prometheus_scrapes_and_answers(tmp_path):
    assert PROMETHEUS is not None, "Prometheus is not installed: 'make test' does it, or 'apt-get install prometheus'"
    server = MetricsServer(lambda: [Model()], port=0)
    (tmp_path / "prometheus.yml").write_text(CONFIG.format(port=await server.start()))
    address = f"127.0.0.1:{find_free_port()}"
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            PROMETHEUS,
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address={address}",
            stdout=log,
            stderr=log,
        )
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}", verify=False, timeout=10) as client:
            (count,) = await ask(client, 'nv_inference_count{model="digits",version="2"}')
            assert count["value"][1] == "21"
            assert count["metric"]["job"] == "aiorch"
            (failures,) = await ask(client, 'nv_inference_request_failure{reason="BACKEND"}')
            assert failures["value"][1] == "2"
            (median,) = await ask(client, 'histogram_quantile(0.5, aiorch_request_phase_seconds_bucket{phase="total"})')
            assert BOUNDS_S[0] < float(median["value"][1]) < BOUNDS_S[1]
            (up,) = await ask(client, "up == 1")
            assert up["metric"]["job"] == "aiorch"
            targets = (await client.get("/api/v1/targets")).json()["data"]["activeTargets"]
            assert [target["lastError"] for target in targets] == [""]
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), DEADLINE_S)
        await server.stop()
