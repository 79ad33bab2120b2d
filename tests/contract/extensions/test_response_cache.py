"""Cached answers through a whole server: tritonclient over both doors, counts, metrics, reloads, refusals."""

from __future__ import annotations

import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from running_site import Site
from served import serve
from tritonclient.utils import InferenceServerException

CACHED = "response_cache { enable: true }"
TENSORS = """
    input { name: "INPUT0" data_type: TYPE_FP32 dims: [1] }
    output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [1] }"""
#: Answers how often it has run; a negative input fails; an input of 100 waits for the file that its folder may get.
COUNTER = """
import pathlib, time
class Model:
    inputs, outputs, max_batch_size = [("INPUT0", "FP32", [1])], [("OUTPUT0", "FP32", [1])], 0
    runs = -1  # it is run once before it serves
    def execute(self, inputs):
        self.runs += 1
        value = inputs["INPUT0"][0]
        if value < 0:
            raise ValueError(f"no {self.runs}")
        if value >= 100:
            gate, until = pathlib.Path(GATE), time.monotonic() + 20
            while not gate.exists() and time.monotonic() < until:
                time.sleep(0.005)
        return {"OUTPUT0": inputs["INPUT0"] * 0 + self.runs}
"""
MODELS = {
    "counter": f'backend: "python" max_batch_size: 0 {TENSORS} {CACHED}',
    "plain": f'backend: "python" max_batch_size: 0 {TENSORS}',
    "pair": f"""max_batch_size: 0 {TENSORS} {CACHED}
        ensemble_scheduling {{ step [ {{ model_name: "plain" model_version: -1
            input_map {{ key: "INPUT0" value: "INPUT0" }} output_map {{ key: "OUTPUT0" value: "OUTPUT0" }} }} ] }}""",
}
#: Its step is cached as well.
OUTER = MODELS["pair"].replace("plain", "pair")
BACKENDS = ["aiorch_backends.identity:IdentityBackend", "aiorch_backends.python:PythonBackend"]
LIBRARIES = {"grpc": grpc_client, "http": http_client}


def write_model(root: Path, name: str, config: str) -> None:
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(config)
    if "ensemble" not in config:
        gate = str(root.parent / "gate")
        (root / name / "1" / "model.py").write_text(COUNTER.replace("GATE", repr(gate)))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name, config in MODELS.items():
        write_model(tmp_path / "models", name, config)
    return tmp_path / "models"


@pytest.fixture
def site(repository: Path) -> Iterator[Site]:
    opened = Site(
        repository,
        io_threads=1,
        cache={"kind": "local", "size_bytes": 1 << 20},
        execution={"backends": BACKENDS},
        lifecycle={"control_mode": "explicit", "load_models": ["*"]},
        metrics={"port": 0},
    )
    yield opened
    opened.close()


def infer(site: Site, door: str, value: float, model: str = "counter", **options: Any) -> float:
    library = LIBRARIES[door]
    with library.InferenceServerClient(site.target if door == "grpc" else site.http) as client:
        tensor = library.InferInput("INPUT0", [1], "FP32")
        tensor.set_data_from_numpy(np.array([value], np.float32))
        found = client.infer(model, [tensor], **options)
        return float(found.as_numpy("OUTPUT0")[0])


def read_statistics(site: Site, model: str = "counter") -> Any:
    with grpc_client.InferenceServerClient(site.target) as client:
        return client.get_inference_statistics(model).model_stats[0]


def read_metrics(site: Site) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{site.application.metrics_port}/metrics") as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE)}


def test_both_doors_share_one_cache_and_the_counts_tell(site: Site) -> None:
    assert [infer(site, door, 1) for door in ("grpc", "http", "grpc")] == [1, 1, 1]
    assert infer(site, "http", 2) == 2
    assert infer(site, "grpc", 1, request_id="other") == 1
    counts = read_statistics(site)
    stats = counts.inference_stats
    assert (stats.cache_hit.count, stats.cache_miss.count) == (3, 2)
    assert (stats.success.count, stats.queue.count, stats.compute_infer.count) == (5, 5, 2)
    assert (counts.inference_count, counts.execution_count) == (2, 2)
    assert stats.cache_hit.ns > 0 and stats.cache_miss.ns > 0
    with http_client.InferenceServerClient(site.http) as client:
        found = client.get_inference_statistics("counter")["model_stats"][0]["inference_stats"]
        assert (found["cache_hit"]["count"], found["cache_miss"]["count"]) == (3, 2)
        assert "response_cache" in client.get_server_metadata()["extensions"]
        assert client.get_model_config("counter")["response_cache"] == {"enable": True}
    metrics = read_metrics(site)
    labels = '{model="counter",version="1"}'
    assert metrics[f"nv_cache_num_hits_per_model{labels}"] == 3
    assert metrics[f"nv_cache_num_misses_per_model{labels}"] == 2
    assert metrics[f"nv_inference_request_success{labels}"] == 5
    assert not [name for name in metrics if name.startswith("nv_cache") and 'model="plain"' in name]
    assert metrics["aiorch_cache_entries"] == 2
    assert 0 < metrics["aiorch_cache_used_bytes"] < 1 << 20


def test_a_model_that_does_not_ask_for_it_runs_each_time(site: Site) -> None:
    assert [infer(site, "grpc", 1, "plain") for _ in range(3)] == [1, 2, 3]


def test_an_ensemble_is_cached_as_a_whole(site: Site) -> None:
    assert [infer(site, door, 1, "pair") for door in ("grpc", "http")] == [1, 1]
    assert read_statistics(site, "plain").execution_count == 1


