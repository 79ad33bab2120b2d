"""A secret that was written in a wrong place is not repeated in the text about it, wherever that is."""

from __future__ import annotations

import pytest
import yaml

from aiorch_server.config.load import load_server_config
from aiorch_server.config.problems import format_found, looks_secret
from aiorch_server.errors import InvalidSettings
from aiorch_server.security.api_keys import make_key

SECRETS = [
    "s3cr3t",
    "hunter2!",
    "Tr0ub4dor&3",
    make_key().text,
    "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.c2ln",
    "Bearer abcdef",
    "postgresql://me:geheim@db/aiorch",
    "-----BEGIN PRIVATE KEY-----\nMIIB\n",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "ghp_abcdefghijklmnopqrst",
    "AKIAIOSFODNN7EXAMPLE",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
]
WORDS = [
    "TYPE_FP32", "FP16", "8001", "127.0.0.1", "0.0.0.0", "native", "onnxruntime", "model_v2", "utf-8", "1s", "10ms",
    "/models/digits/1", "digits", "explicit", "true", "sixty", "my-host.example.org", "a very long text about nothing",
    "KIND_GPU", "some_quite_long_model_name",
]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_what_is_told(secret: str, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture) -> None:
    """The typos that people make: a key's name, a level too high or low, the line above."""
    places = [
        {"tokn": secret}, {"security": {"tokn": secret}}, {"security": secret}, {"security": {"tokens": secret}},
        {"security": {"tokens": [secret]}}, {"security": {"api_keys": [{"id": secret}]}}, {"grpc": {"port": secret}},
        {"grpc": {"tls": secret}}, {"grpc": {"host": 1, "token": secret}}, {"http": {"port": {"password": secret}}},
        {"log": {"level": secret}}, {"lifecycle": {"control_mode": secret}},
        {"lifecycle": {"load_models": {secret: 1}}},
        {"registry": secret}, {"registry": {"max_files": secret}}, {"cache": {"kind": secret}}, {"cache": [secret]},
        {"execution": {"instances": [secret, secret]}},
        {"security": {"quotas": [{"tenant": "a", "rows_per_s": secret}]}},
    ]  # fmt: skip
    refused, folder = 0, tmp_path_factory.mktemp("settings")
    for number, tree in enumerate(places):
        file = folder / f"{number}.yaml"
        file.write_text(yaml.safe_dump(tree))
        told = ""
        try:
            load_server_config(file=file, environment={})
        except InvalidSettings as error:
            told = str(error)
        assert secret not in told and repr(secret)[1:-1] not in told, tree
        refused += bool(told)
    assert refused >= len(places) - 4, "nothing was wrong"
    for variable in ("AIORCH_GRPC_PORT", "AIORCH_LOG_LEVEL", "AIORCH_SECURITY_TOKENS", "AIORCH_TOKN"):
        try:
            load_server_config(environment={variable: secret})
        except InvalidSettings as error:
            assert secret not in str(error) and repr(secret)[1:-1] not in str(error), variable
    assert secret not in caplog.text


@pytest.mark.parametrize("word", WORDS)
def test_what_is_no_secret_is_shown(word: str) -> None:
    assert not looks_secret(word) and format_found(word) == repr(word)


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_one(secret: str) -> None:
    for value in (secret, [1, secret], {"a": {"b": secret}}, secret.encode()):
        assert looks_secret(value) and secret not in format_found(value)


@pytest.mark.parametrize(
    "text",
    ["token: 's3cr3t", "a: {token: s3cr3t", "token: s3cr3t: b", "x: &s3cr3t 1\ny: *s3cr3tt", "- s3cr3t\nb", "s3cr3t",
     "token: !s3cr3t x", "s3cr3t: 1\ns3cr3t: 2", "%s3cr3t"],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_files_that_cannot_be_read(text: str, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("settings") / f"server.{suffix}"
    file.write_text(text)
    with pytest.raises(InvalidSettings) as caught:
        load_server_config(file=file, environment={})
    assert "s3cr3t" not in str(caught.value)
