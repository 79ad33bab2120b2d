"""Servers on which every group needs a header of its own, and clients that send exactly what they are told."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from running_site import TIMEOUT_S, Site, write_models
from tritonclient.utils import InferenceServerException

from aiorch_server.config.restriction import Group
from aiorch_server.frontends.rest.openapi import build_openapi

DOORS = {"threads": ("native", 1), "loop": ("native", 0), "grpcio": ("grpcio", 0)}
Pairs = tuple[tuple[str, str], ...]


def secret_of(group: str) -> str:
    return f"Open, {group}=Sesame: 1"


RULES = [f"{group}:Key-{group}={secret_of(group)}" for group in Group]
PREFIX = "triton-grpc-protocol-key-"
ALL: Pairs = tuple((PREFIX + group, secret_of(group)) for group in Group)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def open_site(models: Path) -> Iterator[Callable[..., Site]]:
    opened: dict[Any, Site] = {}

    def get(door: str, rules: tuple[str, ...] = tuple(RULES)) -> Site:
        if (door, rules) not in opened:
            transport, io_threads = DOORS[door]
            opened[door, rules] = Site(
                models,
                io_threads=io_threads,
                grpc={"transport": transport, "restricted_protocols": rules},
                http={"port": 0, "restricted_apis": rules},
                shared_memory={"keys": "on"},
            )
        return opened[door, rules]

    yield get
    for each in opened.values():
        each.close()


@pytest.fixture(params=DOORS)
def site(request: pytest.FixtureRequest, open_site: Callable[..., Site]) -> Site:
    return open_site(request.param)


@pytest.fixture
def rest(open_site: Callable[..., Site]) -> Site:
    return open_site("threads")


def ask(channel: grpc.Channel, path: str, metadata: Pairs = (), message: bytes = b"") -> tuple[str, str]:
    """Code and text of a call; OK when a first answer comes. On the wire all kinds of methods begin alike."""
    call = channel.stream_stream(path)(iter([message]), metadata=metadata, timeout=TIMEOUT_S)
    try:
        next(call)
        return "OK", ""
    except StopIteration:
        return "OK", ""
    except grpc.RpcError:
        return call.code().name, call.details()
    finally:
        call.cancel()


def refusal_of(group: str) -> tuple[str, str]:
    return "UNAVAILABLE", f"This protocol is restricted, expecting header '{PREFIX}{group}'"


def fetch(site: Site, method: str, path: str, headers: Pairs = (), body: bytes = b"") -> tuple[int, bytes]:
    """Sends exactly these characters; a client of more comfort would write the path its own way."""
    address, port = site.http.rsplit(":", 1)
    connection = http.client.HTTPConnection(address, int(port), timeout=TIMEOUT_S)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


OPERATIONS = [
    (method.upper(), path.format(model="identity", version="1", label="stable", region="r", repository="main"))
    for path, item in build_openapi()["paths"].items()
    if path != "/metrics"
    for method in ("get", "post")
    if method in item
]

BODY = json.dumps({"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}).encode()
ROWS = json.dumps({"instances": [[1.0]]}).encode()


def fill(library: Any) -> list[Any]:
    tensor = library.InferInput("INPUT0", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 2), np.float32))
    return [tensor]


CALLS: list[tuple[str, Callable[[Any, Any, dict[str, str]], Any]]] = [
    ("health", lambda _, c, headers: c.is_server_live(headers=headers)),
    ("health", lambda _, c, headers: c.is_server_ready(headers=headers)),
    ("health", lambda _, c, headers: c.is_model_ready("identity", headers=headers)),
    ("metadata", lambda _, c, headers: c.get_server_metadata(headers=headers)),
    ("metadata", lambda _, c, headers: c.get_model_metadata("identity", headers=headers)),
    ("inference", lambda library, c, headers: c.infer("identity", fill(library), headers=headers)),
    ("shared-memory", lambda _, c, headers: c.unregister_system_shared_memory(headers=headers)),
    ("shared-memory", lambda _, c, headers: c.get_cuda_shared_memory_status(headers=headers)),
    ("model-config", lambda _, c, headers: c.get_model_config("identity", headers=headers)),
    ("model-repository", lambda _, c, headers: c.get_model_repository_index(headers=headers)),
    ("statistics", lambda _, c, headers: c.get_inference_statistics(headers=headers)),
    ("trace", lambda _, c, headers: c.get_trace_settings(headers=headers)),
    ("logging", lambda _, c, headers: c.get_log_settings(headers=headers)),
]


def let_in(call: Any, library: Any, client: Any, headers: dict[str, str]) -> Any:
    """The answer; log settings belong to a process of the server's own, which this is not."""
    try:
        return call(library, client, headers)
    except InferenceServerException as error:
        assert "does not support dynamic logging" in error.message()
        return None
