"""Calls that need a header over REST, and every way round it that anybody has thought of."""

from __future__ import annotations

import http.client
import itertools
import json

import pytest
import tritonclient.http as http_client
from running_site import TIMEOUT_S, Site
from tritonclient.utils import InferenceServerException

from aiorch_server.config.restriction import Group

from .conftest import (
    BODY,
    CALLS,
    OPERATIONS,
    PREFIX,
    ROWS,
    Pairs,
    fetch,
    let_in,
    secret_of,
)

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
