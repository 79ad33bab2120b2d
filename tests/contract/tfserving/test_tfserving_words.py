"""What TensorFlow Serving says, by code and text, on both ports; versions, labels and states; time and departure."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from aiorch_proto.tfserving import core_pb2
from aiorch_proto.tfserving import serving_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_lag import measure_lag
from serving_site import TIMEOUT_S, Site, serve_here

pytestmark = pytest.mark.asyncio(loop_scope="module")

MATRIX = {"dim": [{"size": 1}, {"size": 2}]}
A = core_pb2.TensorProto(dtype=core_pb2.DT_FLOAT, tensor_shape=MATRIX, float_val=[1, 2])
B = core_pb2.TensorProto(dtype=core_pb2.DT_STRING, tensor_shape={"dim": [{"size": 1}] * 2}, string_val=[b"text"])
BOTH = {"a": A, "b": B}


def version(number: int) -> dict[str, Any]:
    return {"version": {"value": number}}


@pytest.mark.parametrize(
    ("spec", "served"),
    [
        ({}, 4),
        (version(2), 2),
        ({"version_label": "stable"}, 2),
        ({"version_label": "canary"}, 4),
        ({"signature_name": "serving_default"}, 4),
    ],
)
async def test_versions(site: Site, spec: dict[str, Any], served: int) -> None:
    response = await site.predict("pair", BOTH, **spec)
    assert response.model_spec == pb.ModelSpec(name="pair", signature_name="serving_default", **version(served))
    assert response.outputs["x"] == A
    assert response.outputs["y"] == B
    wanted = pb.GetModelMetadataRequest(model_spec={"name": "pair", **spec}, metadata_field=["signature_def"])
    assert (await site.calls["GetModelMetadata"](wanted)).model_spec == pb.ModelSpec(name="pair", **version(served))
    path = {"version": f"/versions/{served}", "version_label": f"/labels/{spec.get('version_label')}"}
    part = path.get(next(iter(spec), ""), "")
    answer = await site.http.post(f"/v1/models/pair{part}:predict", json={"instances": [{"a": [1, 2], "b": ["t"]}]})
    assert answer.json() == {"predictions": [{"x": [1.0, 2.0], "y": ["t"]}]}


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str], str, str]] = {
    "no name": ({}, BOTH, [], "INVALID_ARGUMENT", "ModelSpec has no name specified."),
    "no model": (
        {"name": "half"}, BOTH, [],
        "NOT_FOUND", "Servable not found for request: Latest(half)",
    ),
    "no version": (
        {"name": "pair", **version(3)}, BOTH, [],
        "NOT_FOUND", "Servable not found for request: Specific(pair, 3)",
    ),
    "version 0": (
        {"name": "pair", **version(0)}, BOTH, [],
        "NOT_FOUND", "Servable not found for request: Specific(pair, 0)",
    ),
    "last version": (
        {"name": "pair", **version(2**63 - 1)}, BOTH, [],
        "NOT_FOUND", f"Servable not found for request: Specific(pair, {2**63 - 1})",
    ),
    "failed model": (
        {"name": "broken"}, BOTH, [],
        "NOT_FOUND", "Servable not found for request: Latest(broken)",
    ),
    "label": (
        {"name": "pair", "version_label": "next"}, BOTH, [],
        "INVALID_ARGUMENT", "Unrecognized servable version label: next",
    ),
    "label of nothing": (
        {"name": "half", "version_label": "stable"}, BOTH, [],
        "INVALID_ARGUMENT", "Unrecognized servable version label: stable",
    ),
    "label of a version that does not serve": (
        {"name": "pair", "version_label": "gone"}, BOTH, [],
        "NOT_FOUND", "Servable not found for request: Specific(pair, 3)",
    ),
    "signature": (
        {"name": "pair", "signature_name": "other"}, BOTH, [],
        "FAILED_PRECONDITION", 'Serving signature key "other" not found.',
    ),
    "missing input": (
        {"name": "pair"}, {"a": A}, [],
        "INVALID_ARGUMENT",
        "input size does not match signature: 1!=2 len({a}) != len({a,b}). Sent extra: {}. Missing but required: {b}.",
    ),
    "other input": (
        {"name": "pair"}, {"a": A, "c": B}, [],
        "INVALID_ARGUMENT",
        "input size does not match signature: 2!=2 len({a,c}) != len({a,b}). Sent extra: {c}. Missing but required: "
        "{b}.",
    ),
    "other output": (
        {"name": "pair"}, BOTH, ["z"],
        "INVALID_ARGUMENT",
        "output tensor alias not found in signature: z Outputs expected to be in the set {x,y}.",
    ),
    "output twice": (
        {"name": "pair"}, BOTH, ["x", "x"],
        "INVALID_ARGUMENT", "duplicate output tensor alias: x",
    ),
    "other type": (
        {"name": "pair"}, {"a": B, "b": B}, [],
        "INVALID_ARGUMENT", "inference input 'a' data-type is 'BYTES', but model 'pair' expects 'FP32'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_refused_predict(site: Site, name: str) -> None:
    spec, inputs, outputs, code, text = REFUSED[name]
    request = pb.PredictRequest(model_spec=spec, inputs=inputs, output_filter=outputs)
    assert await site.refused("Predict", request) == (code, text)


async def test_refused_otherwise(site: Site) -> None:
    missing = ("INVALID_ARGUMENT", "Missing ModelSpec")
    pair = {"name": "pair"}
    for method in ("Predict", "Classify", "Regress", "GetModelMetadata", "GetModelStatus"):
        assert await site.refused(method, b"") == missing
    text = "the 3 bytes of the request are not a valid PredictRequest message"
    assert await site.refused("Predict", b"\xff\xff\xff") == ("INVALID_ARGUMENT", text)
    text = "GetModelMetadataRequest must specify at least one metadata_field"
    assert await site.refused("GetModelMetadata", pb.GetModelMetadataRequest(model_spec=pair)) == (
        "INVALID_ARGUMENT",
        text,
    )
    request = pb.GetModelMetadataRequest(model_spec=pair, metadata_field=["graph"])
    text = "Metadata field graph is not supported"
    assert await site.refused("GetModelMetadata", request) == ("INVALID_ARGUMENT", text)
    example = pb.ClassificationRequest(model_spec={"name": "pair", "signature_name": "other"})
    text = "No signature was found with the name: other"
    assert await site.refused("Classify", example) == ("INVALID_ARGUMENT", text)
    assert await site.refused("Classify", pb.ClassificationRequest(model_spec=pair)) == (
        "INVALID_ARGUMENT",
        "Input is empty.",
    )
    tasks = [{"model_spec": pair, "method_name": "tensorflow/serving/classify"}] * 2
    text = "Duplicate evaluation of signature: serving_default"
    assert await site.refused("MultiInference", pb.MultiInferenceRequest(tasks=tasks)) == ("INVALID_ARGUMENT", text)
    tasks = [{"model_spec": pair, "method_name": "x"}]
    text = "Unsupported signature method_name: x"
    assert await site.refused("MultiInference", pb.MultiInferenceRequest(tasks=tasks)) == ("UNIMPLEMENTED", text)


async def test_status(site: Site) -> None:
    states = pb.ModelVersionStatus

    async def ask(**spec: Any) -> list[tuple[int, int, int]]:
        response = await site.calls["GetModelStatus"](pb.GetModelStatusRequest(model_spec=spec))
        return [(each.version, each.state, each.status.error_code) for each in response.model_version_status]

    assert await ask(name="pair") == [(4, states.AVAILABLE, 0), (2, states.AVAILABLE, 0)]
    assert await ask(name="pair", version_label="stable") == [(2, states.AVAILABLE, 0)]
    assert await ask(name="broken") == [(1, states.END, 2)]
    document = (await site.http.get("/v1/models/broken")).json()
    (shown,) = document["model_version_status"]
    assert (shown["state"], shown["status"]["error_code"]) == ("END", "UNKNOWN")
    assert "execute_delay_us" in shown["status"]["error_message"]
    request = pb.GetModelStatusRequest(model_spec={"name": "half"})
    assert await site.refused("GetModelStatus", request) == ("NOT_FOUND", "Could not find any versions of model half")
    request = pb.GetModelStatusRequest(model_spec={"name": "pair", **version(9)})
    assert await site.refused("GetModelStatus", request) == ("NOT_FOUND", "Could not find version 9 of model pair")


async def test_classes_with_names_and_scores(site: Site) -> None:
    rows = [{"in_classes": ["cat", "dog"], "in_scores": [0.25, 0.75]}, {"in_classes": ["a", "b"], "in_scores": [1, 0]}]
    answer = await site.http.post("/v1/models/classes:classify", json={"examples": rows})
    assert answer.json() == {"results": [[["cat", 0.25], ["dog", 0.75]], [["a", 1.0], ["b", 0.0]]]}


@pytest.mark.parametrize(
    ("example", "text"),
    [
        ({"in_classes": ["a", "b"]}, "Feature in_scores (data type: FP32) is required but could not be found."),
        ({"in_classes": [1, 2], "in_scores": [1, 0]}, "Expected type: BYTES but the feature is int64"),
        ({"in_classes": ["a", "b"], "in_scores": ["1", "0"]}, "Expected type: FP32 but the feature is bytes"),
        ({"in_classes": ["a"], "in_scores": [1, 0]}, "values size: 1 but output shape: [2]"),
        ({"in_classes": [], "in_scores": [1, 0]}, "Feature in_classes (data type: BYTES) is required"),
        ({"in_classes": [None], "in_scores": 1}, "Feature: in_classes has element with unexpected JSON type: Null"),
        (
            {"in_classes": "a", "in_scores": 2**63},
            "Feature: in_scores has uint64_t element. Only int64_t is supported.",
        ),
        ({"in_classes": ["a", 1]}, "Unexpected element type in feature: in_classes expecting type: bytes"),
        ([], "Example must be JSON object but got JSON Array"),
    ],
)
async def test_refused_examples(site: Site, example: Any, text: str) -> None:
    answer = await site.http.post("/v1/models/classes:classify", json={"examples": [example]})
    assert answer.status_code == 400
    assert text in answer.json()["error"]


async def test_no_outputs_for_it(site: Site) -> None:
    request = {"examples": [{"in_classes": ["a", "b"], "in_scores": [1, 0]}]}
    answer = await site.http.post("/v1/models/classes:regress", json=request)
    assert (answer.status_code, "but got [1,2]" in answer.text) == (400, True)
    answer = await site.http.post("/v1/models/BYTES:classify", json=request)
    wanted = 'Expected classification signature outputs to contain at least one of "classes" or "scores"'
    assert answer.json()["error"].startswith(wanted)


ROW = {"a": [1, 2], "b": ["t"]}
JSON_REFUSED: list[tuple[str, Any, int, str]] = [
    ("pair", b"", 400, "JSON Parse error: The document is empty"),
    ("pair", b"{", 400, "the request is not valid JSON"),
    ("pair", b"[]", 400, "the request must be a JSON object"),
    ("pair", b"[" * 100_000, 400, "nested too deeply"),
    ("pair", b'{"inputs": ' + b"9" * 5000 + b"}", 400, "too many digits"),
    ("pair", b'{"inputs": "\xff"}', 400, "is not UTF-8"),
    ("pair", {}, 400, "Missing 'inputs' or 'instances' key"),
    ("pair", {"instances": [ROW], "inputs": ROW}, 400, "expecting only one of 'inputs' or 'instances'"),
    ("pair", {"instances": ROW}, 400, "Expecting 'instances' to be an list/array"),
    ("pair", {"instances": []}, 400, "No values in 'instances' array"),
    ("pair", {"instances": [1]}, 400, "instances is a plain list, but expecting list of objects as multiple"),
    ("pair", {"instances": [ROW, 1]}, 400, "Expecting object but got list at item 1 of input list"),
    ("pair", {"instances": [ROW, {"a": [1, 2]}]}, 400, "Failed to process element: 1 of 'instances' list."),
    ("pair", {"instances": [{"a": [1, 2]}]}, 400, "keys must be equal to: a,b"),
    ("pair", {"instances": [{**ROW, "c": 1}]}, 400, "JSON object: does not have named input: c"),
    (
        "pair",
        {"instances": [ROW, {"a": [1], "b": ["t"]}]},
        400,
        "a: Encountered list at unexpected size: 1 at level: 1",
    ),
    (
        "pair",
        {"instances": [{"a": 1, "b": ["t"]}, ROW]},
        400,
        "a: Encountered list at unexpected level: 1 expected < 1",
    ),
    ("pair", {"instances": [ROW, {"a": 1, "b": ["t"]}]}, 400, "a: JSON Value: 1 found at incorrect level: 2"),
    ("pair", {"inputs": [1]}, 400, "inputs is a plain value/list, but expecting an object as multiple"),
    ("pair", {"inputs": {"a": [[1, 2]]}}, 400, "Missing named input: b in 'inputs' object."),
    ("pair", {"inputs": {"a": [[1, "x"]], "b": [["t"]]}}, 400, "a: element 1 is a string, which is not FP32"),
    ("pair", {"inputs": {"a": [[1, 2]], "b": [[1]]}}, 400, "Type: Number is not of expected type: string"),
    ("pair", {"inputs": {"a": [[1, 2]], "b": [[{"b64": "?"}]]}}, 400, "Unable to base64 decode"),
    ("pair", {"inputs": {"a": [[1, 2]], "b": [[{"x": "?"}]]}}, 400, "not formatted correctly for base64 data"),
    ("pair", {"inputs": {"a": [[1, 2]], "b": [["\ud800"]]}}, 400, "half a surrogate pair"),
    ("pair", {"inputs": ROW, "signature_name": 1}, 400, "'signature_name' key must be a string value."),
    ("pair", {"inputs": ROW, "signature_name": "x"}, 400, 'Serving signature name: "x" not found in signature def'),
    ("half", {"inputs": ROW}, 404, "Servable not found for request: Latest(half)"),
    ("pair/versions/7", {"inputs": ROW}, 404, "Servable not found for request: Specific(pair, 7)"),
    ("pair/versions/" + "7" * 5000, {"inputs": ROW}, 404, "Servable not found for request: Specific(pair, 777"),
    ("pair/labels/next", {"inputs": ROW}, 400, "Unrecognized servable version label: next"),
    ("pair/version/7", {"inputs": ROW}, 400, "Malformed request: POST /v1/models/pair/version/7:predict"),
    ("UINT8", {"inputs": [[256]]}, 400, "element 0 is out of range for UINT8 (0 to 255)"),
    ("FP16", {"inputs": [[1e6]]}, 400, "holds a number that is too large for FP16"),
    ("BYTES", {"inputs": b"x" * (1 << 20)}, 413, "exceeds the maximum allowed size"),
]


@pytest.mark.parametrize("number", range(len(JSON_REFUSED)))
async def test_refused_json(site: Site, number: int) -> None:
    model, document, status, text = JSON_REFUSED[number]
    if isinstance(document, dict) and isinstance(document.get("inputs"), bytes):
        document = json.dumps({"inputs": [[document["inputs"].decode()]]}).encode()
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    answer = await site.http.post(f"/v1/models/{model}:predict", content=body)
    assert answer.status_code == status, answer.text
    assert answer.headers.get_list("content-type") == ["application/json"]
    assert list(answer.json()) == ["error"]
    assert text in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models/pair:predict"),
        ("POST", "/v1/models/pair"),
        ("PUT", "/v1/models/pair:predict"),
        ("POST", "/v1/models/pair:train"),
        ("GET", "/v1/models/pair/labels/a/b"),
        ("GET", "/v1/models:predict"),
    ],
)
async def test_malformed_path(site: Site, method: str, path: str) -> None:
    answer = await site.http.request(method, path)
    assert (answer.status_code, answer.json()) == (400, {"error": f"Malformed request: {method} {path}"})


async def test_paths_of_others(site: Site) -> None:
    assert (await site.http.get("/v1/models")).json() == {"error": "Missing model name in request."}
    assert (await site.http.get("/v1/modelsx")).status_code == 404
    assert (await site.http.get("/v1/models/%70air/labels/st%61ble")).status_code == 200


@pytest.mark.parametrize(
    ("model", "value"),
    [
        ("BOOL", [[True, False]]),
        ("UINT64", [[2**64 - 1, 0]]),
        ("INT8", [[-128, 127]]),
        ("FP16", [[0.5, -65504.0]]),
        ("BF16", [[0.5, 256.0]]),
        ("FP64", [[0.1, 1e300]]),
        ("BYTES", [[{"b64": "AP8="}, {"b64": "w7w="}]]),
        ("FP32", []),
        ("rank3", [[[1], [2]], [[3], [4]]]),
    ],
)
async def test_json_round_trip(site: Site, model: str, value: Any) -> None:
    answer = await site.http.post(f"/v1/models/{model}:predict", json={"inputs": value})
    if not value:  # [] is a vector, the model wants a matrix
        assert (answer.status_code, "unexpected shape" in answer.text) == (400, True)
    else:
        assert answer.json() == {"outputs": value}


async def test_bf16_is_rounded(site: Site) -> None:
    """To the nearest, in the middle to the even one."""
    values = [[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, float("nan"), float("inf"), -1e-40]]
    answer = await site.http.post("/v1/models/BF16:predict", content=json.dumps({"inputs": values}))
    found = answer.json()["outputs"][0]
    assert found[:3] == [1.0, 1 + 2**-6, 1 + 2**-7]
    assert str(found[3:5]) == "[nan, inf]"
    assert abs(found[5] + 1e-40) < 1e-41


async def test_deadline(site: Site) -> None:
    one = core_pb2.TensorProto(dtype=core_pb2.DT_FLOAT, tensor_shape={"dim": [{"size": 1}] * 2}, float_val=[1])
    request = pb.PredictRequest(model_spec={"name": "slow"}, inputs={"a": one})
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await site.calls["Predict"](request, timeout=0.1)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await site.wait_idle()


async def test_departure(site: Site) -> None:
    """Clients that leave take their requests with them, and nobody else's."""
    slow = {"inputs": [[1.0]]}
    before = asyncio.create_task(site.http.post("/v1/models/slow:predict", json=slow))
    with pytest.raises(httpx.ReadTimeout):
        await site.http.post("/v1/models/slow:predict", json=slow, timeout=0.1)
    one = core_pb2.TensorProto(dtype=core_pb2.DT_FLOAT, tensor_shape={"dim": [{"size": 1}] * 2}, float_val=[1])
    call = site.calls["Predict"](pb.PredictRequest(model_spec={"name": "slow"}, inputs={"a": one}))
    await asyncio.sleep(0)
    call.cancel()
    assert (await before).json() == {"outputs": [[1.0]]}
    await site.wait_idle()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "b64", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(
    key=st.sampled_from(["instances", "inputs", "examples", "context", "signature_name"]),
    value=JSON_VALUES,
    model=st.sampled_from(["pair", "BYTES", "FP16", "rank3", "classes"]),
    method=st.sampled_from(["predict", "classify", "regress"]),
)
async def test_any_document(site: Site, key: str, value: Any, model: str, method: str) -> None:
    """Answered or refused in words, never a fault."""
    body = json.dumps({key: value}).encode()
    answer = await site.http.post(f"/v1/models/{model}:{method}", content=body, timeout=TIMEOUT_S)
    assert answer.status_code in (200, 400), (body, answer.text)
    assert answer.status_code == 200 or list(json.loads(answer.text)) == ["error"]


async def test_stopping(site: Site, repository: Path) -> None:
    """What runs is answered, and so is what comes until the end; states are not told any more."""
    async with serve_here(repository, "native-1") as other:
        running = asyncio.create_task(other.http.post("/v1/models/slow:predict", json={"inputs": [[1.0]]}))
        while not any(servable.pending for servable in other.application.manager.servables()):
            await asyncio.sleep(0.01)
        other.application.manager.announce_stop()
        assert (await other.predict("pair", BOTH)).outputs["x"] == A
        answer = await other.http.get("/v1/models/pair")
        assert (answer.status_code, answer.json()) == (503, {"error": "Server not ready"})
        assert (await running).json() == {"outputs": [[1.0]]}


@pytest.mark.alone
async def test_large_examples_do_not_hold_up_others(site: Site) -> None:
    values = ",".join(["1"] * 500_000)
    async with measure_lag() as lag:
        answer = await site.http.post("/v1/models/slow:classify", content=f'{{"examples":[{{"a":[{values}]}}]}}')
    assert answer.status_code == 400 and "values size: 500000" in answer.json()["error"]
    assert lag.worst_s < 0.3
