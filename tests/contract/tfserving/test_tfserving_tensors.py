"""TensorProto in all its forms, through a real server and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from aiorch_proto.tfserving import core_pb2
from aiorch_proto.tfserving import serving_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_site import Site

from aiorch_server.types import DataType

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: Type, list of the elements, and how an array's elements go into it.
FORMS: dict[DataType, tuple[int, str]] = {
    DataType.BOOL: (core_pb2.DT_BOOL, "bool_val"),
    DataType.UINT8: (core_pb2.DT_UINT8, "int_val"),
    DataType.UINT16: (core_pb2.DT_UINT16, "int_val"),
    DataType.UINT32: (core_pb2.DT_UINT32, "uint32_val"),
    DataType.UINT64: (core_pb2.DT_UINT64, "uint64_val"),
    DataType.INT8: (core_pb2.DT_INT8, "int_val"),
    DataType.INT16: (core_pb2.DT_INT16, "int_val"),
    DataType.INT32: (core_pb2.DT_INT32, "int_val"),
    DataType.INT64: (core_pb2.DT_INT64, "int64_val"),
    DataType.FP16: (core_pb2.DT_HALF, "half_val"),
    DataType.FP32: (core_pb2.DT_FLOAT, "float_val"),
    DataType.FP64: (core_pb2.DT_DOUBLE, "double_val"),
    DataType.BYTES: (core_pb2.DT_STRING, "string_val"),
    DataType.BF16: (core_pb2.DT_BFLOAT16, "half_val"),
}


def list_elements(array: np.ndarray[Any, Any], datatype: DataType) -> list[Any]:
    """The elements as their list holds them: halves are bit patterns."""
    flat = array.reshape(-1)
    return (flat.view(np.uint16) if datatype is DataType.FP16 else flat).tolist()


def pack_strings(elements: list[bytes]) -> bytes:
    """As TensorFlow's EncodeStringList does it, for strings shorter than 128 bytes."""
    return bytes(map(len, elements)) + b"".join(elements)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[DataType, np.ndarray[Any, Any]]:
    datatype = draw(st.sampled_from(list(DataType)))
    shape = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    count = math.prod(shape)
    if datatype is DataType.BYTES:
        array = np.empty(count, object)
        array[:] = draw(st.lists(st.binary(max_size=20), min_size=count, max_size=count))
    elif datatype is DataType.BOOL:
        array = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), bool)
    else:
        size = count * datatype.itemsize
        array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), datatype.numpy)
    return datatype, array.reshape(shape)


def read(proto: Any, datatype: DataType) -> np.ndarray[Any, Any]:
    """The elements that a client finds, in raw form where bits count."""
    number, field = FORMS[datatype]
    assert proto.dtype == number
    values = list(getattr(proto, field))
    assert {each.name for each, _ in proto.ListFields()} <= {"dtype", "tensor_shape", field}
    if datatype is DataType.BYTES:
        array = np.empty(len(values), object)
        array[:] = values
    elif field == "half_val":
        array = np.array(values, np.uint16).view(datatype.numpy)
    else:
        array = np.array(values, datatype.numpy)
    return array.reshape([dim.size for dim in proto.tensor_shape.dim])


