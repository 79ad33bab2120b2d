"""Calls that need a header, at every door; and every way round it that anybody has thought of."""

from __future__ import annotations

import http.client
import itertools
import json
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from running_site import TIMEOUT_S, Site, encode_values, write_models
from served import serve
from tritonclient.utils import InferenceServerException

from aiorch_server.config.restriction import Group
from aiorch_server.frontends.grpc import FAST_PATH
from aiorch_server.frontends.grpc.restricted import GROUPS
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


# ------------------------------------------------------------------------------------------------------------- gRPC


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


def list_wrong(group: str) -> list[Pairs]:
    name, right = PREFIX + group, secret_of(group)
    others = tuple(pair for pair in ALL if pair[0] != name)
    return [
        others,
        (*others, (name, "wrong")),
        (*others, (name, "")),
        (*others, (name, right.upper())),
        (*others, (name, right[:-2])),
        (*others, (name, right + "1")),
        (*others, (name, right), (name, "wrong")),
        (*others, (name, "wrong"), (name, right)),
        (*others, (name, right), (name, "")),
        (*others, (f"key-{group}", right)),
        (*others, (f"{name}x", right)),
    ]


@pytest.mark.parametrize("path", GROUPS)
def test_every_method_needs_its_headers(site: Site, path: str) -> None:
    with grpc.insecure_channel(site.target) as channel:
        for group in GROUPS[path]:
            for metadata in list_wrong(group):
                assert ask(channel, path, metadata) == refusal_of(group), metadata
        groups = set(GROUPS[path])
        right = tuple(pair for pair in ALL if pair[0].removeprefix(PREFIX) in groups)
        for metadata in (right, right * 2):
            assert "restricted" not in ask(channel, path, metadata)[1]
        assert ask(channel, path) == refusal_of(GROUPS[path][0])


def test_every_method_that_is_served_has_its_group(site: Site) -> None:
    served: set[str] = set(getattr(site.application._grpc, "_registered", GROUPS))
    assert served == set(GROUPS)
    assert {group for groups in GROUPS.values() for group in groups} == set(Group)


@pytest.mark.parametrize(
    "path",
    [
        *("/inference.GRPCInferenceService/ModelInfer/", "/inference.GRPCInferenceService/modelinfer"),
        *("//inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelInfer?x=1"),
        *("/inference.GRPCInferenceService/Model%49nfer", "/GRPCInferenceService/ModelInfer", "/nobody.Nothing/Call"),
    ],
)
def test_other_ways_to_write_a_method_lead_nowhere(site: Site, path: str) -> None:
    with grpc.insecure_channel(site.target) as channel:
        assert ask(channel, path, message=encode_values([1.0]))[0] == "UNIMPLEMENTED"


@pytest.mark.parametrize("message", [encode_values([1.0]), encode_values([1.0], "nobody"), b"\xff", bytes(1 << 20)])
def test_a_refusal_says_nothing_about_models(site: Site, message: bytes) -> None:
    with grpc.insecure_channel(site.target) as channel:
        for name in ("ModelInfer", "ModelStreamInfer"):
            answer = ask(channel, f"/inference.GRPCInferenceService/{name}", message=message)
            assert answer == refusal_of("inference")


def test_the_message_is_not_waited_for(site: Site) -> None:
    silent: queue.Queue[bytes | None] = queue.Queue()
    with grpc.insecure_channel(site.target) as channel:
        for path in (FAST_PATH, "/grpc.health.v1.Health/Check"):
            call = channel.stream_stream(path)(iter(silent.get, None), timeout=TIMEOUT_S)
            with pytest.raises(grpc.RpcError):
                next(call)
            assert (call.code().name, call.details()) == refusal_of(GROUPS[path][0])
            silent.put(None)


def test_packed_messages_are_not_unpacked_first(site: Site) -> None:
    with grpc.insecure_channel(site.target, compression=grpc.Compression.Gzip) as channel:
        assert ask(channel, FAST_PATH, message=encode_values([1.0] * 1000)) == refusal_of("inference")


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


@pytest.mark.parametrize("group", Group)
def test_tritonclient_over_grpc(site: Site, group: Group) -> None:
    with grpc_client.InferenceServerClient(site.target) as client:
        for call in (call for own, call in CALLS if own == group):
            for headers in ({}, {PREFIX + group: "wrong"}):
                with pytest.raises(InferenceServerException) as caught:
                    call(grpc_client, client, headers)
                assert (caught.value.status(), caught.value.message()) == (
                    "StatusCode.UNAVAILABLE",
                    refusal_of(group)[1],
                )
            assert let_in(call, grpc_client, client, {PREFIX + group: secret_of(group)}) is not False


