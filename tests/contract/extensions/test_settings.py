"""Settings of logging and tracing, read and changed by tritonclient over gRPC and HTTP while the server runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from running_site import Site
from served import Served, serve
from tritonclient.utils import InferenceServerException

from aiorch_server.errors import RequestError
from aiorch_server.observability.log_settings import LogSettings
from aiorch_server.observability.trace_settings import TraceLevel, TraceSetting, TraceSettings

LIBRARIES = {"grpc": grpc_client, "http": http_client}
AT_START = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}
NOTHING_TRACED = {
    "trace_level": ["OFF"],
    "trace_rate": ["1000"],
    "trace_count": ["-1"],
    "trace_mode": ["triton"],
    "log_frequency": ["0"],
    "trace_file": [""],
}


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with serve(models, "--log-format", "json", "--set", "model_control_mode=explicit") as server:
        yield server


class Client:
    """tritonclient's, with the answers of both protocols in one form."""

    def __init__(self, door: str, grpc: str, http: str) -> None:
        self.is_grpc = door == "grpc"
        self.client = LIBRARIES[door].InferenceServerClient(grpc if self.is_grpc else http)

    def log(self, **changes: Any) -> dict[str, Any]:
        answer = self.client.update_log_settings(changes) if changes else self.client.get_log_settings()
        if not self.is_grpc:
            return dict(answer)
        return {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in answer.settings.items()}

    def trace(self, model: str = "", **changes: Any) -> dict[str, list[str]]:
        name = {"model_name": model} if model else {}
        if changes:
            answer = self.client.update_trace_settings(settings=changes, **name)
        else:
            answer = self.client.get_trace_settings(**name)
        if not self.is_grpc:
            return {key: value if isinstance(value, list) else [value] for key, value in answer.items()}
        return {key: list(setting.value) for key, setting in answer.settings.items()}


@pytest.fixture(params=LIBRARIES)
def logs(request: pytest.FixtureRequest, served: Served) -> Iterator[Client]:
    client = Client(request.param, served.grpc, served.http)
    yield client
    client.log(**{key: value for key, value in AT_START.items() if key != "log_file"})
    client.client.close()


@pytest.fixture(params=LIBRARIES)
def traces(request: pytest.FixtureRequest, site: Site) -> Iterator[Client]:
    client = Client(request.param, site.target, site.http)
    yield client
    for model in ("", "identity"):
        client.trace(model, trace_level=None, trace_rate=None, trace_count=None, log_frequency=None)
    client.client.close()


def make_noise(served: Served) -> str:
    """What the server writes while one model comes and goes and another does not load."""
    start = served.log.stat().st_size
    client = http_client.InferenceServerClient(served.http)
    client.load_model("text")
    client.unload_model("text")
    with pytest.raises(InferenceServerException):
        client.load_model("text", config='{"backend": "nobody"}')
    client.close()
    return served.log.read_bytes()[start:].decode()


def levels_of(text: str) -> set[str]:
    return {json.loads(line)["level"] for line in text.splitlines()}


def test_log_levels_really_change(logs: Client, served: Served) -> None:
    assert logs.log() == AT_START
    before = levels_of(make_noise(served))
    assert "INFO" in before and "DEBUG" not in before
    assert logs.log(log_info=False) == AT_START | {"log_info": False}
    assert levels_of(make_noise(served)) == before - {"INFO"}
    assert logs.log(log_warning=False, log_error=False)["log_error"] is False
    assert make_noise(served) == ""
    assert logs.log(log_verbose_level=2)["log_verbose_level"] == 2
    assert levels_of(make_noise(served)) <= {"DEBUG"}
    logs.log(log_info=True, log_verbose_level=0)
    assert levels_of(make_noise(served)) == {"INFO"}


@pytest.mark.parametrize("off", ["log_info", "log_warning", "log_error"])
def test_each_switch_is_for_its_level(off: str) -> None:
    records: list[str] = []
    output = logging.Handler()
    output.emit = lambda record: records.append(record.levelname)  # type: ignore[method-assign]
    settings = LogSettings(output, logging.INFO, "text")
    root, level = logging.getLogger(), logging.getLogger().level
    try:
        settings.update({off: False})
        assert root.level == (logging.WARNING if off == "log_info" else logging.INFO)
        for name in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
            output.handle(logging.makeLogRecord({"levelno": getattr(logging, name), "levelname": name}))
    finally:
        root.setLevel(level)
    gone = {"log_info": ["INFO"], "log_warning": ["WARNING"], "log_error": ["ERROR", "CRITICAL"]}[off]
    assert records == [name for name in ("INFO", "WARNING", "ERROR", "CRITICAL") if name not in gone]


