"""``aiorch status --ready``, as health checks of containers run it: by the server's own configuration."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from served import read_events

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60


def ask(*options: str, **variables: str) -> tuple[int, str]:
    """The command as its own process: exit code, and what it wrote."""
    command = [sys.executable, "-m", "aiorch_server.cli", "status", "--ready", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, **variables})
    return done.returncode, done.stdout + done.stderr


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(folder: Path, grpc: dict[str, object], **sections: object) -> Iterator[Path]:
    """A server over a configuration file, which it gives."""
    (folder / "models").mkdir(exist_ok=True)
    document = {
        "grpc": {"host": "0.0.0.0", "port": find_port(), **grpc},
        "http": {"enabled": False},
        "metrics": {"enabled": False},
        "repository": {"paths": [str(folder / "models")]},
        "security": {"insecure": True},
        **sections,
    }
    file = folder / "aiorch.yaml"
    file.write_text(json.dumps(document))
    command = [sys.executable, "-m", "aiorch_server.cli", "serve", "--json", "--config", str(file)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    try:
        assert any(event["event"] == "ready" for event in read_events(process, LIMIT_S)), (folder / "log").read_text()
        yield file
    finally:
        process.kill()
        process.wait(LIMIT_S)
        assert process.stdout is not None
        process.stdout.close()


def make_certificate(folder: Path, name: str, *extensions: str) -> dict[str, str]:
    """A certificate of an authority that nobody knows, for a name that is not this machine's."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
    subject = ["-days", "2", "-subj", f"/CN={name}", *extensions]
    subprocess.run(["openssl", "req", "-x509", *key, "-out", f"{name}.pem", *subject], cwd=folder, check=True)
    return {"certificate": str(folder / f"{name}.pem"), "key": str(folder / f"{name}.key")}


def test_a_server_that_is_ready_and_one_that_is_not(tmp_path: Path) -> None:
    model = tmp_path / "models" / "broken" / "1"
    model.mkdir(parents=True)
    with serving(tmp_path, {}, lifecycle={"is_readiness_strict": False}) as file:
        port = json.loads(file.read_text())["grpc"]["port"]
        assert ask("--config", str(file)) == (0, f"127.0.0.1:{port} is ready\n")
        assert ask(AIORCH_CONFIG=str(file))[0] == 0
        assert ask(AIORCH_GRPC_PORT=str(port))[0] == 0
        assert ask("--url", f"127.0.0.1:{port}")[0] == 0
        code, text = ask("--config", str(file), "--json")
        assert (code, json.loads(text)) == (0, {"url": f"127.0.0.1:{port}", "is_ready": True})
    assert ask("--config", str(file))[0] == 3
    with serving(tmp_path, {}) as file:
        code, text = ask("--config", str(file))
        assert (code, "is not ready: broken" in text) == (1, True), text


@pytest.mark.parametrize("names", [(), ("-addext", "subjectAltName=DNS:*.example.org")])
def test_by_tls_with_callers_and_a_restricted_header(tmp_path: Path, names: tuple[str, ...]) -> None:
    tls = make_certificate(tmp_path, "server", *names)
    key = {"id": "abcd", "sha256": "0" * 64, "principal": "ann"}
    security = {"enabled": True, "api_keys": [key]}
    with serving(tmp_path, {"tls": tls, "restricted_protocols": ["health:k=secret"]}, security=security) as file:
        assert ask("--config", str(file))[0] == 0
        assert ask("--config", str(file), "--tls-root-cert", "/no/such.pem")[0] == 2


def test_a_server_that_wants_certificates_takes_its_own_or_one_that_is_given(tmp_path: Path) -> None:
    # self-signed: its own authority
    tls = make_certificate(tmp_path, "server", "-addext", "subjectAltName=DNS:models.example.org")
    tls = {**tls, "root": tls["certificate"], "require_client_auth": True}
    with serving(tmp_path, {"tls": tls}) as file:
        assert ask("--config", str(file))[0] == 0


@pytest.mark.parametrize("is_by_url", [False, True])
def test_what_was_given_is_sent(tmp_path: Path, is_by_url: bool) -> None:
    model = tmp_path / "models" / "broken" / "1"
    model.mkdir(parents=True)
    secret = "s3cret-" + 36 * "x"
    key = {"id": "abcd", "sha256": hashlib.sha256(secret.encode()).hexdigest(), "principal": "ann"}
    token, code = tmp_path / "token", tmp_path / "code"
    token.write_text(f"aio_abcd_{secret}")
    code.write_text("hush")
    restricted = ["model-repository:code=hush"]
    bindings = [{"principal": "ann", "role": "admin"}]
    security = {"insecure": True, "enabled": True, "api_keys": [key], "bindings": bindings}
    with serving(tmp_path, {"restricted_protocols": restricted}, security=security) as file:
        port = json.loads(file.read_text())["grpc"]["port"]
        way = ("--url", f"127.0.0.1:{port}") if is_by_url else ("--config", str(file))
        given = ("--token-file", str(token), "--header", f"triton-grpc-protocol-code=@{code}")
        exit_code, text = ask(*way, *given)
        assert exit_code == 1 and "is not ready: broken" in text, text
        exit_code, text = ask(*way)
        assert exit_code == 1 and "broken" not in text, "and without, nothing is told"
        assert ask(*way, "--header", "authorization=x")[0] == 2


@pytest.mark.parametrize("given", ["restriction", "header", "token", "nothing"])
def test_nothing_secret_is_sent_to_a_server_with_another_certificate(tmp_path: Path, given: str) -> None:
    (tmp_path / "other").mkdir()
    impostor = make_certificate(tmp_path / "other", "server")
    own = make_certificate(tmp_path, "server")
    token = tmp_path / "token"
    token.write_text("aio_abcd_s3cret")
    with serving(tmp_path, {"tls": impostor}) as file:
        document = json.loads(file.read_text())
        document["grpc"]["tls"] = own
        if given == "restriction":
            document["grpc"]["restricted_protocols"] = ["health:k=secret"]
        file.write_text(json.dumps(document))
        options = {"header": ("--header", "k=v"), "token": ("--token-file", str(token))}.get(given, ())
        code, text = ask("--config", str(file), *options)
        if given == "nothing":
            assert code == 0, text
        else:
            assert code == 1 and "neither a token nor a header was sent" in text, text
            code, text = ask("--config", str(file), *options, "--tls-root-cert", own["certificate"])
            assert code == 3, text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--config", "/no/such.yaml"), "/no/such.yaml: No such file"),
        (("digits",), "--ready asks for the whole server"),
        (("--config", "x.yaml", "--url", "127.0.0.1:1"), "by --url or by --config"),
    ],
)
def test_a_wrong_command_line(options: tuple[str, ...], text: str) -> None:
    code, told = ask(*options)
    assert code == 2 and text in told, told
    assert ask(AIORCH_GRPC_ADDRESS="0.0.0.0", AIORCH_GRPC_PORT="1")[0] == 3  # whoever started it said --insecure
    assert ask(AIORCH_GRPC_PORT="0")[1].count("a free port: add --url HOST:PORT") == 1
    assert "has no gRPC door" in ask(AIORCH_GRPC_ENABLED="false")[1]


def test_the_image_asks_so() -> None:
    found = re.search(r"^HEALTHCHECK .* CMD (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    assert json.loads(found[1]) == ["aiorch", "status", "--ready"]
