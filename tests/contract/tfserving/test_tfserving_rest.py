"""TensorFlow Serving's REST protocol on models of every backend, and on a model with several inputs and outputs."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from served import Served

MODELS = (
    "digits_cnn",
    "digits_cnn_ts",
    "digits_forest",
    "digits_keras",
    "digits_pipeline",
    "filetype",
    "identity_fp32",
)


@pytest.fixture(scope="module")
def client(example_server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{example_server.http}", timeout=30) as client:
        yield client


def reference(example_models: Path, model: str, rows: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    with np.load(example_models.parent / "reference" / f"{model}.npz") as stored:
        tensors = {name: stored[name][:rows] for name in stored}
    inputs = {name.removeprefix("input."): value for name, value in tensors.items() if name.startswith("input.")}
    outputs = {name.removeprefix("output."): value for name, value in tensors.items() if name.startswith("output.")}
    return inputs, outputs


def compare(found: Any, wanted: np.ndarray[Any, Any]) -> None:
    assert np.shape(found) == wanted.shape
    np.testing.assert_allclose(np.array(found, wanted.dtype), wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.proves("Predict", by="HTTP")
@pytest.mark.parametrize("model", MODELS)
def test_predict(client: httpx.Client, example_models: Path, model: str) -> None:
    """Both formats, with and without the input's name; an answer of one output has no name."""
    inputs, outputs = reference(example_models, model)
    ((name, rows),) = inputs.items()
    for document in (
        {"instances": rows.tolist()},
        {"instances": [{name: row} for row in rows.tolist()]},
        {"inputs": rows.tolist()},
        {"inputs": {name: rows.tolist()}, "signature_name": "serving_default"},
    ):
        answer = client.post(f"/v1/models/{model}:predict", content=json.dumps(document))
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        ((key, found),) = answer.json().items()
        assert key == ("predictions" if "instances" in document else "outputs")
        if len(outputs) == 1:
            (wanted,) = outputs.values()
            compare(found, wanted)
            continue
        if key == "predictions":
            found = {name: [row[name] for row in found] for name in found[0]}
        assert found.keys() == outputs.keys()
        for name_, wanted in outputs.items():
            compare(found[name_], wanted)


def test_strings(client: httpx.Client) -> None:
    text = "Zürich"
    packed = {"b64": base64.b64encode(text.encode()).decode()}
    answer = client.post("/v1/models/text_length:predict", json={"instances": [[text], [packed], [""]]})
    assert answer.json() == {"predictions": [[6], [6], [0]]}


def test_short_numbers(client: httpx.Client) -> None:
    """FP32 has its own shortest spelling, and the words that JSON lacks."""
    text = '{"instances": [[0.2, 1e-7, 3, 16777216], [NaN, Infinity, -Infinity, -0.1]]}'
    answer = client.post("/v1/models/identity_fp32:predict", content=text)
    assert answer.text == '{"predictions":[[0.2,1e-07,3.0,16777216.0],[NaN,Infinity,-Infinity,-0.1]]}'


@pytest.mark.proves("GetModelStatus", by="HTTP")
def test_status(client: httpx.Client) -> None:
    wanted = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    for path in ("/v1/models/digits_forest", "/v1/models/digits_forest/versions/1", "/V1/Models/digits_forest"):
        assert client.get(path).json() == {"model_version_status": [wanted]}


@pytest.mark.proves("GetModelMetadata", by="HTTP")
def test_metadata(client: httpx.Client) -> None:
    document = client.get("/v1/models/digits_keras/metadata").json()
    assert document["model_spec"] == {"name": "digits_keras", "signature_name": "", "version": "1"}
    signature = document["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["method_name"] == "tensorflow/serving/predict"
    dims = [{"size": "-1", "name": ""}, {"size": "64", "name": ""}]
    shape = {"dim": dims, "unknown_rank": False}
    assert signature["inputs"] == {"image": {"name": "image", "dtype": "DT_FLOAT", "tensor_shape": shape}}


@pytest.mark.proves("Classify", by="HTTP")
def test_classify(client: httpx.Client, example_models: Path) -> None:
    inputs, outputs = reference(example_models, "digits_keras")
    rows = [{"image": row} for row in inputs["image"].astype(float).tolist()]
    document = client.post("/v1/models/digits_keras:classify", json={"examples": rows}).json()
    compare([[score for _, score in row] for row in document["results"]], outputs["probabilities"])
    assert {label for row in document["results"] for label, _ in row} == {""}


def test_classify_with_labels(client: httpx.Client, example_models: Path) -> None:
    inputs, outputs = reference(example_models, "filetype")
    rows = [{"bytes": row} for row in inputs["bytes"].tolist()]
    document = client.post("/v1/models/filetype:classify", json={"examples": rows}).json()
    lines = (example_models / "filetype" / "labels.txt").read_text().splitlines()
    assert [label for label, _ in document["results"][0]] == lines
    compare([[score for _, score in row] for row in document["results"]], outputs["target_label"])


@pytest.mark.proves("Regress", by="HTTP")
def test_regress(client: httpx.Client) -> None:
    """The example of TensorFlow Serving's documentation."""
    rows = [{"x": 1.0}, {"x": [2.0]}, {"x": 5}]
    answer = client.post("/v1/models/half_plus_two:regress", json={"examples": rows})
    assert answer.json() == {"results": [2.5, 3.0, 4.5]}


def test_regress_with_context(client: httpx.Client) -> None:
    document = {"context": {"shared": "all", "a": 7}, "examples": [{"a": 1}, {"a": True, "b": {"b64": "/w=="}}]}
    assert client.post("/v1/models/count_features:regress", json=document).json() == {"results": [2.0, 3.0]}


def test_compressed(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/models/identity_fp32:predict",
        json={"instances": [[1.0] * 4] * 60},
        headers={"accept-encoding": "gzip"},
    )
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.json() == {"predictions": [[1.0] * 4] * 60}