def same(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> bool:
    if wanted.dtype == object:
        return found.shape == wanted.shape and found.tolist() == wanted.tolist()
    if wanted.dtype.kind == "f":  # protobuf in Python makes quiet NaNs of signalling ones
        return found.shape == wanted.shape and np.array_equal(found, wanted, equal_nan=True)
    return found.shape == wanted.shape and found.tobytes() == wanted.tobytes()


@settings(max_examples=100, deadline=None)
@given(tensor=tensors(), form=st.sampled_from(["list", "content"]))
async def test_round_trip(site: Site, tensor: tuple[DataType, np.ndarray[Any, Any]], form: str) -> None:
    datatype, array = tensor
    number, field = FORMS[datatype]
    proto = core_pb2.TensorProto(dtype=number, tensor_shape={"dim": [{"size": size} for size in array.shape]})
    if form == "list":
        getattr(proto, field).extend(list_elements(array, datatype))
    elif datatype is DataType.BYTES:
        proto.tensor_content = pack_strings(array.reshape(-1).tolist())
    else:
        proto.tensor_content = array.tobytes()
    response = await site.predict(datatype.value, {"input_bytes": proto})
    assert same(read(response.outputs["output_bytes"], datatype), array)


@pytest.mark.parametrize("datatype", list(DataType), ids=lambda datatype: datatype.value)
async def test_short_lists_go_on(site: Site, datatype: DataType) -> None:
    """The last element stands for the rest; no element for zeros."""
    number, field = FORMS[datatype]
    shape = {"dim": [{"size": 2}, {"size": 3}]}
    some: list[Any] = [b"x", b"yz"] if datatype is DataType.BYTES else [0, 1]
    zero: Any = b"" if datatype is DataType.BYTES else 0
    for given_, wanted in ((some, some + some[1:] * 4), (some[1:], some[1:] * 6), ([], [zero] * 6)):
        proto = core_pb2.TensorProto(dtype=number, tensor_shape=shape, **{field: given_})
        response = await site.predict(datatype.value, {"input_bytes": proto})
        assert list(getattr(response.outputs["output_bytes"], field)) == wanted


async def test_other_ranks(site: Site) -> None:
    line = core_pb2.TensorProto(dtype=core_pb2.DT_FLOAT, tensor_shape={"dim": [{"size": 3}]}, float_val=[1, 2, 3])
    response = await site.predict("rank1", {"input_bytes": line})
    assert list(response.outputs["output_bytes"].float_val) == [1, 2, 3]
    dims = [{"size": size} for size in (2, 1, 2)]
    cube = core_pb2.TensorProto(dtype=core_pb2.DT_INT8, tensor_shape={"dim": dims}, int_val=[-128, 0, 1, 127])
    response = await site.predict("rank3", {"input_bytes": cube})
    assert response.outputs["output_bytes"] == cube


async def test_large_tensor(site: Site) -> None:
    """Taken apart and put together on other threads."""
    rows = np.random.default_rng(0).standard_normal((200, 500)).astype(np.float32)
    dims = {"dim": [{"size": 200}, {"size": 500}]}
    for form in ({"tensor_content": rows.tobytes()}, {"float_val": rows.reshape(-1).tolist()}):
        proto = core_pb2.TensorProto(dtype=core_pb2.DT_FLOAT, tensor_shape=dims, **form)
        response = await site.predict("FP32", {"input_bytes": proto})
        assert same(read(response.outputs["output_bytes"], DataType.FP32), rows)


SHAPE = {"dim": [{"size": 1}, {"size": 2}]}
FLOAT = {"dtype": core_pb2.DT_FLOAT, "tensor_shape": SHAPE}
BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "no type": ("FP32", {"tensor_shape": SHAPE}, "type DT_INVALID is not served"),
    "complex": ("FP32", {"dtype": core_pb2.DT_COMPLEX64}, "type DT_COMPLEX64 is not served"),
    "unknown type": ("FP32", {"dtype": 4711}, "type 4711 is not served"),
    "unknown rank": ("FP32", FLOAT | {"tensor_shape": {"unknown_rank": True}}, "its shape has an unknown rank"),
    "negative size": (
        "FP32",
        FLOAT | {"tensor_shape": {"dim": [{"size": -1}, {"size": 2}]}},
        "its shape [-1,2] has a negative size",
    ),
    "too many dimensions": (
        "FP32",
        FLOAT | {"tensor_shape": {"dim": [{"size": 1}] * 255}},
        "it has 255 dimensions, expected at most 254",
    ),
    "endless shape": (
        "FP32",
        FLOAT | {"tensor_shape": {"dim": [{"size": 2**62}] * 4 + [{"size": 0}]}},
        f"its shape has more than {2**40} elements",
    ),
    "too many values": (
        "FP32",
        FLOAT | {"float_val": [1, 2, 3]},
        "it has 3 elements in float_val, but its shape has 2",
    ),
    "other list": ("FP32", FLOAT | {"double_val": [1]}, "type DT_FLOAT is expected in float_val, got double_val"),
    "both": (
        "FP32",
        FLOAT | {"float_val": [1], "tensor_content": b"12345678"},
        "it has both tensor_content and float_val",
    ),
    "short content": (
        "FP32",
        FLOAT | {"tensor_content": b"123"},
        "tensor_content has 3 bytes, but its shape and type 8",
    ),
    "out of range": (
        "UINT8",
        {"dtype": core_pb2.DT_UINT8, "tensor_shape": SHAPE, "int_val": [3, 256]},
        "value 256 does not fit UINT8, expected 0 to 255",
    ),
    "half out of range": (
        "FP16",
        {"dtype": core_pb2.DT_HALF, "tensor_shape": SHAPE, "half_val": [-1]},
        "value -1 does not fit UINT16, expected 0 to 65535",
    ),
    "no strings": (
        "BYTES",
        {"dtype": core_pb2.DT_STRING, "tensor_shape": SHAPE, "tensor_content": b"\x05\x01abc"},
        "tensor_content does not hold 2 strings",
    ),
    "endless varint": (
        "BYTES",
        {"dtype": core_pb2.DT_STRING, "tensor_shape": SHAPE, "tensor_content": b"\xff" * 100},
        "tensor_content does not hold 2 strings",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_malformed_tensor(site: Site, name: str) -> None:
    model, content, why = BROKEN[name]
    request = pb.PredictRequest(model_spec={"name": model}, inputs={"input_bytes": core_pb2.TensorProto(**content)})
    wanted = ("INVALID_ARGUMENT", f"tensor parsing error: input_bytes: {why}")
    assert await site.refused("Predict", request) == wanted


@pytest.mark.parametrize(
    ("model", "number", "values"),
    [
        ("FP64", core_pb2.DT_DOUBLE, {"double_val": [1]}),
        ("FP64", core_pb2.DT_DOUBLE, {}),
        ("BYTES", core_pb2.DT_STRING, {"string_val": [b"x" * 1000]}),
    ],
)
async def test_few_bytes_that_stand_for_many(site: Site, model: str, number: int, values: dict[str, Any]) -> None:
    """What a request may hold is bounded by what a message may (1 MiB here), before anything is made of it."""
    shape = {"dim": [{"size": 1 << 15}, {"size": 1 << 15}]}
    proto = core_pb2.TensorProto(dtype=number, tensor_shape=shape, **values)
    request = pb.PredictRequest(model_spec={"name": model}, inputs={"input_bytes": proto})
    code, text = await site.refused("Predict", request)
    assert (code, text) == (
        "RESOURCE_EXHAUSTED",
        "tensor parsing error: input_bytes: with it the inputs hold more than the maximum of 1048576 bytes",
    )


@settings(max_examples=60, deadline=None)
@given(noise=st.binary(max_size=200), at=st.integers(0, 200), length=st.integers(0, 20))
async def test_damaged_messages(site: Site, noise: bytes, at: int, length: int) -> None:
    """Each is answered, and nothing of it stays behind (the fixture looks)."""
    proto = core_pb2.TensorProto(**FLOAT, float_val=[1, 2])
    strings = core_pb2.TensorProto(dtype=core_pb2.DT_STRING, tensor_shape={"dim": [{"size": 1}] * 2}, string_val=[b"a"])
    good = pb.PredictRequest(model_spec={"name": "pair"}, inputs={"a": proto, "b": strings})
    message = good.SerializeToString(deterministic=True)
    damaged = message[:at] + noise + message[at + length :]
    for method in ("Predict", "Classify", "Regress", "MultiInference", "GetModelMetadata", "GetModelStatus"):
        try:
            await site.calls[method](damaged, timeout=20)
        except Exception as error:
            code = error.code().name  # type: ignore[attr-defined]
            assert code in ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"), error
    assert (await site.calls["Predict"](good, timeout=20)).outputs["x"].float_val == [1, 2]
