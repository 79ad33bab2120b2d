"""curl and h2load: HTTP/2 clients that know nothing of gRPC."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from running_site import INFER, decode_values, encode_values

from .conftest import Place

VALUES = [1.5, -2.0, 0.25]


def find(program: str, package: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.fail(f"{program} is missing: deploy/install-packages {package}")
    return path


def url(place: Place, path: str = INFER) -> str:
    return f"{'https' if place.root else 'http'}://127.0.0.1:{place.site.port}{path}"


@pytest.fixture
def body(tmp_path: Path) -> Path:
    message = encode_values(VALUES)
    file = tmp_path / "body"
    file.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    return file


def curl(place: Place, tmp_path: Path, path: str, *options: str) -> tuple[dict[str, str], bytes]:
    """Headers and trailers, and the body."""
    trust = ["--http2", "--cacert", str(place.root)] if place.root else ["--http2-prior-knowledge"]
    files = ["--dump-header", str(tmp_path / "head"), "--output", str(tmp_path / "answer")]
    command = [find("curl", "curl"), "--silent", "--show-error", "--max-time", "10", *trust, *files, *options]
    ran = subprocess.run([*command, url(place, path)], capture_output=True, text=True, timeout=20)
    assert ran.returncode == 0, ran.stderr
    lines = (tmp_path / "head").read_text().splitlines()
    fields = dict(line.split(": ", 1) for line in lines if ": " in line)
    answer = tmp_path / "answer"
    return {"status": lines[0].split()[1], **fields}, answer.read_bytes() if answer.exists() else b""


@pytest.mark.proves("ModelInfer", by="HTTP")
def test_curl(place: Place, tmp_path: Path, body: Path) -> None:
    options = ["--header", "content-type: application/grpc", "--header", "te: trailers", "--data-binary", f"@{body}"]
    fields, answer = curl(place, tmp_path, INFER, *options)
    assert (fields["status"], fields["content-type"], fields["grpc-status"]) == ("200", "application/grpc", "0")
    assert decode_values(answer[5:]) == VALUES


def test_curl_of_a_page(place: Place, tmp_path: Path) -> None:
    """Browsers and probes get an HTTP status, not a broken connection."""
    assert curl(place, tmp_path, "/")[0]["status"] == "405"
    assert curl(place, tmp_path, INFER, "--request", "POST")[0]["status"] == "415"


@pytest.mark.proves("ModelInfer", by="HTTP")
def test_h2load(place: Place, body: Path) -> None:
    """4 connections with 32 streams each: every request has its answer."""
    requests = 4000
    options = f"--requests {requests} --clients 4 --max-concurrent-streams 32 --connection-active-timeout 20"
    head = ["--header", "content-type: application/grpc", "--header", "te: trailers", "--data", str(body)]
    command = [find("h2load", "nghttp2-client"), *options.split(), *head, url(place)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert ran.returncode == 0, ran.stderr
    assert f"{requests} succeeded, 0 failed, 0 errored, 0 timeout" in ran.stdout, ran.stdout
    assert f"status codes: {requests} 2xx" in ran.stdout
    size = re.search(r"\((\d+)\) data", ran.stdout)
    assert size is not None and int(size[1]) % requests == 0 and int(size[1]) > 0, ran.stdout
