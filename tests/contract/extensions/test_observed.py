"""Why did this request wait: timing in answers, the log of slow requests, traces; with real clients."""

from __future__ import annotations

import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from otlp_receiver import receive_spans
from running_site import INFER, Site, decode_values, encode_values
from served import serve

PHASES = ("queue", "batch-wait", "compute-input", "infer", "compute-output", "total")
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TIMEOUT_S = 20.0
CHAIN = """
    platform: "ensemble" max_batch_size: 8
    input { name: "INPUT0" data_type: TYPE_FP32 dims: [-1] }
    output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [-1] }
    ensemble_scheduling {
      step { model_name: "identity" model_version: -1
             input_map { key: "INPUT0" value: "INPUT0" } output_map { key: "OUTPUT0" value: "between" } }
      step { model_name: "slow" model_version: -1
             input_map { key: "INPUT0" value: "between" } output_map { key: "OUTPUT0" value: "OUTPUT0" } }
    }
"""
SLOW = """
import time
class Model:
    inputs, outputs, max_batch_size = [("INPUT0", "FP32", [-1])], [("OUTPUT0", "FP32", [-1])], 8

    def execute(self, inputs):
        time.sleep(0.02)
        if inputs["INPUT0"][0, 0] < 0:
            raise ValueError("below zero")
        return {"OUTPUT0": inputs["INPUT0"]}
"""
CALLER = """
from aiorch_backends.python.calling import call

class Model:
    inputs, outputs, max_batch_size = [("INPUT0", "FP32", [-1])], [("OUTPUT0", "FP32", [-1])], 8

    def load(self, context):
        self.context = context

    def execute(self, inputs):
        return {"OUTPUT0": call(self.context, "identity", {"INPUT0": inputs["INPUT0"]}, timeout_s=5)["OUTPUT0"]}
"""
BACKENDS = {"backends": ["aiorch_backends.identity:IdentityBackend", "aiorch_backends.python:PythonBackend"]}


