"""Credentials end nowhere: not in the most talkative logs, nor in traces, metrics and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from issuers import ISSUER, make_key_set, make_private, make_token, show_key
from otlp_receiver import receive_spans
from running_site import encode_values
from secured import INFER, KEYS, SERVICE, TIMEOUT_S, list_bindings, list_keys
from served import serve

from aiorch_server.config.load import load_server_config
from aiorch_server.errors import InvalidSettings


def list_secrets() -> dict[str, str]:
    """What callers will show: right, wrong in each way, and of no known kind."""
    claims = {"sub": "recognisable-subject"}
    return {
        "key": KEYS["client"].text,
        "wrong key": KEYS["client"].text[:-4] + "ZZZZ",
        "odd key": "aio_recognisable_secret",
        "token": make_token(aiorch_roles="client", **claims),
        "expired": make_token(exp=1, **claims),
        "forged": make_token(key=make_private("RS256", 9), **claims),
        "unknown key": make_token(kid="recognisable-kid", **claims),
        "other issuer": make_token(iss="https://recognisable.example", **claims),
        "gibberish": "recognisable-gibberish",
        "bytes": "recognisable-\x7f\x01",
    }


def list_parts(secret: str) -> set[str]:
    """What must not be seen of a secret: its long parts, whole or cut."""
    return {part[:24] for part in secret.replace("_", ".").split(".") if len(part) >= 16}


@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test_nothing_shows_a_credential(models: Path, tmp_path: Path, transport: str) -> None:
    keys = tmp_path / "keys.json"
    keys.write_bytes(make_key_set(show_key(make_private("RS256"), "one")))
    tokens = {"issuer": ISSUER, "audience": ["aiorch"], "jwks_file": str(keys), "prefix": "t:"}
    settings = tmp_path / "server.yaml"
    bindings = list_bindings()
    security = {"enabled": True, "api_keys": list_keys(), "bindings": bindings, "tokens": [tokens]}
    settings.write_text(json.dumps({"security": security, "log": {"slow_us": 1, "slow_lines_per_s": 1000}}))
    secrets = list_secrets()
    told: list[str] = []
    with receive_spans() as (endpoint, receiver):
        options = ["--config", str(settings), "--log-level", "debug", "--log-format", "json", "--transport", transport]
        options += ["--trace-endpoint", endpoint, "--trace-rate", "1", "--backend"]
        options += ["aiorch_backends.identity:IdentityBackend"]
        with serve(models, *options) as server:
            told += send_all(server, secrets)
            answer = httpx.get(
                f"http://{server.metrics}/metrics", headers={"authorization": f"Bearer {KEYS['root'].text}"}
            )
            assert answer.status_code == 200 and "nv_inference_count" in answer.text
            told.append(answer.text)
            assert server.end() == 0
            log = server.log.read_text(errors="replace")
        spans = repr(receiver.wait(lambda found: any("own-one" in str(each) for each in found)))
    assert "own-one" in spans and '"level"' in log and len(log.splitlines()) > 3, "there was nothing to look through"
    assert len(told) > 20
    everything = "\n".join([*told, log, spans])
    for name, secret in secrets.items():
        for part in list_parts(secret):
            if part not in ("recognisable", KEYS["client"].id):
                assert part not in everything, f"{name} is shown"
    for name in ("root", "viewer"):
        # it may have a "_" in it
        assert KEYS[name].text.removeprefix(f"aio_{KEYS[name].id}_") not in everything


def send_all(server: Any, secrets: dict[str, str]) -> list[str]:
    """Every secret over both doors and several calls; what is told back."""
    told = []
    with grpc.insecure_channel(server.grpc) as channel, httpx.Client(base_url=f"http://{server.http}") as http:
        for name, secret in secrets.items():
            header = f"Bearer {secret}"
            for path, message in (
                (INFER, encode_values([1.0], "own-one")),
                (INFER, encode_values([1.0], "nothing")),
                (f"{SERVICE}/ServerMetadata", b""),
                ("/some.Service/Method", b""),
            ):
                if name != "bytes":
                    metadata = [("authorization", header)]
                    try:
                        channel.unary_unary(path)(message, metadata=metadata, timeout=TIMEOUT_S)
                    except grpc.RpcError as error:
                        told.append(str(error.details()))  # type: ignore[attr-defined]
            for method, path in (
                ("GET", "/v2"),
                ("POST", "/v2/models/own-one/infer"),
                ("GET", "/v1/models/own-one"),
                ("GET", "/x"),
            ):
                answer = http.request(method, path, headers={b"authorization": header.encode("latin-1")})
                told += [answer.text, str(answer.headers)]
    return told


def test_a_secret_in_the_wrong_place_is_not_repeated() -> None:
    """Who writes the key itself where its digest belongs is not shown it again."""
    key = KEYS["client"].text
    with pytest.raises(InvalidSettings) as raised:
        load_server_config(
            {"security_api_keys": [{"id": "abcd", "sha256": key, "principal": "alice"}], "security_enabled": True},
            environment={},
        )
    assert "sha256" in str(raised.value) and key[5:30] not in str(raised.value)