def test_an_ensemble_forgets_when_a_step_changes(site: Site, repository: Path) -> None:
    write_model(repository, "outer", OUTER)
    with grpc_client.InferenceServerClient(site.target) as client:
        client.load_model("outer")
        models = ("pair", "outer")
        assert [infer(site, "grpc", 1, model) for model in models * 2] == [1, 1, 1, 1]
        path = repository / "plain" / "1" / "model.py"
        path.write_text(path.read_text().replace("runs = -1", "runs = 40"))
        client.load_model("plain")
        assert [infer(site, "grpc", 1, model) for model in models * 2] == [42, 42, 42, 42]


def test_failures_and_bad_requests_are_not_kept(site: Site) -> None:
    for run in (1, 2):
        with pytest.raises(InferenceServerException, match=f"no {run}"):
            infer(site, "grpc", -1)
    with pytest.raises(InferenceServerException, match="unexpected inference output 'Z'"):
        infer(site, "grpc", 5, outputs=[grpc_client.InferRequestedOutput("Z")])
    assert read_statistics(site).inference_stats.cache_miss.count == 0
    assert infer(site, "grpc", 1) == 3


def test_parameters_and_requested_outputs_count(site: Site) -> None:
    assert infer(site, "grpc", 1) == 1
    assert infer(site, "grpc", 1, parameters={"mode": "x"}) == 2
    # the model's only output: it is what is asked for without a name
    assert infer(site, "grpc", 1, outputs=[grpc_client.InferRequestedOutput("OUTPUT0")]) == 1
    assert infer(site, "grpc", 1, parameters={"mode": "x"}, timeout=5_000_000) == 2


def test_a_changed_artefact_or_configuration_forgets(site: Site, repository: Path) -> None:
    assert infer(site, "grpc", 1) == 1
    artefact = repository / "counter" / "1" / "model.py"
    artefact.write_text(artefact.read_text().replace("* 0", "* 0 + 40"))
    with grpc_client.InferenceServerClient(site.target) as client:
        client.load_model("counter")
        assert infer(site, "grpc", 1) == 41
        config = repository / "counter" / "config.pbtxt"
        config.write_text(config.read_text() + ' parameters { key: "a" value { string_value: "b" } }')
        client.load_model("counter")
        assert infer(site, "http", 1) == 41
        assert read_statistics(site).execution_count == 1


def test_equal_requests_under_way_run_once_and_a_cancelled_one_harms_none(site: Site, repository: Path) -> None:
    def count_waiting() -> int:
        (servable,) = (each for each in site.application.manager.servables() if each.name == "counter")
        assert servable.cache is not None
        return servable.cache._waiting

    done = threading.Semaphore(0)
    found: list[Any] = []

    def keep(result: Any, error: Any) -> None:
        found.append(error if error is not None else float(result.as_numpy("OUTPUT0")[0]))
        done.release()

    tensor = grpc_client.InferInput("INPUT0", [1], "FP32")
    tensor.set_data_from_numpy(np.array([100], np.float32))
    with grpc_client.InferenceServerClient(site.target) as client:
        first = client.async_infer("counter", [tensor], keep)
        wait_until(lambda: read_pending(site) == 1)
        for _ in range(4):
            client.async_infer("counter", [tensor], keep)
        wait_until(lambda: count_waiting() == 4)
        first.cancel()
        assert done.acquire(timeout=20)
        wait_until(lambda: count_waiting() == 3)  # one of them runs in its place
        (repository.parent / "gate").touch()
        for _ in range(4):
            assert done.acquire(timeout=20)
    assert [type(each) for each in found] == [InferenceServerException, float, float, float, float]
    assert len({each for each in found if isinstance(each, float)}) == 1
    assert read_statistics(site).inference_stats.cache_hit.count == 3


def read_pending(site: Site) -> int:
    (servable,) = (each for each in site.application.manager.servables() if each.name == "counter")
    return int(servable.scheduler.in_flight)


def wait_until(condition: Any) -> None:
    done = threading.Event()
    for _ in range(4000):
        if condition():
            return
        done.wait(0.005)
    raise AssertionError("did not come")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MODELS["counter"], "response_cache.enable: found true, but this server keeps no answers"),
        (
            f'backend: "python" max_batch_size: 0 {TENSORS} {CACHED} model_transaction_policy {{ decoupled: true }}',
            "response_cache.enable: found true with model_transaction_policy.decoupled",
        ),
        (
            f'backend: "python" max_batch_size: 0 {TENSORS} {CACHED} sequence_batching {{ direct {{ }} }}',
            "response_cache.enable: found true beside sequence_batching",
        ),
    ],
)
def test_refused_at_load(tmp_path: Path, config: str, reason: str) -> None:
    write_model(tmp_path / "models", "counter", config)
    site = Site(
        tmp_path / "models", io_threads=1, execution={"backends": BACKENDS}, lifecycle={"control_mode": "explicit"}
    )
    try:
        with grpc_client.InferenceServerClient(site.target) as client:
            with pytest.raises(InferenceServerException) as raised:
                client.load_model("counter")
            assert reason in str(raised.value)
            assert "response_cache" not in client.get_server_metadata().extensions
    finally:
        site.close()


def test_the_options_of_both_kinds(repository: Path) -> None:
    with serve(repository, "--cache-config", "local,size=1048576", "--cache-ttl-secs", "60") as served:
        client = http_client.InferenceServerClient(served.http.removeprefix("http://"))
        assert client.get_model_config("counter")["response_cache"] == {"enable": True}
        client.close()
