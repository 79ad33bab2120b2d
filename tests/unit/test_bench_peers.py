"""The peer comparison against real processes: ends what it starts, refuses wrong answers, measures a small run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.ceiling import measure
from benchmarks.peers.comparison import await_ready
from benchmarks.peers.contests import CONTESTS
from benchmarks.peers.h2load import H2Load, LoadFailed
from benchmarks.peers.measure import RunningServer, Settings, measure_point
from benchmarks.peers.process import ServerFailed, ServerProcess, find_free_port
from benchmarks.peers.servers import (
    Certificate,
    Situation,
    describe_model,
    make_certificate,
    plan_aiorch,
    plan_grpc_aio,
)
from benchmarks.peers.wires import MODEL_INFER, Grpc, RawHttp
from benchmarks.peers.workload import Workload, WrongAnswer, make_workload

ROOT = Path(__file__).resolve().parents[2]
CPUS = sorted(os.sched_getaffinity(0))
needs_load = pytest.mark.skipif(
    shutil.which("h2load") is None or len(CPUS) < 2, reason="needs h2load (nghttp2-client) and two CPUs"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose ``mlp`` sums the pixels: small, and wrong answers show."""
    folder = tmp_path_factory.mktemp("models")
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["X", "axes"], ["total"], keepdims=1)],
        "sum",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, 8])],
        [helper.make_tensor_value_info("total", TensorProto.FLOAT, [None, 1])],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "mlp.onnx")
    np.savez(folder / "mlp.npz", X=np.arange(512, dtype=np.float32).reshape(64, 8))
    return folder


@pytest.fixture(scope="module")
def workloads(models: Path) -> dict[str, Workload]:
    return {name: make_workload(name, models) for name in ("identity", "mlp")}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


def make_situation(workload: Workload, folder: Path, port: int = 1234, **more: Any) -> Situation:
    return Situation(workload, port, folder, folder, **more)


@pytest.fixture(scope="module")
def naive_port(workloads: dict[str, Workload], tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    yield from serve_naively(make_situation(workloads["mlp"], tmp_path_factory.mktemp("naive"), find_free_port()))


@pytest.fixture(scope="module")
def tls_port(
    workloads: dict[str, Workload], certificate: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("tls")
    yield from serve_naively(make_situation(workloads["identity"], folder, find_free_port(), certificate=certificate))


def serve_naively(situation: Situation) -> Iterator[int]:
    plan = plan_grpc_aio(situation)
    with ServerProcess(plan.name, plan.command, CPUS[0], situation.folder / "log") as server:
        server.await_port(situation.port, 60)
        yield situation.port


def await_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if is_running(pid)]}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_the_whole_group_ends_even_if_it_ignores_the_signal(tmp_path: Path) -> None:
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    server = ServerProcess("stubborn", [sys.executable, "-c", parent], CPUS[0], tmp_path / "log")
    with pytest.raises(KeyboardInterrupt), server:
        deadline = time.monotonic() + 20
        while b"up" not in (tmp_path / "log").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        pids = [server.pid, *(process.pid for process in psutil.Process(server.pid).children(recursive=True))]
        assert len(pids) == 2
        raise KeyboardInterrupt
    await_gone(pids)


def test_server_that_dies_is_reported_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model repository')"]
    with (
        ServerProcess("broken", command, CPUS[0], tmp_path / "log") as server,
        pytest.raises(ServerFailed, match=r"broken ended by itself[\s\S]*no such model repository"),
    ):
        server.await_port(find_free_port(), 30)


