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
from pathlib import Path

import grpc
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.h2load import H2Load, LoadFailed
from benchmarks.peers.process import ServerFailed, ServerProcess, find_free_port
from benchmarks.peers.servers import describe_model, plan_aiorch, plan_grpc_aio
from benchmarks.peers.workload import MODEL_INFER, Workload, WrongAnswer, make_workloads

ROOT = Path(__file__).resolve().parents[2]
CPUS = sorted(os.sched_getaffinity(0))
needs_load = pytest.mark.skipif(
    shutil.which("h2load") is None or len(CPUS) < 2, reason="needs h2load (nghttp2-client) and two CPUs"
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose ``digits_forest`` sums the pixels: small, and wrong answers show."""
    folder = tmp_path_factory.mktemp("models")
    nodes = [
        helper.make_node("ReduceSum", ["X", "axes"], ["probabilities"], keepdims=1),
        helper.make_node("Cast", ["total"], ["label"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["X", "axes"], ["total"], keepdims=0),
    ]
    graph = helper.make_graph(
        [nodes[0], nodes[2], nodes[1]],
        "sum",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, 64])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, [None]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [None, 1]),
        ],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    version = folder / "digits_forest" / "1"
    version.mkdir(parents=True)
    onnx.save(model, version / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def workloads(repository: Path) -> dict[str, Workload]:
    return {workload.name: workload for workload in make_workloads(repository)}


@pytest.fixture(scope="module")
def naive_port(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = find_free_port()
    plan = plan_grpc_aio(repository, port)
    with ServerProcess(plan.name, plan.command, CPUS[0], tmp_path_factory.mktemp("log") / "log") as server:
        server.await_port(port, 60)
        yield port


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


@pytest.mark.parametrize("name", ["identity", "digits"])
def test_right_answers_pass(name: str, workloads: dict[str, Workload], naive_port: int) -> None:
    workload = workloads[name]
    assert workload.check(naive_port) > 5
    assert workload.frame()[5:] == workload.request(workload.rows[:1])


def test_wrong_answers_do_not_pass(workloads: dict[str, Workload], naive_port: int) -> None:
    identity, digits = workloads["identity"], workloads["digits"]
    response = ask(naive_port, identity.request(identity.rows[:2], "one"))
    identity.compare(response, identity.rows[:2], "one")
    with pytest.raises(WrongAnswer, match="carries the id 'one'"):
        identity.compare(response, identity.rows[:2], "two")
    with pytest.raises(WrongAnswer, match="not what the model gives"):
        identity.compare(response, identity.rows[1:3], "one")
    with pytest.raises(WrongAnswer, match="not what the model gives"):
        identity.compare(response, identity.rows[:1], "one")
    with pytest.raises(WrongAnswer, match="outputs"):
        digits.compare(response, digits.rows[:2], "one")


def ask(port: int, request: bytes) -> bytes:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        response: bytes = channel.unary_unary(MODEL_INFER)(request, timeout=20)
    return response


@needs_load
def test_load_is_measured_and_error_answers_void_it(
    workloads: dict[str, Workload], naive_port: int, tmp_path: Path
) -> None:
    workload = workloads["identity"]
    size = workload.check(naive_port)
    frame = tmp_path / "frame"
    frame.write_bytes(workload.frame())
    load = H2Load(naive_port, MODEL_INFER, frame, CPUS[1])
    run = load.run(2, 2, 200, size)
    assert run.requests == 200
    assert run.data_bytes == 200 * size
    assert run.cpu_s > 0
    assert load.measure_latencies_us(2, 2, 200).shape == (200,)
    # gRPC errors are HTTP 200 without DATA: h2load alone calls them a success.
    frame.write_bytes(workload.frame().replace(b"identity_fp32", b"identity_fp99"))
    with pytest.raises(LoadFailed, match="carried 0 bytes"):
        load.run(2, 2, 200, size)


@needs_load
def test_driver_writes_a_result(repository: Path, tmp_path: Path) -> None:
    driver = start_driver(repository, tmp_path, "--seconds", "0.2", "--runs", "1", "--workloads", "identity")
    out, _ = driver.communicate(timeout=100)
    assert driver.returncode == 0, out
    assert "CPU us/req" in out
    result = json.loads((tmp_path / "peers.json").read_text())
    assert [(row["connections"], row["streams"]) for row in result["rows"]] == [(1, 1), (8, 8), (32, 1)]
    for row in result["rows"]:
        assert row["server"] == "grpc_aio"
        assert row["req_per_s"] > 50
        assert 0.05 < row["server_cores"] < 1.2
        assert 0 < row["p50_us"] <= row["p99_us"]
    assert str(tmp_path) not in json.dumps(result)


@needs_load
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_driver_leaves_no_server(repository: Path, tmp_path: Path, number: signal.Signals) -> None:
    driver = start_driver(repository, tmp_path, "--seconds", "5", "--runs", "9")
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


def start_driver(repository: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "peers" / "run.py"), "--servers", "grpc_aio"]
    command += ["--models", str(repository), "--cache", str(folder), "--output", str(folder / "peers.json")]
    command += ["--server-cpu", str(CPUS[0]), "--load-cpu", str(CPUS[1]), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@needs_load
def test_server_lost_midway_voids_its_points_only(repository: Path, tmp_path: Path) -> None:
    driver = start_driver(repository, tmp_path, "--seconds", "0.3", "--runs", "1", "--workloads", "identity")
    assert driver.stdout is not None
    for line in driver.stdout:
        if "identity 8x8: grpc_aio, check" in line:
            server = next(p for p in psutil.Process(driver.pid).children() if "naive_grpc_aio.py" in str(p.cmdline()))
            server.kill()
            break
    out, _ = driver.communicate(timeout=100)
    assert driver.returncode == 1, out
    result = json.loads((tmp_path / "peers.json").read_text())
    assert [(row["connections"], row["streams"]) for row in result["rows"]] == [(1, 1)]
    assert [text.split(":")[0] for text in result["void"]] == ["identity 8x8", "identity 32x1"]


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


def test_triton_gets_the_same_batching(workloads: dict[str, Workload]) -> None:
    config = describe_model(workloads["digits"], "python")
    assert "max_batch_size: 64" in config
    assert "dynamic_batching { }" in config
    assert 'input [ { name: "X" data_type: TYPE_FP32 dims: [ 64 ] } ]' in config
    assert 'output [ { name: "label" data_type: TYPE_INT64 dims: [ 1 ] } ]' in config


def test_our_server_gets_the_same_models(repository: Path, workloads: dict[str, Workload], tmp_path: Path) -> None:
    plan = plan_aiorch(tmp_path, list(workloads.values()), repository, 1234)
    assert "--grpc-port 1234" in " ".join(plan.command)
    models = Path(plan.command[plan.command.index("--model-repository") + 1])
    assert {path.name for path in models.iterdir()} == {"identity_fp32", "digits_forest"}
    for path in models.glob("*/config.pbtxt"):
        assert "max_batch_size: 64\n" in path.read_text()
        assert "dynamic_batching { }\n" in path.read_text()
    asked = (models / "digits_forest" / "1" / "model.onnx").read_bytes()
    assert asked == (repository / "digits_forest" / "1" / "model.onnx").read_bytes()