@pytest.mark.parametrize("group", Group)
def test_tritonclient_over_http(rest: Site, group: Group) -> None:
    with http_client.InferenceServerClient(rest.http) as client:
        for call in (call for own, call in CALLS if own == group):
            for headers in ({}, {f"key-{group}": "wrong"}):
                if group == "health":
                    assert call(http_client, client, headers) is False
                    continue
                with pytest.raises(InferenceServerException) as caught:
                    call(http_client, client, headers)
                text = f"This API is restricted, expecting header 'Key-{group}'"
                assert (caught.value.status(), caught.value.message()) == ("403", text)
            assert let_in(call, http_client, client, {f"KEY-{group}": secret_of(group)}) is not False


def test_a_stream_is_refused_as_a_whole(site: Site) -> None:
    for headers in ({}, {PREFIX + "inference": "wrong"}):
        with grpc_client.InferenceServerClient(site.target) as client:
            assert stream_once(client, headers) == refusal_of("inference")[1]
    with grpc_client.InferenceServerClient(site.target) as client:
        assert stream_once(client, {PREFIX + "inference": secret_of("inference")}) is None


def stream_once(client: Any, headers: dict[str, str]) -> str | None:
    """The first error of a stream, None when its request was answered."""
    told: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: told.put(error), headers=headers)
    try:
        client.async_stream_infer("identity", fill(grpc_client))
        error = told.get(timeout=TIMEOUT_S)
    except InferenceServerException:  # the stream was over before
        error = told.get(timeout=TIMEOUT_S)
    finally:
        client.stop_stream()
    return None if error is None else str(error.message())


@pytest.mark.parametrize("door", DOORS)
def test_what_is_not_restricted_is_as_before(open_site: Callable[..., Site], door: str) -> None:
    """Two groups with one header: the others go on, ModelInfer on the compiled path."""
    site = open_site(door, ("logging,model-repository:admin=a:b=c",))
    with grpc.insecure_channel(site.target) as channel:
        header = (("triton-grpc-protocol-admin", "a:b=c"),)
        for path, groups in GROUPS.items():
            is_restricted = bool({Group.LOGGING, Group.MODEL_REPOSITORY} & set(groups))
            assert ("restricted" in ask(channel, path)[1]) is is_restricted, path
            assert "restricted" not in ask(channel, path, header)[1]
        assert ask(channel, FAST_PATH, message=encode_values([1.0])) == ("OK", "")
    if door != "grpcio":
        assert site.application._grpc._fast_path == FAST_PATH


@pytest.mark.parametrize("door", ["threads", "loop"])
def test_the_compiled_path_ends_where_inference_is_restricted(open_site: Callable[..., Site], door: str) -> None:
    site = open_site(door, ("inference:k=v",))
    assert site.application._grpc._fast_path == ""
    with grpc.insecure_channel(site.target) as channel:
        path, message = FAST_PATH, encode_values([1.0])
        assert ask(channel, path, message=message)[0] == "UNAVAILABLE"
        assert ask(channel, path, (("triton-grpc-protocol-k", "v"),), message) == ("OK", "")
        assert ask(channel, path, message=message)[0] == "UNAVAILABLE"


# ------------------------------------------------------------------------------------------------------------- REST


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


#: The groups of each operation of the document, by what ends its path or else by its beginning.
TAILS = {
    **dict.fromkeys((":predict", ":classify", ":regress", "/infer", "/generate", "/generate_stream"), ("inference",)),
    "/ready": ("health",),
    "/live": ("health",),
    "/config": ("model-config",),
    "/stats": ("statistics",),
    "/trace/setting": ("trace",),
    "/v2/logging": ("logging",),
    "/metadata": ("metadata",),
    "/openapi.json": ("metadata",),
}
BEGINNINGS = {
    "/v2/repository": ("model-repository",),
    "/v2/systemsharedmemory": ("shared-memory",),
    "/v2/cudasharedmemory": ("shared-memory",),
    "/v1": ("health", "metadata"),
    "/v2": ("metadata",),
}


def groups_of(path: str) -> tuple[str, ...]:
    for tail, groups in TAILS.items():
        if path.endswith(tail):
            return groups
    return next(groups for beginning, groups in BEGINNINGS.items() if path.startswith(beginning))


