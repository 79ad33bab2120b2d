"""Tensor data between JSON lists and raw little-endian bytes.

Lists may be nested in any way or flat; they are read in row-major order, only the number of elements counts (as in
Triton). Element types are strict: no number is cut, rounded to an integer or read from a string. Floats may be the
words ``NaN``, ``Infinity`` and ``-Infinity``, which stand bare in answers too: JSON has no spelling for them, this is
what Triton writes and what its clients and most JSON readers parse. A literal beyond FP64 (``1e400``) is infinity.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from itertools import chain
from math import prod
from typing import Any

import numpy as np

from aiorch_server.errors import InternalError, RequestError
from aiorch_server.types import DataType, Tensor

_INTEGERS = frozenset(
    (
        DataType.UINT8,
        DataType.UINT16,
        DataType.UINT32,
        DataType.UINT64,
        DataType.INT8,
        DataType.INT16,
        DataType.INT32,
        DataType.INT64,
    )
)
_BINARY_ONLY = frozenset((DataType.FP16, DataType.BF16))
_LENGTH = struct.Struct("<I")
#: Elements written in one step, between two chances for other threads to run (about 4 ms).
_CHUNK = 8192
_JSON_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    type(None): "null",
}


def name_json_type(value: object) -> str:
    """What JSON calls the kind of ``value``, for error texts."""
    return _JSON_NAMES.get(type(value), type(value).__name__)


def pack_data(data: list[Any], datatype: DataType, shape: tuple[int, ...], name: str, path: str) -> bytes:
    """The raw bytes of a JSON ``data`` list for input ``name``; RequestError, led by ``path``, if it is wrong."""
    if datatype in _BINARY_ONLY:
        raise RequestError(
            f"{path}: receiving {datatype.value} data via JSON is not supported. "
            f"Please use the binary data format for input {name}"
        )
    flat = _flatten(data, path)
    expected = prod(shape)
    if len(flat) != expected:
        raise RequestError(f"{path}: holds {len(flat)} elements, but shape {list(shape)} has {expected}")
    if not flat:
        return b""
    kinds = set(map(type, flat))
    if datatype is DataType.BYTES:
        _check_kinds(flat, kinds, (str,), datatype, path)
        return _pack_strings(flat, path)
    if datatype is DataType.BOOL:
        _check_kinds(flat, kinds, (bool,), datatype, path)
        return np.array(flat, dtype=np.bool_).tobytes()
    if datatype in _INTEGERS:
        _check_kinds(flat, kinds, (int,), datatype, path)
        return _pack_integers(flat, datatype, path)
    _check_kinds(flat, kinds, (int, float), datatype, path)
    return _pack_floats(flat, datatype, path)


def render_data(tensor: Tensor) -> str:
    """The elements of an output tensor as the inside of a flat JSON array; may run on any thread.

    Raises RequestError where JSON cannot hold them: FP16, BF16, and BYTES that are not UTF-8 text.
    """
    datatype = DataType(tensor.datatype)
    if datatype in _BINARY_ONLY:
        raise RequestError(
            f"sending {datatype.value} data via JSON is not supported. "
            f"Please use the binary data format for output {tensor.name}"
        )
    data = tensor.data if tensor.data is not None else b""
    count = prod(tensor.shape)
    if datatype is DataType.BYTES:
        strings = _unpack_strings(tensor, memoryview(data), count)
        return _join(strings[start : start + _CHUNK] for start in range(0, count, _CHUNK))
    if len(data) != count * datatype.itemsize:
        raise InternalError(f"output '{tensor.name}' has {len(data)} bytes, which does not match its shape")
    elements = np.frombuffer(data, dtype=datatype.numpy.newbyteorder("<"))
    return _join(elements[start : start + _CHUNK].tolist() for start in range(0, count, _CHUNK))


def _join(chunks: Iterator[list[Any]]) -> str:
    return ",".join(json.dumps(chunk, separators=(",", ":"))[1:-1] for chunk in chunks)


def _flatten(data: list[Any], path: str) -> list[Any]:
    flat = data
    while flat and type(flat[0]) is list:
        if set(map(type, flat)) != {list}:
            raise RequestError(f"{path}: arrays and elements stand side by side at the same depth")
        flat = list(chain.from_iterable(flat))
    return flat


def _check_kinds(flat: list[Any], kinds: set[type], allowed: tuple[type, ...], datatype: DataType, path: str) -> None:
    if kinds.issubset(allowed):
        return
    index, value = next((i, element) for i, element in enumerate(flat) if type(element) not in allowed)
    raise RequestError(f"{path}: element {index} is {name_json_type(value)}, which is not {datatype.value}")


def _pack_integers(flat: list[int], datatype: DataType, path: str) -> bytes:
    values = 1 << 8 * datatype.itemsize
    lowest = 0 if datatype.value.startswith("U") else -values // 2
    highest = lowest + values - 1
    if min(flat) < lowest or max(flat) > highest:
        index = next(i for i, element in enumerate(flat) if not lowest <= element <= highest)
        raise RequestError(f"{path}: element {index} is out of range for {datatype.value} ({lowest} to {highest})")
    return np.array(flat, dtype=datatype.numpy.newbyteorder("<")).tobytes()


def _pack_floats(flat: list[float], datatype: DataType, path: str) -> bytes:
    try:
        with np.errstate(over="raise"):
            return np.array(flat, dtype=np.float64).astype(datatype.numpy.newbyteorder("<")).tobytes()
    except (OverflowError, FloatingPointError):
        raise RequestError(f"{path}: holds a number that is too large for {datatype.value}") from None


def _pack_strings(flat: list[str], path: str) -> bytes:
    try:
        encoded = [element.encode("utf-8") for element in flat]
    except UnicodeEncodeError:
        raise RequestError(f"{path}: holds a string with half a surrogate pair, which is no text") from None
    return b"".join(chain.from_iterable((_LENGTH.pack(len(element)), element) for element in encoded))


def _unpack_strings(tensor: Tensor, data: memoryview, count: int) -> list[str]:
    elements: list[str] = []
    offset = 0
    try:
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(data, offset)
            offset += 4
            if offset + length > len(data):
                raise struct.error
            elements.append(str(data[offset : offset + length], "utf-8"))
            offset += length
    except struct.error:
        raise InternalError(f"output '{tensor.name}' ends inside an element") from None
    except UnicodeDecodeError:
        raise RequestError(
            f"output '{tensor.name}' holds bytes that are not UTF-8 text. Please use the binary data format for it"
        ) from None
    return elements
