"""Every call of every door: who gets in, who does not, and that none is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiorch_proto.admin.v1.service import METHODS as ADMIN_METHODS
from aiorch_proto.tfserving import serving_pb2
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import METHODS, PACKAGE_SERVICE_NAME, SERVICE_NAME
from running_site import encode_values
from secured import DOORS, KEYS, Secured, serve_secured

from aiorch_server.frontends.rest.openapi_operations import OPERATIONS
from aiorch_server.security import TABLE, Role, Scope

PREDICTION, MODELS = "/tensorflow.serving.PredictionService", "/tensorflow.serving.ModelService"
LADDER = ("viewer", "client", "deployer", "admin")
INFER_BODY = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]}
#: Messages with which a call gets as far as looking its model up; others are empty.
NAMED = {
    **dict.fromkeys(("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"), "name"),
    **dict.fromkeys(("RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting"), "model_name"),
}


def make_message(path: str, model: str) -> bytes:
    service, _, name = path[1:].partition("/")
    if name in ("ModelInfer", "ModelStreamInfer"):
        return encode_values([1.0, 2.0], model)
    if service in (SERVICE_NAME, PACKAGE_SERVICE_NAME):
        fields = {NAMED[name]: model} if name in NAMED else {}
        return bytes(METHODS[name].request(**fields).SerializeToString())
    spec: Any = {"name": model}
    if name == "MultiInference":
        task = {"model_spec": spec, "method_name": "tensorflow/serving/regress"}
        return bytes(serving_pb2.MultiInferenceRequest(tasks=[task]).SerializeToString())
    if name == "GetModelMetadata":
        fields = {"model_spec": spec, "metadata_field": ["signature_def"]}
        return bytes(serving_pb2.GetModelMetadataRequest(**fields).SerializeToString())
    if path.startswith((PREDICTION, MODELS)) and name != "HandleReloadConfigRequest":
        return bytes(serving_pb2.GetModelStatusRequest(model_spec=spec).SerializeToString())
    return b""


def list_rpcs() -> list[str]:
    """The gRPC calls of a server without a registry."""
    return [call for call in TABLE if call.startswith("/") and "aiorch.admin" not in call]


def list_routes() -> Iterator[tuple[str, str]]:
    for call in TABLE:
        method, _, template = call.partition(" ")
        if template and template != "/metrics":
            yield call, method


def fill(template: str, model: str) -> str:
    values = {"{model}": model, "{version}": "1", "{label}": "stable", "{region}": "r", "{repository}": "main"}
    for name, value in values.items():
        template = template.replace(name, value)
    return template


async def ask_route(site: Secured, call: str, caller: str | None, model: str) -> tuple[int, str]:
    method, _, template = call.partition(" ")
    body: Any = INFER_BODY if template.endswith("infer") else {"instances": [[1.0]]} if ":" in template else {}
    if template.endswith((":classify", ":regress")):
        body = {"examples": [{"INPUT0": [1.0]}]}
    if "generate" in template:
        body = {"INPUT0": [1.0]}
    answer = await site.ask(method, fill(template, model), caller, json=body if method == "POST" else None)
    return answer.status_code, answer.text


def test_every_call_has_a_row() -> None:
    """In the published files and in the description of REST; and no row is for nothing."""
    rpcs = {f"/{service}/{name}" for service in (SERVICE_NAME, PACKAGE_SERVICE_NAME) for name in METHODS}
    rpcs |= set(ADMIN_METHODS)
    routes = {f"{each.method} {path}" for each in OPERATIONS for path in each.paths}
    missing = (rpcs | routes) - set(TABLE)
    assert not missing, f"calls without a row in permissions.TABLE: {sorted(missing)}"
    known = {call for call in TABLE if not call.startswith(("/grpc.", "/tensorflow."))}
    assert known == rpcs | routes, f"rows without a call: {sorted(known - rpcs - routes)}"


@pytest.mark.parametrize("door", DOORS)
async def test_what_is_registered_has_a_row(models: Path, door: str) -> None:
    async with serve_secured(models, door) as site:
        if door != "grpcio":
            registered = set(site.application._grpc._registered)
            assert registered == set(list_rpcs())
        control = await site.application._rest._open_control()
        for route in control.routes:
            template = route.path.replace("{version:version}", "{version}")
            for method in route.methods - {"HEAD"}:
                assert f"{method} {template}" in TABLE


@pytest.mark.parametrize("door", DOORS)
async def test_nobody_gets_in_without_credentials(models: Path, door: str) -> None:
    other = f"aio_{KEYS['root'].id}_{'A' * 43}"
    async with serve_secured(models, door) as site:
        for path in list_rpcs():
            is_open = TABLE[path].scope is Scope.OPEN
            for caller in (None, other, "gibberish"):
                answer = await site.call(path, make_message(path, "own-one"), caller)
                assert (answer.code == "OK") == is_open, f"{path} answers {answer}"
                if not is_open:
                    assert answer.code == "UNAUTHENTICATED" and not answer.data, f"{path} answers {answer}"
                    assert caller is None or caller not in answer.text
        told = await site.call(f"/{SERVICE_NAME}/ServerMetadata")
        assert told.text == "this call needs credentials: an API key"
        assert (await site.call("/some.Service/Method")).code == "UNAUTHENTICATED"
        assert (await site.call("/some.Service/Method", caller="nothing")).code == "UNIMPLEMENTED"


async def test_nobody_gets_in_over_rest_without_credentials(models: Path) -> None:
    async with serve_secured(models) as site:
        for call, method in list_routes():
            answer = await site.ask(method, fill(call.partition(" ")[2], "own-one"))
            if TABLE[call].scope is Scope.OPEN:
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, f"{call} answers {answer.text}"
            assert answer.headers["www-authenticate"] == 'Bearer realm="aiorchestrator"'
            wrong = await site.ask(method, fill(call.partition(" ")[2], "own-one"), "gibberish")
            assert wrong.status_code == 401 and "gibberish" not in wrong.text
            assert wrong.headers["www-authenticate"].endswith('error="invalid_token"')
        for path in ("/", "/v2/nothing", "/v2/models/own-one/secret", "/v1/other", "/v2//models", "/V2"):
            assert (await site.ask("GET", path)).status_code == 401
            assert (await site.ask("GET", path, "nothing")).status_code == 404
        deleted = await site.ask("DELETE", "/v2/models/own-one", "root")
        assert (deleted.status_code, deleted.headers["allow"]) == (405, "GET")


def is_role_enough(call: str, role: str) -> bool:
    permission = TABLE[call]
    if permission.scope in (Scope.OPEN, Scope.KNOWN):
        return True
    if permission.scope is Scope.SERVER:
        return False  # none of these callers has a role on all models
    assert permission.role is not None
    return Role[role.upper()] >= permission.role


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("role", LADDER)
async def test_a_role_opens_what_the_table_says(models: Path, door: str, role: str) -> None:
    async with serve_secured(models, door) as site:
        for path in list_rpcs():
            answer = await site.call(path, make_message(path, "own-one"), role)
            refused = answer.code in ("PERMISSION_DENIED", "UNAUTHENTICATED")
            if "denied" not in answer.text and path.endswith("/ModelStreamInfer"):
                refused = b"needs the role" in answer.data  # the stream itself stays open
            assert refused != is_role_enough(path, role), f"{path} answers {answer}"
            assert answer.code != "INTERNAL", f"{path} answers {answer}"


@pytest.mark.parametrize("role", LADDER)
async def test_a_role_opens_what_the_table_says_over_rest(models: Path, role: str) -> None:
    async with serve_secured(models) as site:
        for call, _ in list_routes():
            status, text = await ask_route(site, call, role, "own-one")
            assert (status == 403) != is_role_enough(call, role), f"{call} answers {status} {text}"
            assert status < 500 or status in (501, 503), f"{call} answers {status} {text}"


@pytest.mark.parametrize("door", DOORS)
async def test_who_holds_all_may_do_all(models: Path, door: str) -> None:
    async with serve_secured(models, door) as site:
        for path in list_rpcs():
            answer = await site.call(path, make_message(path, "own-one"), "root")
            assert answer.code not in ("PERMISSION_DENIED", "UNAUTHENTICATED", "INTERNAL"), f"{path}: {answer}"


async def test_settings_are_read_by_some_and_changed_by_others(models: Path) -> None:
    """Of a model whoever sees it may read what is traced; of all and of the log, who sees all."""
    change = pb.TraceSettingRequest(settings={"trace_rate": {"value": ["7"]}}).SerializeToString()
    change_one = pb.TraceSettingRequest(
        settings={"trace_rate": {"value": ["7"]}}, model_name="own-one"
    ).SerializeToString()
    read_one = pb.TraceSettingRequest(model_name="own-one").SerializeToString()
    path = f"/{SERVICE_NAME}/TraceSetting"
    async with serve_secured(models, trace={"endpoint": "http://127.0.0.1:9"}) as site:
        assert (await site.call(path, read_one, "viewer")).code == "OK"
        for caller, message in (("viewer", change_one), ("deployer", change_one), ("admin", b""), ("admin", change)):
            assert (await site.call(path, message, caller)).code == "PERMISSION_DENIED", caller
        assert (await site.call(path, change_one, "admin")).code == "OK"
        assert (await site.call(path, change, "root")).code == "OK"
        url = "/v2/models/own-one/trace/setting"
        assert (await site.ask("GET", url, "viewer")).status_code == 200
        assert (await site.ask("POST", url, "deployer", json={"trace_rate": "5"})).status_code == 403
        assert (await site.ask("POST", url, "admin", json={"trace_rate": "5"})).status_code == 200
        assert (await site.ask("GET", "/v2/trace/setting", "admin")).status_code == 403
        assert (await site.ask("POST", "/v2/trace/setting", "root", json={"trace_rate": "5"})).status_code == 200


async def test_metrics_are_for_who_sees_all(models: Path) -> None:
    async with serve_secured(models) as site:
        url = f"http://127.0.0.1:{site.application.metrics_port}/metrics"
        assert (await site.ask("GET", url)).status_code == 401
        assert (await site.ask("GET", url, "admin")).status_code == 403
        scraped = await site.ask("GET", url, "root")
        assert scraped.status_code == 200 and "nv_inference_count" in scraped.text


async def test_several_credentials_are_none(models: Path) -> None:
    """Who is in front of the server may have gone by another one."""
    async with serve_secured(models) as site:
        twice = [("authorization", f"Bearer {KEYS['root'].text}")] * 2
        answer = await site.call(f"/{SERVICE_NAME}/ServerMetadata", metadata=twice)
        assert (answer.code, answer.text) == (
            "UNAUTHENTICATED",
            "the call has several authorization headers; expected one",
        )
        headers = [("Authorization", f"Bearer {KEYS[name].text}") for name in ("nothing", "root")]
        assert (await site.http.get("/v2", headers=headers)).status_code == 401


async def test_a_request_inherits_nothing_from_the_one_before(models: Path) -> None:
    """On one connection of HTTP each is judged by what it shows itself."""
    async with serve_secured(models, http={}) as site:
        for _ in range(20):
            assert (await site.ask("GET", "/v2/models/own-one", "root")).status_code == 200
            assert (await site.ask("GET", "/v2/models/own-one")).status_code == 401
            assert (await site.ask("GET", "/v2/models/other-one", "client")).status_code == 400
