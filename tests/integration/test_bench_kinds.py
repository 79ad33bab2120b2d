"""``aiorch bench`` and the lines of ``aiorch serve`` on models of every kind, against a server as it is started."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from patience import PATIENCE
from sequence_models import write_tally

TIMEOUT_S = 60 * PATIENCE

COUNTING = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for index in range(3):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("I", np.array([index], np.int32))]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
COUNTING_CONFIG = """
backend: "python" max_batch_size: 0
input { name: "N" data_type: TYPE_INT32 dims: [1] }
output { name: "I" data_type: TYPE_INT32 dims: [1] }
model_transaction_policy { decoupled: true }
"""


def write(repository: Path, kind: str) -> None:
    if kind == "stateful":
        write_tally(repository, "tally")
    elif kind == "decoupled":
        (repository / "counting" / "1").mkdir(parents=True)
        (repository / "counting" / "1" / "model.py").write_text(COUNTING)
        (repository / "counting" / "config.pbtxt").write_text(COUNTING_CONFIG)
    else:
        (repository / "plain" / "1").mkdir(parents=True)
        text = 'backend: "identity" input { name: "X" data_type: TYPE_FP32 dims: [3, 4] }'
        (repository / "plain" / "config.pbtxt").write_text(text)


@contextmanager
def serve(repository: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str], list[str]]]:
    """The process, its addresses by door, and the lines to paste."""
    ports = [word for door in ("grpc", "http", "metrics") for word in (f"--{door}-port", "0")]
    command = [sys.executable, "-m", "aiorch_server.cli", "serve", "--model-repository", str(repository), *ports]
    process = subprocess.Popen([*command, "--log-level", "error"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("serving:"):
                break
        addresses = dict(re.findall(r"(grpc|http|metrics) (\S+)", line))
        assert process.stdout.readline() == "\n"
        yield process, addresses, [process.stdout.readline().strip() for _ in range(3)]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=TIMEOUT_S)


def bench(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "aiorch_server.cli", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("kind", ["plain", "stateful", "decoupled"])
def test_every_line_of_the_start_works(tmp_path: Path, kind: str) -> None:
    """Each as it is pasted, but for the length of the load."""
    write(tmp_path, kind)
    with serve(tmp_path) as (_, addresses, lines):
        assert [shlex.split(line)[0].rpartition("/")[2] for line in lines] == ["python", "curl", "aiorch"]
        for line in lines:
            words = shlex.split(line.replace("--duration 5", "--duration 0.5"))
            if words[0].endswith("python"):
                words[0] = sys.executable
            elif words[0].endswith("aiorch"):
                words[0:1] = [sys.executable, "-m", "aiorch_server.cli"]
                words += ["--json", "--warm-up", "0"]
            else:
                words.insert(1, "--fail-with-body")
            done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            assert done.returncode == 0, (line, done.stdout, done.stderr)
            if "--json" in words:
                document = json.loads(done.stdout.splitlines()[0])
                assert document["errors"] == {} and document["requests"] > 10
            else:
                assert "error" not in done.stdout
            if kind == "decoupled" and "python" in line:
                assert done.stdout.count("'I'") == 3
        if kind == "stateful":
            code, text = bench("tally", "--url", addresses["grpc"], "--rate", "50")
            assert (code, "requests of a sequence come one after the other" in text) == (2, True), text


def test_a_server_that_leaves_is_told(tmp_path: Path) -> None:
    write(tmp_path, "plain")
    with serve(tmp_path) as (process, addresses, _):
        command = [sys.executable, "-m", "aiorch_server.cli", "bench", "plain", "--url", addresses["grpc"]]
        options = ["--concurrency", "8", "--duration", "60", "--warm-up", "0", "--json"]
        load = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_requests(addresses["metrics"])
        process.kill()
        out, err = load.communicate(timeout=TIMEOUT_S)
    document = json.loads(out.splitlines()[0])
    assert load.returncode == 1, (out, err)
    assert 0 < document["lost"] <= 16 and document["is_target_gone"]
    assert f"{document['lost']} requests were lost" in out + err


def wait_for_requests(address: str) -> None:
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
            found = re.search(r"nv_inference_request_success{[^}]*} (\d+)", answer.read().decode())
        if found and int(found[1]) > 100:
            return
        time.sleep(0.02)
    raise AssertionError("no requests")


def test_infer_shows_each_answer_of_a_decoupled_model(tmp_path: Path) -> None:
    write(tmp_path / "models", "decoupled")
    command = [sys.executable, "-m", "aiorch_server.cli", "infer", "counting", "-i", "-", "--json"]
    with serve(tmp_path / "models") as (_, addresses, _):
        command += ["--url", addresses["grpc"]]
        given = {"input": '{"N": [3]}', "capture_output": True, "text": True, "timeout": TIMEOUT_S, "check": False}
        done = subprocess.run(command, **given)
        refused = subprocess.run([*command, "--output", str(tmp_path / "answer.npz")], **given)
    assert done.returncode == 0, done.stdout
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["outputs"][0]["data"] for answer in answers if answer["outputs"]] == [[0], [1], [2]]
    assert refused.returncode == 2
    assert "gives any number of answers" in json.loads(refused.stdout)["error"]["text"]
