"""The OpenAPI document: valid, nothing missing, nothing invented, and its examples work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from openapi_spec_validator.validation.exceptions import OpenAPIValidationError
from served import Served, serve

from aiorch_server.frontends.rest.openapi import build_openapi
from aiorch_server.frontends.rest.openapi_operations import EXAMPLE_MODEL
from aiorch_server.frontends.rest.server import _INFER_PATH
from aiorch_server.frontends.tfserving import rest as tfserving

CONFIG = 'backend: "python" parameters { key: "version_label.stable" value { string_value: "1" } }'
HALF_PLUS_TWO = """
class Model:
    inputs = [("x", "FP32", [1])]
    outputs = [("y", "FP32", [1])]
    max_batch_size = 16

    def execute(self, inputs):
        return {"y": inputs["x"] * 0.5 + 2}
"""
DOCUMENT = build_openapi()
METHODS = ("get", "post")
OPERATIONS = [(path, method) for path, item in DOCUMENT["paths"].items() for method in METHODS if method in item]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = tmp_path_factory.mktemp("models")
    (models / EXAMPLE_MODEL / "1").mkdir(parents=True)
    (models / EXAMPLE_MODEL / "1" / "model.py").write_text(HALF_PLUS_TWO)
    (models / EXAMPLE_MODEL / "config.pbtxt").write_text(CONFIG)
    options = ("--model-control-mode", "explicit", "--load-model", "*", "--shared-memory", "/aiorch_example")
    with serve(models, *options) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{server.http}", timeout=60) as client:
        yield client


def follow(node: Any) -> Any:
    """``node``, or what it refers to."""
    while isinstance(node, dict) and "$ref" in node:
        target: Any = DOCUMENT
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = target
    return node


def check(document: object, schema: dict[str, Any]) -> None:
    Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(document)


def fill(path: str) -> str:
    values = {name: each["example"] for name, each in DOCUMENT["components"]["parameters"].items()}
    return re.sub(r"{(\w+)}", lambda matched: values[matched[1]], path)


def list_bodies() -> list[dict[str, Any]]:
    operations = [DOCUMENT["paths"][path][method] for path, method in OPERATIONS]
    answers = [follow(answer) for operation in operations for answer in operation["responses"].values()]
    asked = [operation["requestBody"] for operation in operations if "requestBody" in operation]
    return [media for each in answers + asked for media in each.get("content", {}).values()]


def test_the_document_is_valid() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()
    for schema in DOCUMENT["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    for body in list_bodies():
        if "example" in body:
            check(body["example"], body["schema"])


def test_the_validator_sees_faults() -> None:
    broken = build_openapi()
    broken["paths"]["/v2/models/{model}"]["get"]["responses"]["200"] = {"$ref": "#/components/responses/none"}
    del broken["info"]["title"]
    with pytest.raises(OpenAPIValidationError):
        OpenAPIV31SpecValidator(broken).validate()


def test_every_schema_is_used() -> None:
    text = json.dumps(DOCUMENT)
    for kind in ("schemas", "parameters", "responses"):
        for name in DOCUMENT["components"][kind]:
            assert f'"#/components/{kind}/{name}"' in text, (kind, name)


async def test_paths_are_those_of_the_routers(door: Any) -> None:
    documented: dict[str, set[str]] = {}
    for path, method in OPERATIONS:
        if path.startswith("/v2") or path == "/openapi.json":
            documented.setdefault(path, set()).add(method.upper())
    inference = {path for path in documented if _INFER_PATH.fullmatch(fill(path))}
    verbs = ("infer", "generate", "generate_stream")
    assert inference == {f"/v2/models/{{model}}{v}/{verb}" for v in ("", "/versions/{version}") for verb in verbs}
    assert set(door.server._inference) == set(verbs)
    served: dict[str, set[str]] = {}
    await door.http.get("/v2/health/live")  # the first request that is not inference makes the routes
    for route in door.server._control.routes:
        served.setdefault(route.path.replace(":version}", "}"), set()).update(route.methods - {"HEAD"})
    assert {path: methods for path, methods in documented.items() if path not in inference} == served


def test_paths_of_tensorflow_serving_are_those_of_its_patterns() -> None:
    """Alternatives of the patterns, counted: three targets for each verb, status and metadata."""
    paths = {path: method for path, method in OPERATIONS if path.startswith("/v1")}
    verbs = re.search(r":\((\w+(?:\|\w+)*)\)$", tfserving._CALL.pattern)
    assert verbs is not None
    targets = [f"/v1/models/{{model}}{which}" for which in ("", "/versions/{version}", "/labels/{label}")]
    expected = {f"{target}:{verb}": "post" for target in targets for verb in verbs[1].split("|")}
    expected |= {f"{target}{what}": "get" for target in targets for what in ("", "/metadata")}
    assert paths == expected
    for path, method in paths.items():
        pattern = tfserving._CALL if method == "post" else tfserving._QUESTION
        assert pattern.fullmatch(fill(path)), path


def test_the_server_shows_it(client: httpx.Client) -> None:
    answer = client.get("/openapi.json")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert answer.json() == json.loads(json.dumps(DOCUMENT))
    head = client.head("/openapi.json")
    assert head.status_code == 200 and not head.content and head.headers["content-length"] == str(len(answer.content))


@pytest.mark.proves("GRPCInferenceService/*", "REST/*", "PredictionService/*", "ModelService/*", by="HTTP")
def test_every_operation_answers_as_documented(server: Served, client: httpx.Client) -> None:
    region = SharedMemory("aiorch_example", create=True, size=64)
    try:
        for path, method in OPERATIONS:
            url = fill(path)
            if "servers" in DOCUMENT["paths"][path]:
                url = f"http://{server.metrics}{url}"
            run_example(client, url, method, DOCUMENT["paths"][path][method])
    finally:
        region.close()
        region.unlink()


def run_example(client: httpx.Client, url: str, method: str, operation: dict[str, Any]) -> None:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    answer = client.request(method, url, json=body.get("example", {} if body else None))
    where = f"{method} {url}: {answer.status_code} {answer.text[:200]}"
    responses = operation["responses"]
    assert str(answer.status_code) in responses, where
    if "example" in body or (not body and "200" in responses and "cuda" not in url):
        assert answer.status_code == 200, where
    content = follow(responses[str(answer.status_code)]).get("content")
    if not content:
        assert not answer.content, where
        return
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in content, where
    if kind == "application/json":
        check(answer.json(), content[kind]["schema"])
    if "example" in content[kind]:
        assert answer.json() == content[kind]["example"], where


@pytest.mark.parametrize("path", [path for path in DOCUMENT["paths"] if path.startswith(("/v2", "/openapi"))])
def test_other_methods_are_refused_and_the_right_ones_named(client: httpx.Client, path: str) -> None:
    known = {method.upper() for method in METHODS if method in DOCUMENT["paths"][path]}
    for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"} - known:
        answer = client.request(method, fill(path))
        assert answer.status_code == 405 and answer.json() == {"error": "Method Not Allowed"}, (method, answer.text)
        assert set(answer.headers["allow"].split(", ")) - {"HEAD"} == known
    assert client.head(fill(path)).content == b""


WRITTEN = [path for path, method in OPERATIONS if "requestBody" in DOCUMENT["paths"][path][method]]


@pytest.mark.parametrize("path", WRITTEN)
async def test_limits_are_the_same_everywhere(door: Any, path: str) -> None:
    """More than the body may have, codings that nobody knows, JSON that is none; then the connection still serves."""
    url = fill(path).replace(EXAMPLE_MODEL, "echo")
    if path.startswith("/v2/cuda") or "{repository}" in path:
        return
    large = await door.http.post(url, content=b" " * ((1 << 20) + 1))
    assert large.status_code == 413 and large.json().keys() == {"error"}
    packed = await door.http.post(url, content=b"{}", headers={"content-encoding": "br"})
    assert packed.status_code == 501 and packed.headers["accept-encoding"] == "gzip, deflate"
    broken = await door.http.post(url, content=b"{", headers={"content-type": "text/plain"})
    assert broken.status_code == 400 and "not valid JSON" in broken.json()["error"]
    assert (await door.http.get("/v2/health/live")).status_code == 200
