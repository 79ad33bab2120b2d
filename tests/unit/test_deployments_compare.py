"""Agreement of answers: tolerance, NaN, datatypes, texts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.deployments.compare import compare
from aiorch_server.types import DataType, InferenceResponse, Tensor


def answer(*tensors: Tensor) -> InferenceResponse:
    return InferenceResponse("m", "1", tensors)


def tensor(values: object, datatype: str = "FP32", name: str = "OUT") -> Tensor:
    array = np.array(values, DataType(datatype).numpy)
    return Tensor(name, datatype, array.shape, array.tobytes())


def texts(*values: bytes) -> Tensor:
    return Tensor("OUT", "BYTES", (len(values),), b"".join(len(v).to_bytes(4, "little") + v for v in values))


def differ(a: Tensor, b: Tensor, **options: float) -> str:
    return compare(answer(a), answer(b), **options)


nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("before", "after", "options", "agrees"),
    [
        ([1.0, 2.0], [1.0, 2.0], {}, True),
        ([1.0, 2.0], [1.0, 2.1], {}, False),
        ([1.0, 2.0], [1.0, 2.1], {"atol": 0.11}, True),
        ([100.0], [101.0], {"rtol": 0.011}, True),
        ([100.0], [102.0], {"rtol": 0.011}, False),
        ([nan, 1.0], [nan, 1.0], {}, True),
        ([nan, 1.0], [nan, 1.05], {"atol": 0.1}, True),
        ([nan], [1.0], {"atol": 1e9}, False),
        ([1.0], [nan], {"atol": 1e9}, False),
        ([inf], [inf], {}, True),
        ([inf, 1.0], [inf, 1.01], {"rtol": 0.1}, True),
        ([inf], [-inf], {"rtol": 1.0}, False),
        ([inf], [1.0], {"rtol": 1.0, "atol": 1e9}, False),
        ([1.0], [inf], {"rtol": 1.0, "atol": 1e30}, False),
        ([0.0], [-0.0], {}, True),
    ],
)
def test_numbers(before: list[float], after: list[float], options: dict[str, float], agrees: bool) -> None:
    assert (differ(tensor(before), tensor(after), **options) == "") is agrees


@pytest.mark.parametrize("datatype", [each.value for each in DataType if each not in (DataType.BYTES, DataType.BOOL)])
def test_every_number_type(datatype: str) -> None:
    one, two = (0x3F80, 0x4000) if datatype == "BF16" else (1, 2)
    assert differ(tensor([one, two], datatype), tensor([one, two], datatype)) == ""
    told = differ(tensor([one, one], datatype), tensor([one, two], datatype))
    assert told.startswith("output 'OUT': 1 of 2 values differ, the first at [1]: 1")
    assert differ(tensor([one, one], datatype), tensor([one, two], datatype), atol=1.0) == ""


def test_the_ends_of_whole_numbers() -> None:
    assert differ(tensor([-128], "INT8"), tensor([127], "INT8"), atol=1.0)
    assert differ(tensor([0], "UINT8"), tensor([255], "UINT8"), atol=1.0)
    assert differ(tensor([2**63 - 1], "INT64"), tensor([-(2**63)], "INT64"), rtol=0.5)
    assert differ(tensor([2**53], "INT64"), tensor([2**53 + 1], "INT64"))
    assert differ(tensor([65504], "FP16"), tensor([-65504], "FP16"), rtol=1.0)


def test_booleans_and_texts() -> None:
    assert differ(tensor([True, False], "BOOL"), tensor([True, True], "BOOL"), atol=5.0)
    assert differ(texts(b"a", b"bc"), texts(b"a", b"bc")) == ""
    assert differ(texts(b"a", b"bc"), texts(b"a", b"bd")) == "output 'OUT': text 1 differs: 'bc' became 'bd'"
    assert "cannot be read" in differ(texts(b"a"), Tensor("OUT", "BYTES", (1,), b"\xff\xff\xff\xffx"))


def test_places_types_and_shapes() -> None:
    assert "at [1, 0]: 3.0 became 4.0" in differ(tensor([[1, 2], [3, 5]]), tensor([[1, 2], [4, 5]]))
    assert "shape [1, 2] instead of [2, 1]" in differ(tensor([[1], [2]]), tensor([[1, 2]]))
    assert "FP64 instead of FP32" in differ(tensor([1]), tensor([1], "FP64"))
    assert "'B' is missing" in compare(answer(tensor([1], name="B")), answer())
    assert "'B' is there" in compare(answer(), answer(tensor([1], name="B")))
    first, second = tensor([1], name="A"), tensor([2], name="B")
    assert compare(answer(first, second), answer(second, first)) == ""
    assert "cannot be read" in differ(tensor([1.0]), Tensor("OUT", "FP32", (1,), b"xyz"))
    assert "cannot be read" in differ(tensor([1.0, 2.0]), Tensor("OUT", "FP32", (2,), b"wxyz"))


@given(
    st.sampled_from([each.value for each in DataType]),
    st.lists(st.integers(0, 9), max_size=3),
    st.binary(),
    st.binary(),
)
def test_whatever_comes_is_told_and_not_raised(datatype: str, shape: list[int], before: bytes, after: bytes) -> None:
    a, b = Tensor("X", datatype, tuple(shape), before), Tensor("X", datatype, tuple(shape), after)
    told = differ(a, b, atol=1e-3)
    assert before != after or told == ""