def test_log_format_really_changes(logs: Client, served: Served) -> None:
    for log_format, start in (("ISO8601", "20"), ("json", "{"), ("text", "20"), ("default", "{")):
        assert logs.log(log_format=log_format)["log_format"] == log_format
        lines = make_noise(served).splitlines()
        assert lines and all(line.startswith((start, "    ")) for line in lines), lines


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"log_file": "/tmp/evil"}, "UNIMPLEMENTED", "log file location can not be updated through network protocol"),
        ({"log_info": False, "log_format": "xml"}, "INVALID_ARGUMENT", "invalid argument for log_format, got: xml"),
        ({"log_info": False, "log_colour": True}, "INVALID_ARGUMENT", "unknown log setting 'log_colour'"),
        ({"log_info": False, "log_verbose_level": 2**31}, "INVALID_ARGUMENT", "expect int32 for 'log_verbose_level'"),
    ],
)
def test_log_settings_that_are_refused(logs: Client, changes: Any, code: str, text: str) -> None:
    """Nothing of such a call happens."""
    refuse(lambda: logs.log(**changes), code, text)
    assert logs.log() == AT_START
    assert logs.log(log_info=None) == AT_START


def test_logging_of_somebody_else(site: Site) -> None:
    """A server inside another program does not touch that program's logging."""
    client = Client("grpc", site.target, site.http)
    level = logging.getLogger().level
    refuse(lambda: client.log(log_info=False), "UNIMPLEMENTED", "does not support dynamic logging")
    assert logging.getLogger().level == level
    client.client.close()


def test_trace_settings_of_all_and_of_one(traces: Client) -> None:
    assert traces.trace() == NOTHING_TRACED
    assert traces.trace(trace_rate="7")["trace_rate"] == ["7"]
    assert traces.trace("identity")["trace_rate"] == ["7"]
    assert traces.trace("identity", trace_count="3", log_frequency=["5"])["trace_count"] == ["3"]
    assert traces.trace()["trace_count"] == ["-1"]
    assert traces.trace(trace_count="9", trace_rate=None) == NOTHING_TRACED | {"trace_count": ["9"]}
    assert traces.trace("identity") == NOTHING_TRACED | {"trace_count": ["3"], "log_frequency": ["5"]}
    assert traces.trace("identity", trace_count=None)["trace_count"] == ["9"]


@pytest.mark.parametrize(
    ("model", "changes", "code", "text"),
    [
        ("", {"trace_file": "/tmp/evil"}, "UNIMPLEMENTED", "trace file location can not be updated"),
        ("", {"trace_mode": "opentelemetry"}, "UNIMPLEMENTED", "trace mode can not be updated"),
        ("", {"trace_level": ["TIMESTAMPS"]}, "UNIMPLEMENTED", "trace level TIMESTAMPS is not supported"),
        ("", {"trace_level": ["OFF", "TENSORS"]}, "INVALID_ARGUMENT", "Expect only one trace level 'OFF'"),
        ("", {"trace_level": ["LOUD"]}, "INVALID_ARGUMENT", "unknown trace level 'LOUD'"),
        ("", {"trace_rate": "often"}, "INVALID_ARGUMENT", "Unable to parse 'trace_rate', got: often"),
        ("", {"trace_rate": ["1", "2"]}, "INVALID_ARGUMENT", "expect only 1 value for 'trace_rate'"),
        ("", {"trace_rate": "4294967296"}, "INVALID_ARGUMENT", "value is out of range [ 0, 4294967295 ]"),
        ("", {"trace_rate": "-1"}, "INVALID_ARGUMENT", "value is out of range [ 0, 4294967295 ]"),
        ("", {"trace_count": "-2"}, "INVALID_ARGUMENT", "'trace_count'. Expecting value >= -1, got:-2"),
        ("", {"trace_count": "9" * 5000}, "INVALID_ARGUMENT", "Unable to parse 'trace_count'"),
        ("", {"trace_rate": "1", "colour": "red"}, "INVALID_ARGUMENT", "unknown trace setting 'colour'"),
        ("nobody", {"trace_rate": "1"}, "INVALID_ARGUMENT", "Request for unknown model : nobody"),
    ],
)
def test_trace_settings_that_are_refused(traces: Client, model: str, changes: Any, code: str, text: str) -> None:
    refuse(lambda: traces.trace(model, **changes), code, text)
    assert traces.trace() == NOTHING_TRACED


def test_levels_of_a_server_that_traces() -> None:
    settings = TraceSettings(TraceSetting(rate=5), levels=frozenset({TraceLevel.OFF, TraceLevel.TIMESTAMPS}))
    assert settings.can_trace
    assert settings.update({"trace_level": ["TIMESTAMPS"]}).levels == {TraceLevel.TIMESTAMPS}
    assert settings.get("m").to_strings()["trace_level"] == ["TIMESTAMPS"]
    assert settings.update({"trace_level": ["OFF"]}, "m").levels == frozenset()
    assert settings.get().levels == {TraceLevel.TIMESTAMPS}
    with pytest.raises(RequestError, match="trace level TENSORS is not supported"):
        settings.update({"trace_level": ["TENSORS", "TIMESTAMPS"]})


def refuse(call: Callable[[], Any], code: str, text: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        call()
    assert caught.value.status() in (f"StatusCode.{code}", {"UNIMPLEMENTED": "501"}.get(code, "400"))
    assert text in caught.value.message(), caught.value.message()
