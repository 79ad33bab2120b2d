"""From ``aiorch init`` to a version that serves, is replaced and taken back: real processes, real registry."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiorch_client import Client
from aiorch_client.admin import AdminClient, AsyncAdminClient, DeploymentState, RolloutState
from aiorch_client.retry import RetryPolicy
from cutting_proxy import cutting
from served import Served, serve
from typer.testing import CliRunner

from aiorch_server.cli import build_app
from aiorch_server.config.load import load_server_config

APP = build_app()
MODEL = """
class Model:
    inputs = [("x", "FP32", [4])]
    outputs = [("y", "FP32", [4])]

    def execute(self, inputs):
        return {{"y": inputs["x"] * {factor}}}
"""


def run(*arguments: object) -> Any:
    return CliRunner().invoke(APP, [*map(str, arguments)])


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """A server over what ``init`` wrote, with a registry."""
    folder = tmp_path_factory.mktemp("start")
    assert run("init", folder).exit_code == 0
    registry = [f"sqlite:///{folder}/aiorch.db", "--artefacts", str(folder / "artefacts")]
    cache = ["--set", f"registry_cache_folder={folder / 'cache'}", "--set", "registry_min_free_bytes=0"]
    options = ["--registry", *registry, *cache, "--allow-code", "--model-control-mode", "none"]
    with serve(folder / "models", *options) as served:
        yield served, folder


def write_model(folder: Path, factor: int) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(MODEL.format(factor=factor))
    return folder


def test_init_writes_what_serves(started: tuple[Served, Path]) -> None:
    served, folder = started
    with Client(served.grpc) as client:
        assert client.infer("hello", np.ones((1, 4), np.float32))["y"].tolist() == [[2.0] * 4]
    again = run("init", folder, "--json")
    assert json.loads(again.stdout)["written"] == [], "nothing is written over"


def test_the_way_of_a_model(started: tuple[Served, Path], tmp_path: Path) -> None:
    served, _ = started
    url = ("--url", served.grpc)
    for factor in (3, 5):
        pushed = run("model", "push", "times", write_model(tmp_path / "m", factor), *url, "--json")
        assert pushed.exit_code == 0, pushed.output
    assert json.loads(pushed.stdout)["version"]["provenance"]["framework"] == "python"
    assert run("model", "alias", "times", "prod", 1, *url).exit_code == 0
    with Client(served.grpc) as client, AdminClient(served.grpc) as admin:

        def ask() -> float:
            return float(client.infer("times", np.ones(4, np.float32))["y"][0])

        deployed = run("deploy", "times@prod", "--wait", *url)
        assert deployed.exit_code == 0, deployed.output
        assert ask() == 3
        assert run("deploy", "times:2", "--wait", *url).exit_code == 0
        assert ask() == 5
        rollout = admin.rollback("times", reason="test")
        assert admin.wait(rollout, timeout_s=30).state is RolloutState.SUCCEEDED
        assert ask() == 3
        assert admin.wait_ready("times").state is DeploymentState.READY
        ways = [(each.from_version, each.to_version) for each in admin.list_rollouts("times")]
        assert ways == [(2, 1), (1, 2), (0, 1)]
        assert len({each.version for each in admin.list_versions("times")}) == 2
    status = json.loads(run("status", *url, "--json").stdout)
    assert [(each["model"], each["state"]) for each in status["deployments"]] == [("times", "ready")]
    assert "times" in run("status", *url).stdout
    wrong = run("deploy", "time", *url)
    assert (wrong.exit_code, "did you mean 'times'?" in wrong.stderr) == (1, True)
    refused = run("promote", "times", *url, "--json")
    assert json.loads(refused.stdout)["error"]["reason"] == "PRECONDITION_FAILED"
    events = run("watch", "times", "--after", "0", "--limit", "3", "--json", *url)
    assert json.loads(events.stdout.splitlines()[0])["kind"] == "model.registered"
    assert "unbroken" in run("audit", "verify", *url).stdout
    assert "admin on *" in run("access", "whoami", *url).stdout
    assert "aiorch objective set times --p99 50ms" in run("objective", "show", "times", *url).stderr
    assert "nothing of it to tune" in run("explain", "times", *url).stderr
    assert "99 % of requests within 50 ms" in run("objective", "set", "times", "--p99", "50ms", *url).stdout
    assert "99 % of requests within 50 ms" in run("objective", "show", "times", *url).stdout
    until = time.monotonic() + 20
    while "max_batch_size" not in (told := run("explain", "times", *url).stdout) and time.monotonic() < until:
        pass
    assert "max_batch_size" in told and "knob" in told
    assert "did you mean 'times'?" in run("objective", "show", "time", *url).stderr
    assert run("undeploy", "times", *url).exit_code == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_an_upload_goes_on_where_it_was_cut(started: tuple[Served, Path], tmp_path: Path, is_async: bool) -> None:
    served, _ = started
    folder = write_model(tmp_path / "m", 2)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * (16 << 12))
    name = f"large-{is_async}"
    haste = RetryPolicy(max_attempts=6, initial_backoff_s=0.02, max_backoff_s=0.2)
    with cutting(served.grpc) as proxy, AdminClient(served.grpc) as observer:

        def cut(sent: int, total: int) -> None:
            if proxy.n_cut < 2 and sent > (proxy.n_cut + 1) * total / 3:
                proxy.cut()

        async def push() -> Any:
            async with AsyncAdminClient(proxy.target, retry=haste) as client:
                return await client.push(name, folder, progress=cut)

        if is_async:
            version = asyncio.run(push())
        else:
            with AdminClient(proxy.target, retry=haste) as client:
                version = client.push(name, folder, progress=cut)
        assert proxy.n_cut == 2
        assert [each.path for each in version.files] == ["model.py", "weights.bin"]
        assert list(observer.list_versions(name)) == [version]


def test_a_server_without_a_registry_says_so(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with serve(tmp_path / "models") as served:
        for command in (("model", "list"), ("deploy", "x"), ("access", "whoami"), ("audit", "verify"), ("status", "x")):
            result = run(*command, "--url", served.grpc)
            assert (result.exit_code, "has no registry; start it with --registry" in result.stderr) == (1, True), (
                command
            )
        assert json.loads(run("status", "--url", served.grpc, "--json").stdout)["deployments"] is None


def test_what_init_writes_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "place"
    files = ["aiorch.yaml", "models/hello/config.yaml", "models/hello/1/model.py", ".gitignore"]
    assert json.loads(run("init", folder, "--json").stdout) == {"written": files, "kept": []}
    monkeypatch.chdir(folder)
    config = load_server_config(file="aiorch.yaml", environment={})
    assert [str(path) for path in config.repository.paths] == ["models"]
    assert not config.security.enabled and not config.registry.is_enabled
    (folder / "aiorch.yaml").write_text("mine")
    assert json.loads(run("init", folder, "--secure", "--json").stdout) == {"written": [], "kept": files}
    assert (folder / "aiorch.yaml").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    assert run("init", tmp_path / "file").exit_code == 1


def test_a_secure_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comments of the configuration tell is all that it takes: a certificate and a key of one's own."""
    assert run("init", tmp_path, "--secure").exit_code == 0
    monkeypatch.chdir(tmp_path)
    Path("tls").mkdir()
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "tls/server.key"]
    made = ["openssl", "req", "-x509", *key, "-out", "tls/server.pem", *subject]
    subprocess.run(made, check=True, capture_output=True)
    text = Path("aiorch.yaml").read_text()
    found = re.search(r'#   python -c "(.*)"\n', text)
    assert found
    told = subprocess.run([sys.executable, "-c", found[1]], check=True, capture_output=True, text=True)
    token, id, digest = told.stdout.split()
    text = re.sub(r'sha256: "\w+"', f'sha256: "{digest}"', text).replace("- id: replace", f"- id: {id}")
    Path("aiorch.yaml").write_text(text)
    with serve(tmp_path / "models", "--config", "aiorch.yaml", "--set", "registry_min_free_bytes=0") as served:
        url = ("--url", served.grpc.replace("0.0.0.0", "127.0.0.1"), "--tls-root-cert", "tls/server.pem")
        refused = run("access", "whoami", *url)
        assert (refused.exit_code, "AIORCH_TOKEN" in refused.stderr) == (1, True), refused.output
        Path("token").write_text(token)
        assert "admin on *" in run("access", "whoami", *url, "--token-file", "token").stdout
        created = run("access", "key", "create", "ann", *url, "--token-file", "token")
        assert created.exit_code == 0, created.output
        Path("anns").write_text(created.stdout.splitlines()[-1])
        assert run("access", "grant", "ann", "viewer", *url, "--token-file", "token").exit_code == 0
        until = time.monotonic() + 20
        while "viewer on *" not in (shown := run("access", "whoami", *url, "--token-file", "anns").stdout):
            assert time.monotonic() < until, shown
        denied = run("model", "push", "hello2", "models/hello/1/model.py", *url, "--token-file", "anns", "--json")
        assert json.loads(denied.stdout)["error"]["code"] in ("PERMISSION_DENIED", "NOT_FOUND")
        log = served.log.read_text()
        assert token not in log and Path("anns").read_text() not in log