def test_server_that_never_listens_is_given_up(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(99)"]
    with (
        ServerProcess("deaf", command, CPUS[0], tmp_path / "log") as server,
        pytest.raises(ServerFailed, match="does not listen"),
    ):
        server.await_port(find_free_port(), 0.3)


def test_cpu_time_covers_children(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True); time.sleep(99)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    with ServerProcess("burning", [sys.executable, "-c", parent], CPUS[0], tmp_path / "log") as server:
        deadline = time.monotonic() + 20
        while b"done" not in (tmp_path / "log").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert server.cpu_s() >= 0.25
        assert psutil.Process(server.pid).cpu_affinity() == [CPUS[0]]


@pytest.mark.parametrize("name", ["identity", "mlp"])
def test_right_answers_pass(name: str, workloads: dict[str, Workload], naive_port: int) -> None:
    workload, wire = workloads[name], Grpc()
    assert wire.check(workload, naive_port) == wire.ask(workload, naive_port) > 5
    assert wire.payload(workload)[5:] == workload.request([0])


def test_right_answers_pass_over_tls(
    workloads: dict[str, Workload], certificate: Certificate, tls_port: int, models: Path
) -> None:
    wire = Grpc(certificate.certificate)
    assert wire.url(tls_port).startswith("https://")
    assert wire.check(workloads["identity"], tls_port) > 5
    with pytest.raises(grpc.RpcError):
        Grpc().ask(workloads["identity"], tls_port)


def test_wrong_answers_do_not_pass(workloads: dict[str, Workload], naive_port: int) -> None:
    identity, mlp = workloads["identity"], workloads["mlp"]
    response = ask(naive_port, identity.request([0, 1], "one"))
    identity.compare(response, [0, 1], "one")
    with pytest.raises(WrongAnswer, match="carries the id 'one'"):
        identity.compare(response, [0, 1], "two")
    with pytest.raises(WrongAnswer, match="not what the model gives"):
        identity.compare(response, [1, 2], "one")
    with pytest.raises(WrongAnswer, match="not what the model gives"):
        identity.compare(response, [0], "one")
    with pytest.raises(WrongAnswer, match="outputs"):
        mlp.compare(response, [0, 1], "one")


class Echo(BaseHTTPRequestHandler):
    """Sends every body back, the one that ``doubled`` is twice."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if body == self.server.doubled:  # type: ignore[attr-defined]
            body *= 2
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to standard error."""


class EchoServer(ThreadingHTTPServer):
    request_queue_size = 64
    doubled = b""


def test_bare_bytes_are_checked_too(workloads: dict[str, Workload]) -> None:
    identity, wire = workloads["identity"], RawHttp()
    with EchoServer(("127.0.0.1", 0), Echo) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            assert wire.check(identity, server.server_port) == 16
            with pytest.raises(WrongAnswer, match="32 bytes of answer, expected 4"):
                wire.ask(workloads["mlp"], server.server_port)
            server.doubled = identity.body(5)
            with pytest.raises(WrongAnswer, match="32 bytes of answer, expected 16"):
                wire.check(identity, server.server_port)
        finally:
            server.shutdown()
            thread.join()
    with pytest.raises(WrongAnswer, match="not what the model gives"):
        identity.compare_body(identity.body(1), 0)


def test_server_that_never_becomes_ready_is_told_with_its_log(
    workloads: dict[str, Workload], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.peers.comparison.START_S", 0.5)
    code = (
        "import http.server, sys; "
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), http.server.BaseHTTPRequestHandler).serve_forever()"
    )
    port = find_free_port()
    with ServerProcess("empty", [sys.executable, "-c", code, str(port)], CPUS[0], tmp_path / "log") as process:
        process.await_port(port, 30)
        with pytest.raises(ServerFailed, match=r"empty is not ready: .*HTTP status 501[\s\S]*Unsupported method"):
            await_ready(RunningServer(process, port, RawHttp()), workloads["identity"])


def test_ceiling_is_measured(models: Path) -> None:
    rates = measure(models, "mlp", 0.01)
    assert list(rates) == [1, 8, 32]
    assert all(rate > 0 for rate in rates.values())


def test_memory_covers_children(tmp_path: Path) -> None:
    child = "held = bytes(range(256)) * 200_000; print('up', flush=True); import time; time.sleep(99)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with ServerProcess("holding", [sys.executable, "-c", parent], CPUS[0], tmp_path / "log") as server:
        deadline = time.monotonic() + 20
        while b"up" not in (tmp_path / "log").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        memory = server.measure_memory()
        assert memory.processes == 2
        assert memory.rss_bytes > memory.pss_bytes > 51_200_000


