"""Tensor data between JSON and raw bytes: exact both ways, strict about types."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.errors import InternalError, RequestError
from aiorch_server.frontends.rest.tensor_json import pack_data, render_data
from aiorch_server.types import DataType, Tensor

JSON_TYPES = [datatype for datatype in DataType if datatype not in (DataType.FP16, DataType.BF16)]


def elements(datatype: DataType) -> st.SearchStrategy:
    if datatype is DataType.BYTES:
        return st.text()
    if datatype is DataType.BOOL:
        return st.booleans()
    if datatype in (DataType.FP32, DataType.FP64):
        width = 32 if datatype is DataType.FP32 else 64
        return st.floats(width=width, allow_nan=False) | st.just(math.nan)  # JSON knows one NaN, without its payload
    limits = np.iinfo(datatype.numpy)
    return st.integers(int(limits.min), int(limits.max))


def parse(tensor: Tensor) -> list:
    return json.loads(f"[{render_data(tensor)}]")


@given(st.data())
def test_json_round_trip_is_exact(data):
    datatype = data.draw(st.sampled_from(JSON_TYPES))
    rows, columns = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    values = data.draw(st.lists(elements(datatype), min_size=rows * columns, max_size=rows * columns))
    nested = [values[row * columns : (row + 1) * columns] for row in range(rows)]
    for form in (values, nested):
        sent = json.loads(json.dumps(form))
        packed = pack_data(sent, datatype, (rows, columns), "IN", "p")
        if datatype is not DataType.BYTES:
            assert packed == np.array(values, datatype.numpy).tobytes()
        got = parse(Tensor("OUT", datatype.value, (rows, columns), packed))
        assert len(got) == len(values)
        for one, other in zip(got, values, strict=True):
            assert type(one) is type(other)
            assert one == other or (math.isnan(one) and math.isnan(other))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists), st.data())
def test_any_json_list_is_packed_or_refused(value, data):
    datatype = data.draw(st.sampled_from(list(DataType)))
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    try:
        packed = pack_data(value if isinstance(value, list) else [value], datatype, shape, "IN", "p")
    except RequestError as error:
        assert str(error).startswith("p: ")
    else:
        assert len(parse(Tensor("OUT", datatype.value, shape, packed))) == math.prod(shape)


def test_integers_for_floats_are_numbers_too():
    assert pack_data([1, 2.5], DataType.FP32, (2,), "IN", "p") == np.array([1, 2.5], np.float32).tobytes()


def test_deep_nesting_is_flattened():
    nested: list = [7]
    for _ in range(2000):
        nested = [nested]
    assert pack_data(nested, DataType.INT8, (1,), "IN", "p") == b"\x07"


@pytest.mark.parametrize(
    ("data", "shape"),
    [(b"\1\0\0\0", (1,)), (b"\5\0\0\0abc", (1,)), (b"\xff\xff\xff\xff", (1,)), (b"", (1,)), (b"\1\0", (1,))],
)
def test_bytes_output_that_ends_inside_an_element(data, shape):
    with pytest.raises(InternalError, match="output 'OUT' ends inside an element"):
        render_data(Tensor("OUT", "BYTES", shape, data))


def test_output_of_the_wrong_size():
    with pytest.raises(InternalError, match="output 'OUT' has 5 bytes, which does not match its shape"):
        render_data(Tensor("OUT", "FP32", (1,), b"12345"))


@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
@pytest.mark.parametrize("count", [0, 1, 8191, 8192, 8193, 20_000])
def test_long_outputs_are_whole(datatype, count):
    values = [str(i) for i in range(count)] if datatype == "BYTES" else [float(i) for i in range(count)]
    packed = pack_data(values, DataType(datatype), (count,), "IN", "p")
    assert parse(Tensor("OUT", datatype, (count,), packed)) == values


def test_any_nonzero_byte_is_true():
    assert parse(Tensor("OUT", "BOOL", (3,), b"\0\1\2")) == [False, True, True]