OPERATIONS = [
    (method.upper(), path.format(model="identity", version="1", label="stable", region="r", repository="main"))
    for path, item in build_openapi()["paths"].items()
    if path != "/metrics"
    for method in ("get", "post")
    if method in item
]


def refused(group: str) -> tuple[int, bytes]:
    return 403, json.dumps({"error": f"This API is restricted, expecting header 'Key-{group}'"}).replace(
        '": "', '":"'
    ).encode()


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_route_needs_its_headers(rest: Site, method: str, path: str) -> None:
    right = {group: (f"key-{group}", secret_of(group)) for group in Group}
    for group in groups_of(path):
        name, secret = right[group]
        others = tuple(right[each] for each in Group if each != group)
        for wrong in (
            *((), ((name, "wrong"),), ((name, ""),), ((name, secret.upper()),), ((name, secret), (name, "wrong"))),
            *((("Key", secret),), ((f"{PREFIX}{group}", secret),), ((name, secret[:-2]),), ((name, f'"{secret}"'),)),
        ):
            assert fetch(rest, method, path, (*others, *wrong)) == refused(group), wrong
    own = tuple(right[group] for group in groups_of(path))
    assert b"restricted" not in fetch(rest, method, path, own)[1]
    assert fetch(rest, method, path, tuple((name.upper(), value) for name, value in own))[0] != 403
    if method == "GET":
        is_v1 = path.startswith("/v1")  # it knows no HEAD
        assert fetch(rest, "HEAD", path) == (400 if is_v1 else 403, b"")


