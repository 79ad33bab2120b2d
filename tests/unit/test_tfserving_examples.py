"""Which outputs are classes, scores and values, and what becomes of examples; over signatures alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from aiorch_proto.tfserving import serving_pb2 as pb

from aiorch_server.errors import PayloadTooLarge, RequestError
from aiorch_server.frontends.tfserving.examples import (
    MOST_CONTEXT_BYTES,
    build_inputs,
    choose_class_outputs,
    choose_value_output,
)
from aiorch_server.types import DataType, ModelSignature, TensorSpec

SCORES = TensorSpec("probabilities", DataType.FP32, (3,))
LABEL = TensorSpec("label", DataType.INT64, ())


def sign(inputs: list[TensorSpec], outputs: list[TensorSpec] | None = None, rows: int = 8) -> ModelSignature:
    return ModelSignature(tuple(inputs), tuple(outputs or [SCORES]), rows)


def make(*rows: dict[str, Any]) -> pb.Input:
    message = pb.Input()
    for row in rows:
        features = message.example_list.examples.add().features.feature
        for name, values in row.items():
            kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(values[0])]
            getattr(features[name], kind).value.extend(values)
    return message


def test_the_only_scores_are_meant() -> None:
    assert choose_class_outputs(sign([], [LABEL, SCORES])) == (None, SCORES)
    named = TensorSpec("scores", DataType.FP32, (3,))
    assert choose_class_outputs(sign([], [SCORES, named])) == (None, named)
    names = TensorSpec("classes", DataType.BYTES, (3,))
    assert choose_class_outputs(sign([], [SCORES, names])) == (names, None)
    whole = TensorSpec("probabilities", DataType.FP32, (-1, 3))
    assert choose_class_outputs(sign([], [whole], rows=0)) == (None, whole)


@pytest.mark.parametrize("outputs", [[LABEL], [SCORES, TensorSpec("more", DataType.FP64, (2,))]])
def test_a_choice_is_not_guessed(outputs: list[TensorSpec]) -> None:
    with pytest.raises(RequestError, match="Expected classification signature outputs"):
        choose_class_outputs(sign([], outputs))
    with pytest.raises(RequestError, match="No regression outputs found"):
        choose_value_output(sign([], outputs))


def test_the_only_numbers_are_values() -> None:
    value = TensorSpec("y", DataType.FP64, ())
    assert choose_value_output(sign([], [LABEL, value])) == value
    named = TensorSpec("outputs", DataType.FP32, (1,))
    assert choose_value_output(sign([], [value, named])) == named


@pytest.mark.parametrize("datatype", [each for each in DataType if each is not DataType.BYTES])
def test_whole_numbers_fit_every_type(datatype: DataType) -> None:
    spec = TensorSpec("x", datatype, (2,))
    ((tensor,), count) = build_inputs(sign([spec]), make({"x": [0, 1]}, {"x": [1, 1]}))
    assert (tensor.name, tensor.datatype, tensor.shape, count) == ("x", datatype.value, (2, 2), 2)
    found = np.frombuffer(bytes(tensor.data or b""), datatype.numpy)
    one = 0x3F80 if datatype is DataType.BF16 else 1
    assert found.tolist() == [0, one, one, one]


def test_open_sizes_follow_the_values() -> None:
    spec = TensorSpec("x", DataType.FP32, (-1, 2))
    ((tensor,), _) = build_inputs(sign([spec]), make({"x": [1.0] * 6}))
    assert tensor.shape == (1, 3, 2)
    ((tensor,), _) = build_inputs(sign([TensorSpec("x", DataType.FP32, (-1, 2))], rows=0), make({"x": [1, 2]}))
    assert tensor.shape == (1, 2)


def test_optional_inputs_may_be_left_out() -> None:
    specs = [TensorSpec("x", DataType.FP32, (1,)), TensorSpec("y", DataType.FP32, (1,), optional=True)]
    inputs, _ = build_inputs(sign(specs), make({"x": [1.0]}))
    assert [tensor.name for tensor in inputs] == ["x"]
    with pytest.raises(RequestError, match=r"Index: 1\.  Feature y"):
        build_inputs(sign(specs), make({"x": [1.0], "y": [1.0]}, {"x": [1.0]}))


@pytest.mark.parametrize(
    ("spec", "rows", "problem"),
    [
        (TensorSpec("x", DataType.UINT8, (1,)), [{"x": [256]}], "Feature x: value 256 does not fit UINT8"),
        (TensorSpec("x", DataType.UINT64, (1,)), [{"x": [-1]}], "Feature x: value -1 does not fit UINT64"),
        (TensorSpec("x", DataType.BOOL, (1,)), [{"x": [2]}], "Feature x: value 2 does not fit BOOL"),
        (TensorSpec("x", DataType.FP16, (1,)), [{"x": [1e6]}], "too large for FP16"),
        (TensorSpec("x", DataType.INT32, (1,)), [{"x": [1.0]}], "Expected type: INT32 but the feature is float"),
        (TensorSpec("x", DataType.FP32, (1,)), [{"x": [b"1"]}], "Expected type: FP32 but the feature is bytes"),
        (TensorSpec("x", DataType.FP32, (-1, -1)), [{"x": [1.0]}], "values size: 1 but output shape"),
        (TensorSpec("x", DataType.FP32, (-1, 2)), [{"x": [1.0]}], "values size: 1 but output shape"),
        (TensorSpec("x", DataType.FP32, (1,)), [{"x": [1.0]}, {"x": [1.0, 2.0]}], "different numbers of values"),
        (TensorSpec("x", DataType.INT64, (1,)), [{"x": [1]}, {"x": [1.0]}], "Feature x is of different types"),
    ],
)
def test_what_does_not_fit(spec: TensorSpec, rows: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(RequestError) as raised:
        build_inputs(sign([spec]), make(*rows))
    assert problem in str(raised.value)


@pytest.mark.parametrize("datatype", [DataType.FP32, DataType.BYTES])
def test_a_context_is_not_copied_without_bound(datatype: DataType) -> None:
    """A megabyte sent once would be 17 megabytes in examples of two bytes each."""
    message = make()
    listed = message.example_list_with_context
    listed.context.features.feature["c"].bytes_list.value.append(bytes(1 << 20))
    for _ in range(MOST_CONTEXT_BYTES >> 20):
        listed.examples.add()
    with pytest.raises(PayloadTooLarge, match=r"the context takes 167.* bytes in all 16 examples, expected at most"):
        build_inputs(sign([TensorSpec("x", datatype, (1,))]), message)
