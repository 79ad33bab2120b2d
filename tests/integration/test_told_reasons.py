"""Why a model did not load is told wherever it is looked for; a request for it only hears that there is none."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from aiorch_client import Client, ClientError
from typer.testing import CliRunner

from aiorch_server.app import Application
from aiorch_server.cli import build_app
from aiorch_server.config.server import ServerConfig

REASON = "parameters.execute_delay: is unknown to backend 'identity'; did you mean 'execute_delay_us'?"


def read(url: str, method: str = "GET") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_the_reason_is_told(tmp_path: Path) -> None:
    (tmp_path / "wrong" / "1").mkdir(parents=True)
    text = 'backend: "identity" parameters { key: "execute_delay" value { string_value: "1" } }'
    (tmp_path / "wrong" / "config.pbtxt").write_text(text)
    doors = {"grpc": {"port": 0}, "http": {"port": 0}, "metrics": {"port": 0}}
    async with Application(ServerConfig.model_validate({**doors, "repository": {"paths": [str(tmp_path)]}})) as app:
        await asyncio.to_thread(look, f"127.0.0.1:{app.grpc_port}", f"http://127.0.0.1:{app.http_port}/v2")


def look(target: str, http: str) -> None:
    code, body = read(f"{http}/health/ready")
    assert code == 400 and REASON in json.loads(body)["models"]["wrong"]
    code, body = read(f"{http}/repository/index", "POST")
    assert code == 200 and REASON in json.loads(body)[0]["reason"]
    shown = CliRunner().invoke(build_app(), ["status", "--url", target])
    assert shown.exit_code == 0 and REASON in " ".join(shown.output.split())
    with Client(target) as client:
        (entry,) = client.index()
        assert REASON in entry.reason
        with pytest.raises(ClientError) as caught:
            client.metadata("wrong")
        assert caught.value.code is grpc.StatusCode.NOT_FOUND
        assert caught.value.details == "Request for unknown model: 'wrong' has no available versions"