@pytest.fixture(scope="module")
def watched_models(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("watched")
    for name in ("identity", "gate"):
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text((models / name / "config.pbtxt").read_text())
    (root / "chain" / "1").mkdir(parents=True)
    (root / "chain" / "config.pbtxt").write_text(CHAIN)
    (root / "slow" / "1").mkdir(parents=True)
    (root / "slow" / "config.pbtxt").write_text('backend: "python" max_batch_size: 8')
    (root / "slow" / "1" / "model.py").write_text(SLOW)
    return root


def open_watched(root: Path, **sections: Any) -> Site:
    return Site(root, io_threads=1, execution=BACKENDS, **sections)


@pytest.fixture(scope="module")
def plain(watched_models: Path) -> Iterator[Site]:
    site = open_watched(watched_models)
    yield site
    site.close()


def call(target: str, message: bytes, *metadata: tuple[str, str]) -> tuple[Any, dict[str, str]]:
    """The answer or the error, and the trailers."""
    with grpc.insecure_channel(target) as channel:
        infer = channel.unary_unary(INFER)
        try:
            answer, done = infer.with_call(message, metadata=metadata, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return error, dict(error.trailing_metadata())  # type: ignore[attr-defined]
        return answer, dict(done.trailing_metadata())


def timed(trailers: dict[str, str]) -> dict[str, float]:
    return {phase: float(trailers[f"aiorch-{phase}-us"]) for phase in PHASES}


@pytest.mark.parametrize("model", ["identity", "slow"])
def test_phases_come_with_the_answer(plain: Site, model: str) -> None:
    message = encode_values([1.0, 2.0], model)
    answer, trailers = call(plain.target, message, ("aiorch-timing", "1"))
    assert decode_values(answer) == [1.0, 2.0]
    phases = timed(trailers)
    assert phases["total"] >= sum(phases[phase] for phase in PHASES[:-1]) - 1.0
    assert phases["infer"] >= (20_000 if model == "slow" else 0)
    assert (trailers["aiorch-batch-size"], trailers["aiorch-model-version"]) == ("1", "1")
    _, trailers = call(plain.target, message)
    assert not [name for name in trailers if name.startswith("aiorch-")]
    _, trailers = call(plain.target, message, ("aiorch-timing", "0"))
    assert not [name for name in trailers if name.startswith("aiorch-")]


def test_an_ensemble_tells_the_sum_of_its_steps(plain: Site) -> None:
    _, trailers = call(plain.target, encode_values([1.0], "chain"), ("aiorch-timing", "1"))
    phases = timed(trailers)
    assert phases["infer"] >= 20_000 and phases["total"] >= phases["infer"]


def test_a_failed_request_tells_its_phases(plain: Site) -> None:
    error, trailers = call(plain.target, encode_values([-1.0], "slow"), ("aiorch-timing", "1"))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert timed({**{f"aiorch-{phase}-us": "0" for phase in PHASES}, **trailers})["total"] >= 20_000


def test_http_tells_the_phases(plain: Site) -> None:
    body = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}
    url = f"http://{plain.http}/v2/models/slow/infer"
    answer = httpx.post(url, json=body, headers={"aiorch-timing": "1"}, timeout=TIMEOUT_S)
    assert answer.status_code == 200
    found = dict(re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"]))
    assert found.keys() == {phase.replace("-", "_") for phase in PHASES}
    assert float(found["infer"]) >= 20.0 and 'batch_size;desc="1"' in answer.headers["server-timing"]
    assert "server-timing" not in httpx.post(url, json=body, timeout=TIMEOUT_S).headers


def test_slow_requests_are_written_down(watched_models: Path) -> None:
    """Of the compiled path and of the others; with phases and trace, without data, and not without end."""
    options = ("--log-format", "json", "--log-slow-us", "10000", "--set", "log_slow_lines_per_s=2")
    with serve(watched_models, *options) as served:
        call(served.grpc, encode_values([4711.5], "identity", id="quick"))
        parent = ("traceparent", f"00-{TRACE}-{PARENT}-00")
        call(served.grpc, encode_values([4711.5], "slow", id="first"), parent)
        # nobody comes for company: it waits, and is given up
        with grpc.insecure_channel(served.grpc) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary(INFER)(encode_values([1.0], "gate", id="given-up"), timeout=0.1)
        for _ in range(4):
            call(served.grpc, encode_values([4711.5], "slow"))
        lines = wait_for_lines(served.log, lambda found: any("count" in line for line in found))
        assert "4711" not in served.log.read_text()
    slow = [line for line in lines if line["message"] == "slow request"]
    assert {line["id"] for line in slow} >= {"first", "given-up"} and "quick" not in {line["id"] for line in slow}
    first = next(line for line in slow if line["id"] == "first")
    assert (first["model"], first["version"], first["trace_id"], first["status"]) == ("slow", 1, TRACE, 0)
    assert first["total_us"] >= first["infer_us"] >= 20_000 and first["batch_size"] == 1
    given_up = next(line for line in slow if line["id"] == "given-up")
    assert given_up["status"] in (1, 4) and given_up["queue_us"] >= 90_000 and "infer_us" not in given_up
    assert sum(line.get("count", 0) for line in lines) >= 1


def wait_for_lines(log: Path, is_wanted: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    until = time.monotonic() + TIMEOUT_S
    while True:
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        if is_wanted(lines):
            return lines
        assert time.monotonic() < until, lines
        time.sleep(0.05)


def names(spans: list[Any]) -> list[str]:
    return sorted(span.name for span in spans)


def children_of(spans: list[Any], parent: Any) -> list[Any]:
    return [span for span in spans if span.parent_span_id == parent.span_id]


def attributes_of(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


SERVER = "inference.GRPCInferenceService/ModelInfer"
STEPS = ["compute_input", "compute_output", "infer", "queue"]


def test_traces_of_callers_who_trace(watched_models: Path) -> None:
    with receive_spans() as (endpoint, receiver):
        site = open_watched(watched_models, trace={"endpoint": endpoint, "rate": 0})
        try:
            call(site.target, encode_values([1.0]), ("traceparent", f"00-{TRACE}-{PARENT}-00"))
            call(site.target, encode_values([1.0]))
            call(site.target, encode_values([1.0]), ("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "a=b"))
        finally:
            site.close()
        spans = receiver.spans
    assert receiver.paths == {"/v1/traces"} and receiver.services == {"aiorchestrator"}
    (server,) = [span for span in spans if span.name == SERVER]
    assert (server.trace_id.hex(), server.parent_span_id.hex(), server.trace_state) == (TRACE, PARENT, "a=b")
    assert server.kind == 2 and server.status.code == 0
    assert attributes_of(server)["aiorch.model.name"] == "identity"
    assert names(children_of(spans, server)) == STEPS and len(spans) == 5
    for child in children_of(spans, server):
        assert server.start_time_unix_nano <= child.start_time_unix_nano <= child.end_time_unix_nano
        assert child.end_time_unix_nano <= server.end_time_unix_nano
        assert abs(child.end_time_unix_nano / 1e9 - time.time()) < 300


def test_an_ensembles_steps_are_children_and_errors_are_told(watched_models: Path) -> None:
    with receive_spans() as (endpoint, receiver):
        site = open_watched(watched_models, trace={"endpoint": endpoint, "rate": 1})
        try:
            call(site.target, encode_values([1.0], "chain"))
            call(site.target, encode_values([-1.0], "slow"))
            body = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            httpx.post(f"http://{site.http}/v2/models/identity/infer", json=body, headers=headers)
        finally:
            site.close()
        spans = receiver.spans
    chain, failed = [span for span in spans if span.name == SERVER]
    assert not chain.parent_span_id and len(chain.trace_id) == 16
    steps = children_of(spans, chain)
    assert names(steps) == ["infer identity", "infer slow"]
    assert all(names(children_of(spans, step)) == STEPS for step in steps)
    assert failed.status.code == 2 and "below zero" in failed.status.message
    (http,) = [span for span in spans if span.name.startswith("POST ")]
    assert http.trace_id.hex() == TRACE and attributes_of(http)["url.path"] == "/v2/models/identity/infer"


def test_a_batch_is_linked_to_its_members(watched_models: Path) -> None:
    with receive_spans() as (endpoint, receiver):
        site = open_watched(watched_models, trace={"endpoint": endpoint, "rate": 1})
        try:
            with grpc.insecure_channel(site.target) as channel:
                infer = channel.unary_unary(INFER)
                calls = [infer.future(encode_values([value], "gate"), timeout=TIMEOUT_S) for value in (1.0, 2.0)]
                assert [decode_values(each.result()) for each in calls] == [[1.0], [2.0]]
            spans = receiver.wait(lambda found: any(span.name == "batch gate" for span in found))
        finally:
            site.close()
        spans = receiver.spans
    (batch,) = [span for span in spans if span.name == "batch gate"]
    members = [span for span in spans if span.name == SERVER]
    assert {link.span_id for link in batch.links} == {span.span_id for span in members} and len(members) == 2
    assert attributes_of(batch)["aiorch.batch.size"] == 2
    for span in spans:
        if span.name == "infer":
            assert [link.span_id for link in span.links] == [batch.span_id]


def test_one_request_in_so_many_and_no_more_than_so_many(watched_models: Path) -> None:
    """The compiled path gives one in ten up to Python; the settings change while it runs."""
    import tritonclient.grpc as grpc_client
    from tritonclient.utils import InferenceServerException

    with receive_spans() as (endpoint, receiver):
        site = open_watched(watched_models, trace={"endpoint": endpoint, "rate": 10})
        client = grpc_client.InferenceServerClient(site.target)
        try:
            with grpc.insecure_channel(site.target) as channel:
                infer = channel.unary_unary(INFER)

                def send(count: int) -> None:
                    for _ in range(count):
                        infer(encode_values([1.0]), timeout=TIMEOUT_S)

                def traced() -> int:
                    return sum(span.name == SERVER for span in receiver.spans)

                send(40)
                receiver.wait(lambda _: traced() == 4)
                client.update_trace_settings(model_name="identity", settings={"trace_level": ["OFF"]})
                send(20)
                client.update_trace_settings(
                    model_name="identity", settings={"trace_level": None, "trace_rate": "1", "trace_count": "3"}
                )
                send(10)
                receiver.wait(lambda _: traced() == 7)
                setting = client.get_trace_settings("identity").settings
                assert list(setting["trace_mode"].value) == ["opentelemetry"]
                assert "trace" in client.get_server_metadata().extensions
                for refused in ({"trace_level": ["TENSORS"]}, {"log_frequency": "5"}):
                    with pytest.raises(InferenceServerException, match=r"not supported|for trace files"):
                        client.update_trace_settings(settings=refused)
                send(10)
        finally:
            client.close()
            site.close()
        assert traced() == 7


def test_a_receiver_that_is_gone_harms_nobody(watched_models: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as nobody:  # bound, not listening: refused
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        caplog.set_level(logging.CRITICAL)
        site = open_watched(watched_models, trace={"endpoint": f"http://127.0.0.1:{port}", "rate": 1})
        try:
            started = time.monotonic()
            for _ in range(50):
                answer, _ = call(site.target, encode_values([1.0]))
                assert decode_values(answer) == [1.0]
            assert time.monotonic() - started < TIMEOUT_S / 2
        finally:
            started = time.monotonic()
            site.close()
        assert time.monotonic() - started < TIMEOUT_S


def test_calls_between_models_are_children(watched_models: Path, tmp_path: Path) -> None:
    shutil.copytree(watched_models, tmp_path / "models")
    folder = tmp_path / "models" / "caller"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text('backend: "python" max_batch_size: 8')
    (folder / "1" / "model.py").write_text(CALLER)
    with receive_spans() as (endpoint, receiver):
        site = open_watched(tmp_path / "models", trace={"endpoint": endpoint, "rate": 1})
        try:
            answer, _ = call(site.target, encode_values([3.0], "caller"))
            assert decode_values(answer) == [3.0]
        finally:
            site.close()
        spans = receiver.spans
    (server,) = [span for span in spans if span.name == SERVER]
    # the warm-up of the caller has called it as well, on nobody's behalf
    (called,) = [span for span in spans if span.name == "infer identity" and span.parent_span_id]
    assert called.parent_span_id == server.span_id and names(children_of(spans, called)) == STEPS


def test_readiness_says_which_model_and_why(watched_models: Path, tmp_path: Path) -> None:
    shutil.copytree(watched_models / "slow", tmp_path / "slow")
    (tmp_path / "slow" / "1" / "model.py").write_text("raise RuntimeError('no such weights')")
    site = open_watched(tmp_path)
    try:
        answer = httpx.get(f"http://{site.http}/v2/health/ready")
        assert answer.status_code == 400 and answer.json()["ready"] is False
        assert "no such weights" in answer.json()["models"]["slow"]
        command = [sys.executable, "-m", "aiorch_server.cli", "status", "--url", site.target]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "not ready" in shown.stdout and "no such weights" in shown.stdout.replace("\n", " ")
    finally:
        site.close()
