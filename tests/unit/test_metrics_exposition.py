"""The metrics page: names, types, labels and numbers in both text formats."""

import dataclasses
import math
import re

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import CollectorRegistry

from aiorch_server import __version__
from aiorch_server.frontends.metrics import MetricsServer
from aiorch_server.observability.collector import ModelCollector
from aiorch_server.observability.exposition import render_metrics
from aiorch_server.types import BatchStatistics, Duration, ModelStatistics, PhaseHistogram

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
BOUNDS_S = tuple((1 << bit) / 1e9 for bit in range(13, 37))
PHASES = ("queue", "batch_wait", "compute_input", "infer", "compute_output", "total")
COUNTERS = {
    "nv_inference_request_success": 7.0,
    "nv_inference_count": 21.0,
    "nv_inference_exec_count": 3.0,
    "nv_inference_request_duration_us": 9000.0,
    "nv_inference_queue_duration_us": 1000.0,
    "nv_inference_compute_input_duration_us": 2000.0,
    "nv_inference_compute_infer_duration_us": 4000.0,
    "nv_inference_compute_output_duration_us": 500.0,
}


class Model:
    def __init__(self, name="digits", version="2", *, failure: Exception | None = None) -> None:
        self.name = name
        self.version = version
        self.failure = failure

    def statistics(self) -> ModelStatistics:
        if self.failure is not None:
            raise self.failure
        return ModelStatistics(
            self.name,
            self.version,
            inference_count=21,
            execution_count=3,
            success=Duration(7, 9_000_999),
            fail=Duration(3, 1),
            queue=Duration(7, 1_000_000),
            compute_input=Duration(7, 2_000_000),
            compute_infer=Duration(7, 4_000_000),
            compute_output=Duration(7, 500_000),
            batches=(BatchStatistics(7, Duration(), Duration(), Duration()),),
            failures={"BACKEND": 2, "REJECTED": 1},
            pending=4,
        )

    def phase_histograms(self) -> dict[str, PhaseHistogram]:
        counts = (1, 2, *(0,) * (len(BOUNDS_S) - 3), 3, 1)
        return {phase: PhaseHistogram(BOUNDS_S, counts, 0.25) for phase in PHASES}


def render(*models: Model, accept: str | None = None) -> str:
    registry = CollectorRegistry()
    registry.register(ModelCollector(lambda: models))
    return render_metrics(registry, accept)[0].decode()