def ask(port: int, request: bytes) -> bytes:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        response: bytes = channel.unary_unary(MODEL_INFER)(request, timeout=20)
    return response


@needs_load
def test_load_is_measured_and_error_answers_void_it(
    workloads: dict[str, Workload], naive_port: int, tmp_path: Path
) -> None:
    workload, wire = workloads["identity"], Grpc()
    size = wire.check(workload, naive_port)
    payload = tmp_path / "payload"
    payload.write_bytes(wire.payload(workload))
    load = H2Load(wire.url(naive_port), payload, wire.headers, CPUS[1])
    run = load.run(2, 2, 200, size)
    assert run.requests == 200
    assert run.data_bytes == 200 * size
    assert run.cpu_s > 0
    assert load.measure_latencies_us(2, 2, 200).shape == (200,)
    # gRPC errors are HTTP 200 without DATA: h2load alone calls them a success.
    payload.write_bytes(wire.payload(workload).replace(b"identity_fp32", b"identity_fp99"))
    with pytest.raises(LoadFailed, match="carried 0 bytes"):
        load.run(2, 2, 200, size)


@needs_load
def test_driver_writes_a_result(models: Path, tmp_path: Path) -> None:
    more = ("--contests", "identity,mlp,identity-tls", "--shapes", "8x8,32x1")
    driver = start_driver(models, tmp_path, "--seconds", "0.1", "--runs", "1", *more)
    out, _ = driver.communicate(timeout=100)
    assert driver.returncode == 0, out
    assert "CPU us/req" in out
    result = json.loads((tmp_path / "peers.json").read_text())
    assert [(row["contest"], row["connections"], row["streams"]) for row in result["rows"]] == [
        ("identity", 32, 1),
        ("identity", 8, 8),
        ("mlp", 32, 1),
        ("mlp", 8, 8),
        ("identity-tls", 8, 8),
        ("identity-tls", 32, 1),
    ]
    assert [(entry["contest"], entry["batch"]) for entry in result["ceilings"]] == [
        ("mlp", 1),
        ("mlp", 8),
        ("mlp", 32),
    ]
    assert [start["contest"] for start in result["starts"]] == ["identity", "mlp", "identity-tls"]
    assert all(0 < start["ready_s"] < 60 and 10 < start["rss_mb"] < 1000 for start in result["starts"])
    for row in result["rows"]:
        assert row["server"] == "grpc_aio"
        assert row["req_per_s"] > 50
        assert 0.05 < row["server_cores"] < 1.2
        assert 0 < row["p50_us"] <= row["p99_us"]
    assert str(tmp_path) not in json.dumps(result)


@needs_load
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_driver_leaves_no_server(models: Path, tmp_path: Path, number: signal.Signals) -> None:
    driver = start_driver(models, tmp_path, "--seconds", "5", "--runs", "9")
    assert driver.stdout is not None
    for line in driver.stdout:
        if "run 1 of 9" in line:
            break
    pids = [process.pid for process in psutil.Process(driver.pid).children(recursive=True)]
    assert pids
    driver.send_signal(number)
    driver.communicate(timeout=30)
    assert driver.returncode == 130
    await_gone(pids)
    assert not (tmp_path / "peers.json").exists()


