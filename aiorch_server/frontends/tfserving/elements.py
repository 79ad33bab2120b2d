"""Elements of tensors in the raw form of the data plane, between numpy arrays and bytes."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any, Final

import numpy as np

from aiorch_server.errors import InternalError, RequestError
from aiorch_server.types import DataType, Tensor

Array = np.ndarray[Any, np.dtype[Any]]

FLOATS: Final = frozenset((DataType.FP16, DataType.BF16, DataType.FP32, DataType.FP64))


def join_elements(elements: Iterable[bytes]) -> bytes:
    """Elements of BYTES in the raw form: each with its length in front, four bytes little-endian."""
    return b"".join(part for element in elements for part in (len(element).to_bytes(4, "little"), element))


def split_elements(tensor: Tensor) -> list[bytes]:
    """The elements of an output of BYTES; InternalError if there are not as many as its shape says."""
    view = memoryview(tensor.data or b"").cast("B")
    elements: list[bytes] = []
    offset = 0
    for _ in range(prod(tensor.shape)):
        end = offset + 4 + int.from_bytes(view[offset : offset + 4], "little")
        if offset + 4 > len(view) or end > len(view):
            raise InternalError(f"output '{tensor.name}' ends inside an element")
        elements.append(bytes(view[offset + 4 : end]))
        offset = end
    return elements


def read_elements(tensor: Tensor) -> Array:
    """The elements of an output of any other type, in its shape, as a view of its bytes; BF16 as FP32."""
    datatype = DataType(tensor.datatype)
    view = memoryview(tensor.data or b"").cast("B")
    if len(view) != prod(tensor.shape) * datatype.itemsize:
        raise InternalError(f"output '{tensor.name}' has {len(view)} bytes, which does not match its shape")
    array: Array = np.frombuffer(view, datatype.numpy.newbyteorder("<")).reshape(tensor.shape)
    if datatype is DataType.BF16:
        return (array.astype("<u4") << 16).view("<f4")
    return array


def pack_integers(values: Array, datatype: DataType, owner: str) -> bytes:
    """Whole numbers as raw elements of an integer type or BOOL; RequestError for one that it cannot hold."""
    if datatype is DataType.BOOL:
        lowest, highest = 0, 1
    else:
        limits = np.iinfo(datatype.numpy)  # type: ignore[type-var]
        lowest, highest = int(limits.min), int(limits.max)
    outside = values[(values < lowest) | (values > highest)]
    if outside.size:
        raise RequestError(f"{owner}: value {outside[0]} does not fit {datatype.value}, expected {lowest} to {highest}")
    return values.astype(datatype.numpy.newbyteorder("<")).tobytes()


def pack_floats(values: Array, datatype: DataType, owner: str) -> bytes:
    """Numbers as raw elements of a floating-point type, rounded; RequestError for one that is too large for it."""
    try:
        with np.errstate(over="raise"):
            if datatype is DataType.BF16:
                return _round_to_bf16(values.astype("<f4"))
            return values.astype(datatype.numpy.newbyteorder("<")).tobytes()
    except FloatingPointError:
        raise RequestError(f"{owner}: holds a number that is too large for {datatype.value}") from None


def _round_to_bf16(values: Array) -> bytes:
    """The upper halves, rounded to the nearest and in the middle to the even one; NaN stays NaN."""
    bits = values.view("<u4")
    rounded = (bits.astype("<u8") + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2").tobytes()
