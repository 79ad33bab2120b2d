"""The classification extension: an output as its highest elements, each as text ``value:index[:label]``.

Values are written as C++'s ``std::to_string`` does (six decimals for floats), which is what clients have been parsing.
Source: server/docs/protocol/extension_classification.md, server/src/classification.cc; there, equal elements come in
any order, and FP16 and BF16 are refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from aiorch_server.errors import RequestError
from aiorch_server.types import DataType, NumpyArray, Parameter, Tensor, TensorSpec

CLASSIFICATION: Final = "classification"
#: Bound of the classes of one output, all rows together: each becomes a piece of text.
_MOST_CLASSES: Final = 1_000_000
_UNORDERED: Final = frozenset((DataType.BOOL, DataType.BYTES))


def read_count(parameters: Mapping[str, Parameter], spec: TensorSpec | None) -> int:
    """How many classes a requested output shall have, 0 if it is not asked for as classes; RequestError.

    ``spec`` is the model's output, None if it has none of that name.
    """
    if CLASSIFICATION not in parameters:
        return 0
    count = parameters[CLASSIFICATION]
    if type(count) is not int:
        raise RequestError("invalid value type for 'classification' parameter, expected int64_param")
    if count <= 0:
        raise RequestError(f"invalid value for 'classification' parameter, expected >= 1, got {count}")
    if spec is not None and spec.datatype in _UNORDERED:
        raise RequestError(
            f"class result not available for output '{spec.name}' due to unsupported type '{spec.datatype.value}'"
        )
    return count


def classify(tensor: Tensor, count: int, labels: Sequence[str], *, has_batch: bool) -> Tensor:
    """The ``count`` highest elements of each row (of all, without a batch dimension), or as many as there are.

    The highest come first, of equal ones that with the lowest index, NaN last. May run on any thread. RequestError for
    more than a million.
    """
    rows = tensor.shape[0] if has_batch else 1
    width = math.prod(tensor.shape[1:] if has_batch else tensor.shape)
    count = min(count, width)
    if rows * count > _MOST_CLASSES or width > _MOST_CLASSES:
        raise RequestError(
            f"classification output tensor '{tensor.name}' too large: more than {_MOST_CLASSES} elements"
        )
    elements = _read(tensor).reshape(rows, width)
    parts = []
    for row in elements:
        best = np.argsort(_rank(row), kind="stable")[:count]
        for value, index in zip(row[best].tolist(), best.tolist(), strict=True):
            text = f"{value:f}:{index}" if isinstance(value, float) else f"{value}:{index}"
            if index < len(labels):
                text = f"{text}:{labels[index]}"
            encoded = text.encode()
            parts += [len(encoded).to_bytes(4, "little"), encoded]
    shape = (rows, count) if has_batch else (count,)
    return dataclasses.replace(tensor, datatype=DataType.BYTES.value, shape=shape, data=b"".join(parts))


def _read(tensor: Tensor) -> NumpyArray:
    datatype = DataType(tensor.datatype)
    elements = np.frombuffer(tensor.data or b"", dtype=datatype.numpy.newbyteorder("<"))
    if datatype is DataType.BF16:  # the upper half of an FP32
        return (elements.astype(np.uint32) << 16).view(np.float32)
    return elements.astype(np.float32) if datatype is DataType.FP16 else elements


def _rank(row: NumpyArray) -> NumpyArray:
    """Keys whose rising order is the falling order of ``row``."""
    rank: NumpyArray = np.invert(row) if row.dtype.kind in "iu" else np.negative(row)
    return rank