def samples_of(text: str, accept: str | None) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    parse = parse_openmetrics if accept else parse_text
    samples = {}
    for family in parse(text):
        for sample in family.samples:
            name = sample.name
            if f"\n{name}" not in text:  # the text parser renames counters to OpenMetrics' form while it reads
                name = name.removesuffix("_total")
            assert f"\n{name}" in text
            samples[name, tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def test_what_was_too_late_is_told_where_it_was():
    class Late(Model):
        def statistics(self):
            return dataclasses.replace(super().statistics(), refused_late=5, dropped_late=2)

    lines = [line for line in render(Late()).splitlines() if line.startswith("aiorch_late_requests_total")]
    assert sorted(lines) == [
        'aiorch_late_requests_total{model="digits",version="2",where="door"} 5.0',
        'aiorch_late_requests_total{model="digits",version="2",where="queue"} 2.0',
    ]


@pytest.mark.parametrize("accept", [None, OPENMETRICS])
def test_names_and_numbers_are_exact_in_both_formats(accept):
    text = render(Model(), accept=accept)
    samples = samples_of(text, accept)
    labels = (("model", "digits"), ("version", "2"))
    for name, value in COUNTERS.items():
        assert samples[name, labels] == value
    assert samples["nv_inference_pending_request_count", labels] == 4
    failures = {key[1][1][1]: value for key, value in samples.items() if key[0] == "nv_inference_request_failure"}
    assert failures == {"REJECTED": 1, "CANCELED": 0, "BACKEND": 2, "OTHER": 0}
    assert "_total" not in text


def test_types_in_text_format():
    text = render(Model())
    for name in (*COUNTERS, "nv_inference_request_failure"):
        assert f"\n# TYPE {name} counter\n" in f"\n{text}"
        assert f"\n# HELP {name} " in f"\n{text}"
    assert "# TYPE nv_inference_pending_request_count gauge\n" in text
    assert "# TYPE aiorch_request_phase_seconds histogram\n" in text
    for line in text.splitlines():  # no sample without the family whose header stands above it
        name = re.match(r"[a-z_]+", line.removeprefix("# TYPE ").removeprefix("# HELP "))[0]
        assert name.startswith(("nv_", "aiorch_")), line


def test_types_in_openmetrics():
    text = render(Model(), accept=OPENMETRICS)
    assert "# TYPE nv_inference_count unknown\n" in text and text.endswith("# EOF\n")


@pytest.mark.parametrize("accept", [None, OPENMETRICS])
def test_histograms_are_cumulative_with_the_core_bounds(accept):
    samples = samples_of(render(Model(), accept=accept), accept)
    for phase in PHASES:
        labels = {"model": "digits", "version": "2", "phase": phase}
        buckets = sorted(
            (float(dict(key[1])["le"]), value)
            for key, value in samples.items()
            if key[0] == "aiorch_request_phase_seconds_bucket" and dict(key[1])["phase"] == phase
        )
        assert [bound for bound, _ in buckets] == [*BOUNDS_S, math.inf]
        assert [value for _, value in buckets] == [1.0] + [3.0] * (len(BOUNDS_S) - 2) + [6.0, 7.0]
        key = tuple(sorted(labels.items()))
        assert samples["aiorch_request_phase_seconds_count", key] == 7
        assert samples["aiorch_request_phase_seconds_sum", key] == 0.25


@pytest.mark.parametrize("accept", [None, OPENMETRICS])
def test_label_values_are_escaped(accept):
    name = 'a"b\\c\nd {}=,#漢'
    samples = samples_of(render(Model(name), accept=accept), accept)
    assert samples["nv_inference_count", (("model", name), ("version", "2"))] == 21


def test_a_model_that_is_gone_is_left_out_and_the_others_stay():
    samples = samples_of(render(Model("gone", failure=RuntimeError("unloaded")), Model("here")), None)
    models = {dict(key[1])["model"] for key in samples}
    assert models == {"here"}


def test_two_generations_of_one_version_are_added_up():
    samples = samples_of(render(Model(), Model()), None)
    labels = (("model", "digits"), ("version", "2"))
    assert samples["nv_inference_count", labels] == 42
    key = tuple(sorted((*labels, ("phase", "total"))))
    assert samples["aiorch_request_phase_seconds_count", key] == 14
    assert samples["aiorch_request_phase_seconds_sum", key] == 0.5


def test_no_models_is_a_valid_page():
    for accept in (None, OPENMETRICS):
        assert samples_of(render(accept=accept), accept) == {}


@pytest.fixture
async def metrics():
    models: list[Model] = [Model()]
    server = MetricsServer(lambda: models, port=0)
    port = await server.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", verify=False) as client:
        yield client, models
    await server.stop()


async def test_the_page_over_http(metrics):
    client, _ = metrics
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert response.headers["content-encoding"] == "gzip"
    samples = samples_of(response.text, None)
    assert samples["nv_inference_count", (("model", "digits"), ("version", "2"))] == 21
    names = {key[0] for key in samples}
    assert {
        "process_cpu_seconds_total",
        "python_info",
        "nv_cpu_memory_total_bytes",
        "nv_cpu_memory_used_bytes",
    } <= names
    (build,) = (key[1] for key in samples if key[0] == "aiorch_build_info")
    assert dict(build)["version"] == __version__
    assert "# TYPE process_cpu_seconds_total counter\n" in response.text
    asked = await client.get("/metrics", headers={"accept": f"{OPENMETRICS};q=0.5,text/plain;version=0.0.4;q=0.3"})
    assert asked.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert samples_of(asked.text, OPENMETRICS)["process_cpu_seconds_total", ()] > 0


async def test_other_paths_and_methods(metrics):
    client, _ = metrics
    assert (await client.get("/")).status_code == 404
    assert (await client.post("/metrics")).status_code == 405
    assert (await client.head("/metrics")).status_code == 200


async def test_a_scrape_survives_models_that_fail(metrics):
    client, models = metrics
    models.append(Model("broken", failure=KeyError("x")))
    response = await client.get("/metrics")
    assert response.status_code == 200 and "broken" not in response.text and 'model="digits"' in response.text


async def test_a_fault_is_told_without_insides():
    def list_models():
        raise ZeroDivisionError("secret insides")

    server = MetricsServer(list_models, port=0)
    port = await server.start()
    try:
        async with httpx.AsyncClient(verify=False) as client:
            response = await client.get(f"http://127.0.0.1:{port}/metrics")
        assert response.status_code == 500 and "secret" not in response.text
    finally:
        await server.stop()
