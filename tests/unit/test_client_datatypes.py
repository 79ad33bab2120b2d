import struct

import numpy as np
import pytest
from aiorch_client.datatypes import as_array, decode, encode
from aiorch_client.errors import RequestError
from hypothesis import given
from hypothesis import strategies as st

INTEGERS = ["INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"]
FORMATS = {
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
}


def fits(value, datatype):
    return as_array(value, datatype, where="input 'x'")


@given(st.sampled_from(INTEGERS), st.lists(st.integers(-(2**65), 2**65), max_size=4))
def test_python_integers_arrive_exactly_or_are_refused(datatype, numbers):
    try:
        expected = struct.pack(f"<{len(numbers)}{FORMATS[datatype]}", *numbers)
    except struct.error:
        with pytest.raises(RequestError, match="hold"):
            fits(numbers, datatype)
    else:
        assert encode(fits(numbers, datatype), datatype) == expected


@given(
    st.sampled_from(["FP16", "FP32", "FP64", "BF16"]), st.lists(st.integers(-(2**60), 2**60), min_size=1, max_size=4)
)
def test_integers_are_never_rounded_by_a_float_type(datatype, numbers):
    try:
        array = fits(numbers, datatype)
    except RequestError as error:
        assert "exactly" in error.details
    else:
        received = decode(encode(array, datatype), datatype, array.shape)
        assert [int(item) for item in received] == numbers


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_bf16_rounds_to_the_nearest_even(numbers):
    array = np.array(numbers, np.float32)
    kept = decode(encode(array, "BF16"), "BF16", array.shape)
    bits = array.view(np.uint32)
    for value, result, pattern in zip(array.astype(float), kept.astype(float), bits, strict=True):
        below = float(np.array([pattern & 0xFFFF0000], np.uint32).view(np.float32)[0])
        above_bits = (int(pattern) & 0xFFFF0000) + 0x10000
        above = float(np.array([above_bits], np.uint32).view(np.float32)[0])
        if not np.isfinite(above):  # beyond the largest value the next step is the power of two that would follow it
            above = float(np.copysign(2.0**128, value))
        to_below, to_above = abs(value - below), abs(above - value)
        if to_below == to_above:
            expected = below if (int(pattern) >> 16) % 2 == 0 else above
        else:
            expected = below if to_below < to_above else above
        assert result == expected or (np.isinf(result) and abs(expected) >= 2.0**128)


def test_bf16_keeps_nan_infinity_and_signed_zero():
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x80000000], np.uint32)
    kept = decode(encode(bits.view(np.float32), "BF16"), "BF16", (5,))
    assert np.isnan(kept[:2]).all()
    assert kept[2] == np.inf
    assert kept[3] == -np.inf
    assert kept[4] == 0
    assert np.signbit(kept[4])


@given(st.lists(st.one_of(st.binary(max_size=20), st.text(max_size=20)), max_size=6))
def test_bytes_come_back_as_they_were(items):
    array = fits(items, "BYTES")
    assert list(decode(encode(array, "BYTES"), "BYTES", (len(items),))) == [
        item.encode() if isinstance(item, str) else item for item in items
    ]


def test_bytes_keep_zero_bytes_at_the_end_and_nested_shapes():
    array = fits([[b"a\0", "ü"], [b"", bytearray(b"x")]], "BYTES")
    assert array.tolist() == [[b"a\0", "ü".encode()], [b"", b"x"]]
    assert fits("alone", "BYTES").shape == ()
    assert fits(np.array(["ab", "c"]), "BYTES").tolist() == [b"ab", b"c"]


@pytest.mark.parametrize(
    ("dtype", "datatype"),
    [
        (np.int8, "INT32"),
        (np.float32, "FP64"),
        (np.bool_, "UINT8"),
        (np.int32, "FP64"),
        (">i4", "INT32"),
        (np.uint8, "BF16"),
    ],
)
def test_arrays_are_widened_where_every_value_fits(dtype, datatype):
    array = np.array([0, 1, 1], dtype)
    received = decode(encode(fits(array, datatype), datatype), datatype, (3,))
    assert received.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "datatype", "advice"),
    [
        (np.float64, "FP32", "float32"),
        (np.int64, "INT32", "int32"),
        (np.int64, "FP64", "float64"),  # numpy itself calls this one safe
        (np.float32, "INT64", "int64"),
        (np.float64, "BF16", "float32"),
        (np.int32, "BF16", "float32"),
        (np.uint8, "BOOL", "bool"),
        (np.complex64, "FP32", "float32"),
    ],
)
def test_arrays_that_could_lose_are_refused_with_what_would_be_right(dtype, datatype, advice):
    with pytest.raises(RequestError, match=rf"input 'x' has dtype .* takes {datatype}.*astype\(np\.{advice}\)"):
        fits(np.zeros(2, dtype), datatype)


@pytest.mark.parametrize(
    ("value", "datatype", "text"),
    [
        ([1.5], "INT32", "1.5"),
        ([True, 2], "BOOL", "2"),
        (["a"], "FP32", "'a'"),
        ([None], "FP32", "None"),
        ([1j], "FP32", "1j"),
        ([1e39], "FP32", "cannot hold"),
        ([70000.0], "FP16", "cannot hold"),
        ([3.4e38, -3.4e38], "BF16", "cannot hold"),
        ([2**24 + 1], "FP32", "exactly"),
        ([257], "BF16", "exactly"),
        ([[1], [2, 3]], "INT32", "regular"),
        ([["a"], ["b", "c"]], "BYTES", "different lengths"),
        ([1], "BYTES", "text or bytes"),
        (np.zeros(1), "BYTES", "text or bytes"),
        ([1], "FP8", "unknown to this client"),
    ],
)
def test_values_that_do_not_fit_are_refused(value, datatype, text):
    with pytest.raises(RequestError, match=text):
        fits(value, datatype)


def test_floats_of_python_are_rounded_and_special_values_pass():
    assert fits([0.1, float("inf"), float("nan")], "FP16").tolist()[:2] == [float(np.float16(0.1)), float("inf")]
    assert fits([], "INT32").shape == (0,)
    assert fits(3, "INT32").shape == ()
    assert fits([2**63, 2**64 - 1, 0], "UINT64").tolist() == [2**63, 2**64 - 1, 0]


def test_an_array_that_is_not_contiguous_is_sent_in_row_order():
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    assert decode(encode(fits(array, "INT32"), "INT32"), "INT32", (3, 2)).tolist() == array.tolist()


@pytest.mark.parametrize(
    ("data", "datatype", "shape"),
    [
        (b"1234", "FP32", (2,)),
        (b"1234", "FP32", (-1,)),
        (b"\x01\0\0", "BYTES", (1,)),
        (b"\xff\xff\xff\xff", "BYTES", (1,)),
        (b"\0\0\0\0", "BYTES", (2,)),
        (b"123", "BF16", (1,)),
    ],
)
def test_bytes_that_do_not_fit_their_shape_are_an_error(data, datatype, shape):
    with pytest.raises(ValueError, match=r"needs|cut off|runs past"):
        decode(data, datatype, shape)
