"""``aiorch serve`` as a process of its own: what it says, how it ends, what it refuses."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from aiorch_client import Client
from tritonclient.grpc import InferenceServerClient
from typer.main import get_command
from typer.testing import CliRunner

from aiorch_server.cli import build_app

COMMAND = [sys.executable, "-m", "aiorch_server.cli", "serve"]
LIMIT_S = 60
CONFIG = """
backend: "identity"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [2] }
output { name: "y" data_type: TYPE_FP32 dims: [2] }
"""


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "models" / "echo" / "1").mkdir(parents=True)
    (tmp_path / "models" / "echo" / "config.pbtxt").write_text(CONFIG)
    (tmp_path / "models" / "broken" / "1").mkdir(parents=True)
    (tmp_path / "models" / "broken" / "config.pbtxt").write_text("max_batch_size: [")
    return tmp_path / "models"


@pytest.fixture
def options(repository):
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    backend = ["--backend", "aiorch_backends.identity:IdentityBackend"]
    return ["--model-repository", str(repository), *backend, *ports, "--log-level", "warning"]


@contextmanager
def start(*arguments):
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)


def read_lines(process):
    """Yields the lines of standard output as they come; fails after LIMIT_S seconds of silence."""
    buffer = b""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], LIMIT_S)
        assert ready, f"nothing for {LIMIT_S} s after {buffer!r}"
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        yield from (line.decode() for line in lines)


def run(*arguments):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=LIMIT_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_tells_and_stops(options, number):
    with start(*options, "--json") as process:
        events = map(json.loads, read_lines(process))
        states = []
        for event in events:
            if event["event"] == "ready":
                break
            states.append((event["name"], event["state"]))
        assert states[-1:] != []
        assert ("echo", "LOADING") in states
        assert ("echo", "READY") in states
        broken, echo = event["models"]
        assert (broken["name"], broken["state"]) == ("broken", "UNAVAILABLE")
        assert "config.pbtxt" in broken["reason"]
        assert {**echo, "instances": 1, "max_batch_size": 8, "backend": "identity", "state": "READY"} == echo
        with Client(event["addresses"]["grpc"]) as client:
            assert client.infer("echo", np.ones((1, 2), np.float32))["y"].tolist() == [[1, 1]]
        process.send_signal(number)
        assert [event["event"] for event in events][-1] == "stopped"
        assert process.wait(LIMIT_S) == 0
        assert b"Traceback" not in process.stderr.read()


def test_the_lines_to_paste_work(options):
    with start(*options) as process:
        pasted = []
        for line in read_lines(process):
            if Path(line.partition(" ")[0]).name in ("python", "curl", "aiorch"):
                pasted.append(line)
            if len(pasted) == 3:
                break
        python, curl, bench = pasted

        def paste(line):
            return subprocess.run(
                ["bash", "-c", line], capture_output=True, text=True, timeout=LIMIT_S, check=True
            ).stdout

        assert "array([[0., 0.]]" in paste(python)
        assert json.loads(paste(curl))["outputs"][0]["data"] == [0.0, 0.0]
        assert bench.endswith("--concurrency 16 --duration 5")
        # By its module: the script `aiorch` is there only where the package is installed.
        short = bench.partition(" ")[2].replace("duration 5", "duration 0.3")
        assert "requests/s" in paste(f"{sys.executable} -m aiorch_server.cli {short}")


@pytest.mark.parametrize("door", ["grpc", "http", "metrics"])
def test_a_port_that_is_taken_is_told_without_a_traceback(options, door):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run(*options, f"--{door}-port", port)
    assert result.returncode == 1
    assert port in result.stderr
    assert f"--{door}-port" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "--model-repository FOLDER"),
        (("--model-repository", "/nowhere/models"), "/nowhere/models"),
        (("--model-repository", ".", "--load-model", "a"), "explicit"),
        (("--model-repository", ".", "--grpc-use-ssl", "true"), "--grpc-server-cert"),
        (("--model-repository", ".", "--grpc-use-ssl", "maybe"), "expected true or false"),
        (("--model-repository", ".", "--backend-config", "onnxruntime,x=1"), "the model's configuration"),
        (("--model-repository", ".", "--backend-config", "default-max-batch-size=x"), "default_max_batch_size"),
        (("--model-repository", ".", "--set", "grpc_prot=1"), "did you mean 'grpc_port'"),
        (("--model-repository", ".", "--set", "grpc_port"), "expected NAME=VALUE"),
        (("--model-repository", ".", "--set", "trace.level=x"), "(from option --set trace.level)"),
        (("--model-repository", ".", "--cache-config", "redis,host=a,port=b"), "(from option --cache-config)"),
        (("--model-repository", ".", "--trace-endpoint", "localhost:4318"), "such as http://127.0.0.1:4318"),
        (("--model-repository", ".", "--config", "none.yaml"), "none.yaml"),
        (("--model-repository", ".", "--transport", "quic"), "quic"),
        (("--model-repository", ".", "--grpc-port", "70000", "--allow-http", "perhaps"), "grpc.port"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2_and_says_what_would_be_right(arguments, text):
    result = run(*arguments)
    assert result.returncode == 2
    assert text in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_settings_from_every_source(options, tmp_path):
    (tmp_path / "server.yaml").write_text("lifecycle: {control_mode: explicit}\nexecution: {instances: 3}\n")
    arguments = [*options, "--config", str(tmp_path / "server.yaml"), "--load-model", "echo", "--allow-http=false"]
    with start(*arguments, "--set", "instances=2", "--json") as process:
        ready = next(event for event in map(json.loads, read_lines(process)) if event["event"] == "ready")
        assert set(ready["addresses"]) == {"grpc", "metrics"}
        (echo,) = [model for model in ready["models"] if model["state"] == "READY"]
        assert (echo["name"], echo["instances"]) == ("echo", 2)
        started = time.monotonic()
        process.terminate()
        assert process.wait(LIMIT_S) == 0
        assert time.monotonic() - started < 20


def test_why_a_model_does_not_load_is_told_once(options):
    with start(*options) as process:
        for line in read_lines(process):
            assert "config.pbtxt" not in line
            if line.startswith("serving:"):
                break
        process.terminate()
        assert process.wait(LIMIT_S) == 0
        assert process.stderr.read().decode().count("config.pbtxt") == 1


def test_who_reads_nothing_holds_nothing_up(options):
    """Each load is told on one pipe and logged on the other; nobody reads, and it is more than they hold."""
    explicit = ("--model-control-mode", "explicit", "--load-model", "echo")
    with start(*options, "--json", *explicit, "--log-level", "info") as process:
        events = map(json.loads, read_lines(process))
        ready = next(event for event in events if event["event"] == "ready")
        with InferenceServerClient(ready["addresses"]["grpc"]) as client:
            for _ in range(400):
                client.unload_model("echo", client_timeout=LIMIT_S)
                client.load_model("echo", client_timeout=LIMIT_S)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_help_names_each_option_in_full(columns):
    done = CliRunner().invoke(build_app(), ["serve", "--help"], env={"COLUMNS": columns, "TERM": "dumb"})
    names = set(re.findall(r"--[a-z0-9][a-z0-9-]*", done.stdout))
    command = get_command(build_app(["serve"])).commands["serve"]
    known = {option for parameter in command.params for option in parameter.opts}
    assert done.exit_code == 0 and known <= names and "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= int(columns)
    assert re.search(r"\n\ngRPC:\n +--allow-grpc", done.stdout)
