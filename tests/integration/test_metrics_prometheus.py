"""A real Prometheus scrapes the metrics door and answers queries about it."""

from pathlib import Path

from prometheus_site import ask, scraping

from aiorch_server.frontends.metrics import MetricsServer
from aiorch_server.types import Duration, ModelStatistics, PhaseHistogram

BOUNDS_S = tuple((1 << bit) / 1e9 for bit in range(13, 37))


class Model:
    def statistics(self) -> ModelStatistics:
        return ModelStatistics("digits", "2", inference_count=21, success=Duration(7, 9000), failures={"BACKEND": 2})

    def phase_histograms(self) -> dict[str, PhaseHistogram]:
        return {"total": PhaseHistogram(BOUNDS_S, (0, 4, *(0,) * (len(BOUNDS_S) - 1)), 4e-5)}


async def test_prometheus_scrapes_and_answers(tmp_path: Path) -> None:
    server = MetricsServer(lambda: [Model()], port=0)
    async with scraping(tmp_path, await server.start()) as client:
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
    await server.stop()
