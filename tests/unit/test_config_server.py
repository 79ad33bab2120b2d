"""ServerConfig and its sources: defaults < file < environment < command line."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from aiorch_server.cli.output import UsageError
from aiorch_server.cli.settings import build_config
from aiorch_server.config import load
from aiorch_server.config.load import load_server_config, setting_names
from aiorch_server.config.server import CacheConfig, ControlMode, ServerConfig, Transport
from aiorch_server.errors import InvalidSettings


def problems_of(options: dict[str, Any] | None = None, **sources: Any) -> str:
    with pytest.raises(InvalidSettings) as caught:
        load_server_config(options, **{"environment": {}, **sources})
    return str(caught.value)


def test_defaults_are_tritons_ports_on_loopback() -> None:
    config = load_server_config(environment={})
    assert config == ServerConfig()
    assert [(door.host, door.port) for door in (config.grpc, config.http, config.metrics)] == [
        ("127.0.0.1", 8001),
        ("127.0.0.1", 8000),
        ("127.0.0.1", 8002),
    ]
    assert config.grpc.transport is Transport.NATIVE
    assert config.grpc.io_threads == 1
    assert config.grpc.max_message_bytes == 64 * 1024 * 1024
    assert not config.grpc.tls.is_enabled
    assert config.lifecycle.control_mode is ControlMode.NONE
    assert config.execution.allow_code is False
    assert config.execution.default_max_batch_size == 32
    with pytest.raises(ValidationError):
        config.grpc.port = 1  # type: ignore[misc]


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_each_source_wins_over_the_one_before(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"server.{suffix}"
    texts = {
        "yaml": "grpc: {port: 1001, host: localhost, tls: {}}\nhttp: {port: 1002}\nmetrics: {port: 1003}\n",
        "toml": '[grpc]\nport = 1001\nhost = "localhost"\n[http]\nport = 1002\n[metrics]\nport = 1003\n',
    }
    file.write_text(texts[suffix])
    environment = {"AIORCH_HTTP_PORT": "2002", "AIORCH_METRICS_PORT": "2003"}
    config = load_server_config({"metrics-port": 3003, "http_port": None}, file=file, environment=environment)
    assert (config.grpc.port, config.http.port, config.metrics.port) == (1001, 2002, 3003)
    assert config.grpc.host == "localhost"
    by_variable = load_server_config(environment={**environment, "AIORCH_CONFIG": str(file)})
    assert (by_variable.grpc.port, by_variable.metrics.port) == (1001, 2003)


def test_tritons_names_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    config = load_server_config(
        {
            "--model-repository": [str(tmp_path / "a")],
            "model-control-mode": "explicit",
            "load-model": ["x", "y"],
            "exit-timeout-secs": 5,
            "strict-readiness": False,
            "allow-http": "false",
            "grpc-address": "::1",
        },
        environment={"AIORCH_MODEL_REPOSITORY": "/nowhere", "AIORCH_ALLOW_CODE": "Yes"},
    )
    assert config.repository.paths == (tmp_path / "a",)
    assert config.lifecycle.load_models == ("x", "y")
    assert config.lifecycle.exit_timeout_secs == 5
    assert config.lifecycle.is_readiness_strict is False
    assert config.http.enabled is False
    assert config.grpc.host == "::1"
    assert config.execution.allow_code is True
    config = load_server_config(
        environment={
            "AIORCH_MODEL_REPOSITORY": f"{tmp_path / 'a'}:{tmp_path / 'b'}",
            "AIORCH_BACKENDS": "a.b:C, d:e",
            "AIORCH_EXECUTION_INSTANCES": "3",
        }
    )
    assert config.repository.paths == (tmp_path / "a", tmp_path / "b")
    assert config.execution.backends == ("a.b:C", "d:e")
    assert config.execution.instances == 3


def test_all_problems_at_once_each_with_its_source(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("http: {port: x, prt: 3}\nlog: {level: loud}\nfoo: {}\nmetrics: 7\n")
    text = problems_of(
        {"nope": 1, "grpc-prot": 3, "default-max-batch-size": -1},
        file=file,
        environment={
            "AIORCH_GRPC_PORT": "77777",
            "AIORCH_STRICT_READINESS": "maybe",
            "AIORCH_MODEL_REPOSITORY": "/tmp:/nowhere",
            "AIORCH_BACKENDS": "a.b",
            "AIORCH_LOAD_MODEL": "a",
            "AIORCH_METRICS_PORT": "8009",
            "AIORCH_EXIT_TIMEOUT_SECS": "nan",
        },
    )
    for expected in (
        "option --nope: there is no such setting",
        "option --grpc-prot: there is no such setting; did you mean 'grpc_port'?",
        "execution.default_max_batch_size: found -1; should be greater than or equal to 0 "
        "(from option --default-max-batch-size)",
        "grpc.port: found '77777'; should be less than or equal to 65535 (from environment AIORCH_GRPC_PORT)",
        f"http.port: found 'x'; should be a valid integer, unable to parse string as an integer (from file {file})",
        "http.prt: unknown key; did you mean 'port'?",
        "log.level: found 'loud'",
        "foo: unknown key",
        "metrics: found 7",
        "lifecycle.is_readiness_strict: found 'maybe'",
        "repository.paths[1]: found '/nowhere'",
        "(from environment AIORCH_MODEL_REPOSITORY)",
        "execution.backends[0]: found 'a.b'; should be written 'module:attribute'",
        "lifecycle.exit_timeout_secs: found 'nan'",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"grpc-port": 8000}, "http.port: found 8000, which grpc.port on 127.0.0.1 has already"),
        ({"allow-grpc": False, "allow-http": False}, "at least one door must be open"),
        ({"load-model": ["a"]}, "lifecycle.load_models: found ['a']; it needs control_mode explicit, found none"),
        ({"load-model": ["*", "a"], "model-control-mode": "explicit"}, "'*' must stand alone"),
        ({"load-model": ["../a"], "model-control-mode": "explicit"}, "lifecycle.load_models[0]: found '../a'"),
        ({"grpc-port": True}, "grpc.port: found True; should be a number"),
        ({"repository-poll-secs": 0}, "lifecycle.poll_secs: found 0"),
        ({"model-control-mode": "sometimes"}, "lifecycle.control_mode: found 'sometimes'; should be 'none'"),
        ({"grpc-server-key": __file__}, "grpc.tls.certificate: is missing; a key needs its certificate"),
        ({"grpc-server-cert": __file__, "grpc-server-key": __file__}, "grpc.tls.certificate: does not load"),
        ({"grpc-use-ssl-mutual": True}, "grpc.tls.root: is missing"),
        ({"grpc-server-cert": "/nowhere"}, "grpc.tls.certificate: found '/nowhere'"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], expected: str) -> None:
    assert expected in problems_of(options)


def test_ports_may_be_equal_where_they_do_not_meet() -> None:
    load_server_config({"grpc-port": 0, "http-port": 0, "metrics-port": 0}, environment={})
    load_server_config({"grpc-port": 8000, "http-address": "127.0.0.2"}, environment={})
    load_server_config({"grpc-port": 8000, "allow-http": False}, environment={})


def test_a_wrong_section_causes_no_second_problem() -> None:
    text = problems_of({"http-port": "x", "metrics-port": 8000})
    assert "http.port: found 'x'" in text
    assert "ports must differ" not in text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("server.ini", b"", "must end in .yaml, .yml or .toml"),
        ("server.toml", b"a = [", "server.toml: "),
        ("server.yaml", b"a: 1\na: 2", "server.yaml:2:1: key 'a' is written more than once"),
        ("server.yaml", b"\xff", "server.yaml: "),
        ("server.yaml", b"#" * (load.LARGEST_FILE_BYTES + 1), "is larger than"),
        ("server.yaml", None, "No such file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    text = problems_of({"nope": 1}, file=file)
    assert f"configuration file {file}: " in text
    assert expected in text
    assert "option --nope" in text


def test_a_named_file_that_is_not_there_is_no_default(tmp_path: Path) -> None:
    assert "No such file" in problems_of(environment={"AIORCH_CONFIG": str(tmp_path / "gone.yaml")})


def test_unknown_variables_are_told_and_kubernetes_ones_are_not(caplog: pytest.LogCaptureFixture) -> None:
    environment = {
        "AIORCH_GRPC_PROT": "secret-value",
        "AIORCH_DEBUG": "1",
        "AIORCH_SERVICE_HOST": "10.0.0.1",
        "AIORCH_PORT": "tcp://10.0.0.1:8001",
        "AIORCH_PORT_8001_TCP_ADDR": "10.0.0.1",
        "AIORCH_GRPC_PORT": "tcp://10.0.0.1:8001",
        "OTHER": "x",
    }
    with caplog.at_level(logging.WARNING):
        config = load_server_config(environment=environment)
    assert config == ServerConfig()
    assert [record.getMessage() for record in caplog.records] == [
        "environment AIORCH_GRPC_PROT is no setting and is passed over; did you mean 'grpc_port'?"
    ]


def test_the_processs_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIORCH_GRPC_PORT", "1234")
    assert load_server_config().grpc.port == 1234


def test_flat_names_are_unambiguous() -> None:
    names = setting_names()
    leaves = list(load._list_leaves(ServerConfig))
    assert len({"_".join(path) for path in leaves}) == len(leaves)
    for alias, path in load.ALIASES.items():
        assert path in leaves
        assert names[alias] == path
        assert alias not in {"_".join(other) for other in leaves if other != path}


def test_a_real_certificate_passes(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=localhost"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    options = {"grpc-server-cert": certificate, "grpc-server-key": str(key), "grpc-root-cert": certificate}
    config = load_server_config({**options, "grpc-use-ssl-mutual": True}, environment={})
    assert config.grpc.tls.is_enabled
    assert config.grpc.tls.require_client_auth


@pytest.mark.parametrize("name", ["grpc_port", "grpc-port", "grpc.port"])
def test_a_setting_given_twice_is_told_however_it_is_spelt(tmp_path: Path, name: str) -> None:
    def build(value: str) -> ServerConfig:
        options = {"grpc_port": 4000, "model_repository": [str(tmp_path)]}
        return build_config(
            options, file=None, use_ssl=None, log_verbose=None, backend_config=[], others=[f"{name}={value}"]
        )

    with pytest.raises(UsageError, match="given twice, as 4000 and as 4001"):
        build("4001")
    assert build("4000").grpc.port == 4000


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("grcp_port", "--set grcp_port: there is no such setting; did you mean 'grpc_port'?"),
        ("grpc.prot", "--set grpc.prot: there is no such setting; did you mean 'grpc_port'?"),
        ("port", "did you mean 'grpc_port' or 'http_port' or 'metrics_port' or 'reuse_port'?"),
        ("poll-secs", "did you mean 'lifecycle_poll_secs' or 'repository_poll_secs'?"),
        ("xyz", "--set xyz: there is no such setting (docs/settings.md has all)"),
    ],
)
def test_a_misspelt_setting_is_told_with_the_nearest_names(written: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_config(
            {}, file=None, use_ssl=None, log_verbose=None, backend_config=[], others=["no_such=1", f"{written}=1"]
        )
    assert expected in str(caught.value)
    assert "--set no_such: " in str(caught.value)


def test_a_flat_name_in_a_file_is_told_how_it_is_written_there(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("grpc_port: 5\ngrpc_server_cert: x\ngrpc: {port: 4}\n")
    text = problems_of({}, file=file)
    assert f"grpc_port: a file has sections: write grpc: {{port: ...}} (from file {file})" in text
    assert "grpc_server_cert: a file has sections: write grpc: {tls: {certificate: ...}}" in text
    assert "unknown key" not in text


def build_cache(folder: Path, *entries: str, others: tuple[str, ...] = ()) -> CacheConfig:
    options = {"model_repository": [str(folder)]}
    return build_config(
        options, file=None, use_ssl=None, log_verbose=None, backend_config=[], cache_config=entries, others=others
    ).cache


def test_triton_s_cache_options_in_one_or_many(tmp_path: Path) -> None:
    one = build_cache(tmp_path, "redis,host=h,port=1,user=u,password=a,b,connect_timeout=5,socket_timeout=7")
    many = build_cache(
        tmp_path,
        *("redis,host=h", "redis,port=1", "redis,user=u", "redis,password=p", "redis,connect_timeout=5"),
        *("redis,socket_timeout=7", "redis,wait_timeout=9", "redis,pool_size=3", "redis,db=2"),
    )
    assert (one.kind, one.redis.host, one.redis.port, one.redis.user, one.timeout_ms) == ("redis", "h", 1, "u", 7)
    assert many.redis == one.redis.model_copy(
        update={"password": SecretStr("p"), "wait_timeout_ms": 9, "pool_size": 3, "db": 2}
    )
    assert build_cache(tmp_path, "local,size=4096").size_bytes == 4096


SECRET = "hidden"


@pytest.mark.parametrize(
    ("entries", "others", "reason"),
    [
        (["redis"], [], "--cache-config redis: expected local,size=BYTES or redis,host=HOST,port=PORT"),
        ([f"memcached,password={SECRET}"], [], "--cache-config memcached: expected"),
        (["redis,port=1"], [], "cache.redis.host: is missing"),
        ([f"redis,host=h,sni={SECRET}"], [], "--cache-config redis: there is no sni; known here: host, port"),
        (["redis,host="], [], "host needs a value"),
        (["redis,host=h,socket_timeout=0"], [], "cache.timeout_ms: found '0'"),
        (["redis,host=h,connect_timeout=0"], [], "cache.redis.connect_timeout_ms: found '0'"),
        (["redis,host=h,cert=/etc/passwd"], [], "cache.redis.tls_certificate: has no use without use_tls"),
        ([f"redis,password={SECRET}", "redis,password=other"], [], "cache_redis_password is given twice"),
        (["redis,host=h"], [f"cache_redis={SECRET}"], "there is no such setting"),
    ],
)
def test_wrong_cache_options_are_told_without_the_password(
    tmp_path: Path, entries: list[str], others: list[str], reason: str
) -> None:
    with pytest.raises(UsageError) as raised:
        build_cache(tmp_path, *entries, others=tuple(others))
    assert reason in str(raised.value)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("written", [f"[{SECRET}]", f"{{a: {SECRET}}}", "12345"])
def test_a_password_of_a_wrong_kind_is_not_shown(tmp_path: Path, written: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"cache: {{kind: redis, redis: {{host: h, password: {written}}}}}")
    if written.isdecimal():
        config = load_server_config(file=path, environment={})
        assert config.cache.redis.password.get_secret_value() == written
        assert written not in repr(config) + str(config.model_dump())
        return
    with pytest.raises(InvalidSettings) as raised:
        load_server_config(file=path, environment={})
    assert "cache.redis.password: found something else" in str(raised.value)
    assert SECRET not in str(raised.value)
