"""Outputs as classes, with tritonclient over gRPC and HTTP: order, labels, all numeric datatypes, bad counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from running_site import Site
from tritonclient.utils import InferenceServerException

from aiorch_server.errors import RequestError
from aiorch_server.exchange.classes import classify
from aiorch_server.types import DataType, Tensor

LIBRARIES = {"grpc": grpc_client, "http": http_client}
NUMERIC = [each.value for each in DataType if each not in (DataType.BOOL, DataType.BYTES)]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=LIBRARIES)
def ask(request: pytest.FixtureRequest, site: Site) -> Iterator[Callable[..., Any]]:
    """Sends an array to the model for its datatype and gives the output's array."""
    library = LIBRARIES[request.param]
    client = library.InferenceServerClient(site.target if request.param == "grpc" else site.http)

    def ask(values: Any, count: int, datatype: str = "FP32", **options: Any) -> Any:
        tensor = library.InferInput("INPUT0", list(values.shape), datatype if datatype != "STRING" else "BYTES")
        tensor.set_data_from_numpy(values)
        outputs = [library.InferRequestedOutput("OUTPUT0", class_count=count, **options)]
        return client.infer(f"scores_{datatype}", [tensor], outputs=outputs).as_numpy("OUTPUT0")

    yield ask
    client.close()


def test_rows_and_labels(ask: Callable[..., Any]) -> None:
    """Each row of a batch by itself, its other dimensions flat; the fifth class has no label."""
    values = np.array([[[0.5, 4, -1], [3, 2.25, 9]], [[7, 7, 8], [7, -INF, NAN]]], dtype=np.float32)
    found = ask(values, 3)
    assert found.shape == (2, 3)
    assert found.tolist() == [
        [b"9.000000:5", b"4.000000:1:eins", b"3.000000:3:drei"],
        [b"8.000000:2:zwei: blau", b"7.000000:0:null", b"7.000000:1:eins"],
    ]


def test_ties_and_nan(ask: Callable[..., Any]) -> None:
    """Equal ones by index, NaN behind everything; more classes than there are give all."""
    values = np.array([[[NAN, -INF, INF], [-0.0, 0.0, NAN]]], dtype=np.float32)
    found = [text.split(b":")[:2] for text in ask(values, 100)[0].tolist()]
    assert found == [
        [b"inf", b"2"], [b"-0.000000", b"3"], [b"0.000000", b"4"], [b"-inf", b"1"], [b"nan", b"0"], [b"nan", b"5"],
    ]  # fmt: skip


@pytest.mark.parametrize("datatype", NUMERIC)
def test_every_numeric_datatype(ask: Callable[..., Any], datatype: str) -> None:
    """The lowest and the highest value of the type stand where they belong; without a batch the shape is [k]."""
    if datatype in ("FP16", "FP32", "FP64", "BF16"):
        dtype = ml_dtypes.bfloat16 if datatype == "BF16" else DataType(datatype).numpy
        values, texts = [-8.0, 2.0, 16.0, -0.5], [b"16.000000:2", b"2.000000:1", b"-0.500000:3", b"-8.000000:0"]
    else:
        dtype = DataType(datatype).numpy
        limits = np.iinfo(dtype)
        values = [limits.min, 5, limits.max, 3]
        texts = [b"%d:2" % limits.max, b"5:1", b"3:3", b"%d:0" % limits.min]
    array = np.array(values, dtype=dtype).reshape(2, 2)
    found = ask(array if datatype != "FP32" else array[None], 4, datatype)
    assert found.shape == ((1, 4) if datatype == "FP32" else (4,))
    labels = {b"0": b"null", b"1": b"eins", b"2": b"zwei: blau", b"3": b"drei"}
    assert found.reshape(-1).tolist() == [text + b":" + labels[text.split(b":")[1]] for text in texts]


@pytest.mark.parametrize(
    ("datatype", "values"), [("BOOL", np.array([[True]])), ("STRING", np.array([["a"]], dtype=object))]
)
def test_types_without_an_order(ask: Callable[..., Any], datatype: str, values: Any) -> None:
    name = "BYTES" if datatype == "STRING" else datatype
    text = f"class result not available for output 'OUTPUT0' due to unsupported type '{name}'"
    with pytest.raises(InferenceServerException, match=text):
        ask(values, 1, datatype)


def test_counts_that_are_none(ask: Callable[..., Any], site: Site) -> None:
    with pytest.raises(InferenceServerException, match="invalid value for 'classification' parameter, expected >= 1"):
        ask(np.zeros((1, 1, 1), np.float32), -1)
    client = http_client.InferenceServerClient(site.http)
    tensor = http_client.InferInput("INPUT0", [1, 1, 1], "FP32").set_data_from_numpy(np.zeros((1, 1, 1), np.float32))
    output = http_client.InferRequestedOutput("OUTPUT0")
    output._parameters["classification"] = "3"
    with pytest.raises(InferenceServerException, match="invalid value type for 'classification' parameter"):
        client.infer("scores_FP32", [tensor], outputs=[output])
    client.close()


def test_json_and_binary(site: Site) -> None:
    """The text comes in JSON as well."""
    client = http_client.InferenceServerClient(site.http)
    tensor = http_client.InferInput("INPUT0", [1, 1, 2], "FP32")
    tensor.set_data_from_numpy(np.array([[[1, 2]]], np.float32), binary_data=False)
    outputs = [http_client.InferRequestedOutput("OUTPUT0", class_count=1, binary_data=False)]
    answer = client.infer("scores_FP32", [tensor], outputs=outputs).get_response()["outputs"][0]
    assert (answer["datatype"], answer["shape"], answer["data"]) == ("BYTES", [1, 1], ["2.000000:1:eins"])
    client.close()


def test_big_outputs(ask: Callable[..., Any]) -> None:
    """Beyond what is sorted on the event loop, and beyond what is answered at all."""
    values = np.arange(300_000, dtype=np.float32).reshape(1, 1, -1)
    assert ask(values, 2).tolist() == [[b"299999.000000:299999", b"299998.000000:299998"]]
    for shape, count in (((1, 1_000_001), 1), ((4, 300_000), 300_000)):
        tensor = Tensor("X", "INT8", shape, bytes(shape[0] * shape[1]))
        with pytest.raises(RequestError, match="'X' too large: more than 1000000 elements"):
            classify(tensor, count, (), has_batch=True)