def start_driver(models: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "peers" / "run.py"), "--servers", "grpc_aio"]
    command += ["--models", str(models), "--cache", str(folder), "--output", str(folder / "peers.json")]
    command += ["--server-cpu", str(CPUS[0]), "--load-cpu", str(CPUS[1]), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@needs_load
def test_server_lost_midway_voids_its_points_only(models: Path, tmp_path: Path) -> None:
    driver = start_driver(
        models, tmp_path, "--seconds", "0.3", "--runs", "1", "--contests", "identity", "--shapes", "1x1,8x8,32x1"
    )
    assert driver.stdout is not None
    for line in driver.stdout:
        if "identity 8x8: grpc_aio, check" in line:
            server = next(p for p in psutil.Process(driver.pid).children() if "naive_grpc_aio.py" in str(p.cmdline()))
            server.kill()
            break
    out, _ = driver.communicate(timeout=100)
    assert driver.returncode == 1, out
    result = json.loads((tmp_path / "peers.json").read_text())
    assert [(row["connections"], row["streams"]) for row in result["rows"]] == [(1, 1), (32, 1)]
    (void,) = result["void"]
    assert void.startswith("identity 8x8: grpc_aio, ")


@needs_load
def test_server_that_fails_takes_nobody_with_it(workloads: dict[str, Workload], tmp_path: Path) -> None:
    situation = make_situation(workloads["identity"], tmp_path, find_free_port())
    plan = plan_grpc_aio(situation)
    with ServerProcess(plan.name, plan.command, CPUS[0], tmp_path / "log") as process:
        process.await_port(situation.port, 60)
        servers = {
            "gone": RunningServer(process, find_free_port(), RawHttp()),
            "good": RunningServer(process, situation.port, plan.wire),
        }
        settings = Settings(0.1, 2, CPUS[0], CPUS[1])
        rows, void = measure_point("echo", workloads["identity"], (2, 2), servers, settings, tmp_path, str)
    assert [(row["server"], len(row["runs"])) for row in rows] == [("good", 2)]
    (text,) = void
    assert text.startswith("echo 2x2: gone, check and warm-up: ")
    assert "refused" in text


def test_scenarios_run_against_a_server(naive_port: int, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scenarios" / "run.py"), "--target", f"127.0.0.1:{naive_port}"]
    command += ["--rate", "100", "--seconds", "0.3", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "scenarios.json").read_text())["scenarios"]
    assert list(stored) == ["1 caller", "32 callers", "constant 100/s", "Poisson 100/s", "bursts 100/s"]
    assert all(figures["errors"] == {} for figures in stored.values())
    assert stored["constant 100/s"]["requests"] == 30
    assert len(list(tmp_path.glob("*.npz"))) == 5


def test_driver_refuses_unknown_servers() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "peers" / "run.py"), "--servers", "tritn"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "unknown server ['tritn']" in done.stderr


def test_driver_refuses_unknown_shapes() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "peers" / "run.py"), "--shapes", "8by8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "such as 8x8,32x1, not '8by8'" in done.stderr


def test_triton_gets_the_same_batching(workloads: dict[str, Workload]) -> None:
    config = describe_model(workloads["mlp"], "python", signature=True)
    assert "max_batch_size: 64" in config
    assert "dynamic_batching { }" in config
    assert 'input [ { name: "X" data_type: TYPE_FP32 dims: [ 8 ] } ]' in config
    assert 'output [ { name: "total" data_type: TYPE_FP32 dims: [ 1 ] } ]' in config


@pytest.mark.parametrize("name", ["identity", "mlp"])
def test_our_server_gets_the_same_models(
    name: str, workloads: dict[str, Workload], certificate: Certificate, tmp_path: Path
) -> None:
    workload = workloads[name]
    plan = plan_aiorch(make_situation(workload, tmp_path, certificate=certificate, is_busy=True), io_threads=0)
    command = " ".join(plan.command)
    assert "--grpc-port 1234" in command
    assert "--io-threads 0" in command
    assert f"--grpc-server-key {certificate.key}" in command
    repository = Path(plan.command[plan.command.index("--model-repository") + 1])
    assert {path.name for path in repository.iterdir()} == {workload.model, "busy_thread"}
    config = (repository / workload.model / "config.pbtxt").read_text()
    assert "max_batch_size: 64\n" in config
    assert "dynamic_batching { }\n" in config
    if workload.onnx:
        assert (repository / workload.model / "1" / "model.onnx").read_bytes() == workload.onnx.read_bytes()


def test_busy_servers_are_never_up_together() -> None:
    turns = {contest.name: contest.turns for contest in CONTESTS}
    assert turns["identity-busy"] == (("aiorch",), ("aiorch_asyncio",), ("aiorch_asyncio_5ms",))
    assert turns["mlp"] == (("aiorch", "triton", "grpc_aio", "mosec"),)
