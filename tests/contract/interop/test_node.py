"""Node's @grpc/grpc-js with @grpc/proto-loader on the published .proto files: its own HTTP/2, its own protobuf."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from aiorch_proto.v2.service import METHODS
from running_site import TIMEOUT_S
from served import serve

from .conftest import Place

HERE = Path(__file__).parent / "node"
ROOT = Path(__file__).parents[3]
SCENARIOS = (
    "many calls at once, at both paths",
    "large tensors",
    "metadata",
    "an unknown model",
    "an unknown method",
    "a deadline",
    "calls that are given up",
    "a stream in turns",
    "a stream of many",
    "compressed requests",
    "pings that keep a connection alive",
)
INSTALL_LIMIT_S = 110


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The packages of the lock file, installed once under .cache."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.fail(f"{program} is missing; these tests need Node: deploy/install-packages nodejs npm")
    lock = (HERE / "package-lock.json").read_bytes()
    folder = ROOT / ".cache" / "tests" / f"node-{hashlib.sha256(lock).hexdigest()[:12]}"
    done = folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, folder)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
        assert ran.returncode == 0, f"npm could not install {HERE}/package-lock.json:\n{ran.stdout}{ran.stderr}"
        done.touch()
    return folder / "node_modules"


def command(mode: str, place: Place) -> list[str]:
    root = [str(place.root)] if place.root else []
    return ["node", str(HERE / "client.cjs"), mode, place.site.target, str(ROOT / "proto"), *root]


@pytest.mark.proves("ModelInfer", "ModelStreamInfer", by="@grpc/grpc-js")
def test_grpc_js(place: Place, node_modules: Path) -> None:
    ran = subprocess.run(
        command("scenarios", place),
        env={**os.environ, "NODE_PATH": str(node_modules)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == dict.fromkeys(SCENARIOS, "ok"), ran.stdout
    assert place.site.count_pending() == 0


@pytest.mark.proves("GRPCInferenceService/*", by="@grpc/grpc-js")
def test_grpc_js_makes_every_call(models: Path, node_modules: Path) -> None:
    options = ("--model-control-mode", "explicit", "--load-model", "*", "--shared-memory", "on")
    key = f"aiorch_test_{os.getpid()}_node"
    with serve(models, *options, "--trace-endpoint", "http://127.0.0.1:9") as server:
        Path("/dev/shm", key).write_bytes(bytes(64))
        try:
            ran = subprocess.run(
                ["node", str(HERE / "client.cjs"), "calls", server.grpc, str(ROOT / "proto"), f"/{key}"],
                env={**os.environ, "NODE_PATH": str(node_modules)},
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
        finally:
            Path("/dev/shm", key).unlink()
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == dict.fromkeys(METHODS, "ok"), ran.stdout


@pytest.mark.parametrize("kind", ["loop", "io-thread"])
def test_grpc_js_through_a_restart(open_for_restart: Callable[..., Place], node_modules: Path, kind: str) -> None:
    """No request is lost, as with grpcio (test_restart.py): grpc-js sends again what GOAWAY says was not taken."""
    place = open_for_restart(kind)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "NODE_PATH": str(node_modules)}
    with subprocess.Popen(command("restart", place), env=environment, text=True, **pipes) as client:  # type: ignore[call-overload]
        try:
            assert client.stdout.readline() == "going on\n"
            place.site.begin_stop(TIMEOUT_S).result(TIMEOUT_S)
            open_for_restart(kind, place.site.port)
            output, errors = client.communicate(timeout=TIMEOUT_S)
        finally:
            client.kill()
    assert errors == "" and client.returncode == 0
    told = json.loads(output)
    assert told["problems"] == [] and told["answered"] >= 100