BODY = json.dumps({"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}).encode()
ROWS = json.dumps({"instances": [[1.0]]}).encode()
POSTS = r"""
    /v2/models/identity/infer/            //v2/models/identity/infer         /v2//models/identity/infer
    /v2/models/identity/infer?x=1         /v2/models/identity/infer;x        /v2/models/identity/infer#x
    /v2/models/%69dentity/infer           /v2/models/identity/%69nfer        /v2%2fmodels%2fidentity%2finfer
    /v2/models/identity/versions/1/infer  /v2/./models/identity/infer        /x/../v2/models/identity/infer
    /V2/MODELS/identity/INFER             /v2/models/identity\infer          /v2/models/identity/infer%00
    /v2/models/identity/infer%20          /v2/models/identity/infer%0a       /v2/models/identity%2finfer
    http://localhost/v2/models/identity/infer  /v2/models/identity/generate  *
    /v1/models/identity:predict           /V1/Models/identity:PREDICT        /v1/models/%69dentity:predict
    /v1/models/identity%3apredict         /v1/models/identity:predict/       /v1%2fmodels/identity:predict
    /v1/models/identity/versions/1:predict
"""
GETS = """
    /v2/                                  /v2/models/identity/               /v2/models/identity/config/
    /v2/models/%69dentity/config          /v2/models/identity/versions/1     /v2/models/identity/versions/01/config
    /v2/models/stats?x                    /v2/health/ready?x                 /v1/models/identity
    /V1/MODELS/identity/METADATA          /v1/models/identity/versions/1/metadata
    /openapi.json?x                       /OPENAPI.JSON                      /openapi.json/
    /docs                                 /redoc                             /metrics
"""
#: Other ways to write what is restricted, and what is near: none may be answered, or tell of the model.
WAYS = [
    *(("POST", path) for path in POSTS.split()),
    *(("GET", path) for path in GETS.split()),
    *((method, "/v2/models/identity/infer") for method in ("GET", "PUT", "PATCH", "OPTIONS", "HEAD", "post", "QUERY")),
    *((method, "/v2/models/identity/config") for method in ("POST", "PUT", "OPTIONS", "TRACE", "get")),
]


@pytest.mark.parametrize(("method", "path"), WAYS)
def test_no_other_way_leads_round_it(rest: Site, method: str, path: str) -> None:
    for own in ("identity", "nobodys"):
        way = path.replace("identity", own)
        status, answer = fetch(rest, method, way, body=body_of(path))
        assert status in (400, 403, 404, 405, 501), answer
        assert b"INPUT0" not in answer and b"OUTPUT0" not in answer and b"found" not in answer, answer


def body_of(path: str) -> bytes:
    return ROWS if "predict" in path.lower() else b'{"INPUT0": [1.0]}' if path.endswith("generate") else BODY


def test_the_ways_that_lead_somewhere_are_among_them(rest: Site) -> None:
    """With all headers: what is refused above is not refused for being written wrong."""
    right = tuple((f"key-{group}", secret_of(group)) for group in Group)
    answered = {path for method, path in WAYS if fetch(rest, method, path, right, body_of(path))[0] == 200}
    assert answered >= {
        *("/v2/models/identity/infer?x=1", "/v2/models/%69dentity/infer", "/v2%2fmodels%2fidentity%2finfer"),
        *("/v2/models/identity%2finfer", "/v2/models/identity/generate", "/v2/models/identity/versions/1/infer"),
        *("/V1/Models/identity:PREDICT", "/v1/models/%69dentity:predict", "/v1/models/identity/versions/1:predict"),
        *("/v2/models/%69dentity/config", "/v2/models/stats?x", "/v2/health/ready?x", "/V1/MODELS/identity/METADATA"),
        *("/openapi.json?x", "/v1/models/identity"),
    }, answered


@pytest.mark.parametrize(
    "headers",
    [
        (("Content-Type", "application/octet-stream"), ("Inference-Header-Content-Length", str(len(BODY)))),
        (("Content-Encoding", "gzip"),),
        (("Content-Encoding", "br"),),
        (("X-HTTP-Method-Override", "POST"),),
        (("X-Original-URL", "/v2/health/live"), ("X-Rewrite-URL", "/v2/health/live")),
        (("X-Forwarded-For", "127.0.0.1"), ("Forwarded", "for=127.0.0.1")),
        (("Expect", "100-continue"),),
        (("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABkAAQAAP__")),
        (("Key_inference", secret_of("inference")),),
    ],
)
def test_no_header_leads_round_it(rest: Site, headers: Pairs) -> None:
    assert fetch(rest, "POST", "/v2/models/identity/infer", headers, BODY) == refused("inference")


def test_the_body_is_not_waited_for(rest: Site) -> None:
    """And the connection is of use to who comes next on it, or closed."""
    address, port = rest.http.rsplit(":", 1)
    connection = http.client.HTTPConnection(address, int(port), timeout=TIMEOUT_S)
    connection.putrequest("POST", "/v2/models/identity/infer")
    connection.putheader("Content-Length", "1000000")
    connection.endheaders(b"{")
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == refused("inference")
    connection.close()


def test_refusals_on_one_connection(rest: Site) -> None:
    """Who was let in once is not let in again without the header."""
    address, port = rest.http.rsplit(":", 1)
    connection = http.client.HTTPConnection(address, int(port), timeout=TIMEOUT_S)
    right = {"Key-inference": secret_of("inference")}
    for headers, expected in itertools.islice(itertools.cycle([(right, 200), ({}, 403)]), 6):
        connection.request("POST", "/v2/models/identity/infer", BODY, headers)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == expected
    connection.close()


# ---------------------------------------------------------------------------------------------------------- secrecy

HIDDEN = ("Xyzzy-1-grpc", "Xyzzy-2-http", "Xyzzy-3-sent")


def test_the_value_is_in_no_log(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value comes on the command line, one in the environment, one is sent by a client that has it wrong."""
    monkeypatch.setenv("AIORCH_HTTP_RESTRICTED_API", f"health,metadata:k1={HIDDEN[1]}\ninference:k2={HIDDEN[1]}")
    rule = f"inference,metadata,health,logging:k={HIDDEN[0]}"
    options = ("--log-verbose", "1", "--log-slow-us", "1", "--grpc-restricted-protocol", rule)
    with serve(models, *options) as running:
        site: Any = running
        with grpc.insecure_channel(running.grpc) as channel:
            for path in GROUPS:
                for value in (HIDDEN[0], HIDDEN[2]):
                    ask(channel, path, (("triton-grpc-protocol-k", value), ("aiorch-timing", "1")), b"\xff")
            message = encode_values([1.0])
            assert ask(channel, FAST_PATH, (("triton-grpc-protocol-k", HIDDEN[0]),), message) == ("OK", "")
            assert ask(channel, FAST_PATH, message=message)[0] == "UNAVAILABLE"
        for name, value in itertools.product(("k1", "k2"), HIDDEN[1:]):
            for method, path in OPERATIONS:
                assert b"Xyzzy" not in fetch(site, method, path, ((name, value),), BODY)[1]
        assert fetch(site, "POST", "/v2/models/identity/infer", (("k2", HIDDEN[1]),), BODY)[0] == 200
        assert fetch(site, "POST", "/v2/models/identity/infer", (("k1", HIDDEN[1]),), BODY)[0] == 403
        assert running.end() == 0
        written = running.log.read_text() + json.dumps(running.ready)
        assert "slow" in written or "debug" in written.lower()
        assert "Xyzzy" not in written and "Traceback" not in written
