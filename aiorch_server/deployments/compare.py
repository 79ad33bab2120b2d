"""Whether two answers to one request agree, and in words why not; pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from aiorch_server.types import DataType, InferenceResponse, NumpyArray, Tensor


def compare(stable: InferenceResponse, candidate: InferenceResponse, *, atol: float = 0.0, rtol: float = 0.0) -> str:
    """The first difference between the answers in a sentence, "" if they agree.

    Outputs are matched by name, in any order; datatypes and shapes must be the same. Two numbers agree if they differ
    by at most ``atol + rtol * |stable|``, or if both are NaN, or the same infinity. Texts and booleans must be equal.
    """
    given = {tensor.name: tensor for tensor in candidate.outputs}
    for tensor in stable.outputs:
        other = given.pop(tensor.name, None)
        if other is None:
            return f"output '{tensor.name}' is missing"
        if difference := _compare_tensors(tensor, other, atol, rtol):
            return f"output '{tensor.name}': {difference}"
    if given:
        return f"output '{next(iter(given))}' is there, which the stable version does not give"
    return ""


def _compare_tensors(stable: Tensor, candidate: Tensor, atol: float, rtol: float) -> str:
    if stable.datatype != candidate.datatype:
        return f"{candidate.datatype} instead of {stable.datatype}"
    if tuple(stable.shape) != tuple(candidate.shape):
        return f"shape {list(candidate.shape)} instead of {list(stable.shape)}"
    if stable.data is None or candidate.data is None:
        return "" if stable.data is candidate.data else "one of the answers has no data"
    before, after = memoryview(stable.data).cast("B"), memoryview(candidate.data).cast("B")
    if before == after:
        return ""  # NaN or not
    try:
        datatype = DataType(stable.datatype)
        if datatype is DataType.BYTES:
            return _compare_texts(before, after)
        return _compare_arrays(_read(before, datatype), _read(after, datatype), stable.shape, atol, rtol)
    except ValueError:
        return "the answers cannot be read"


def _read(data: memoryview, datatype: DataType) -> NumpyArray:
    raw = np.frombuffer(data, datatype.numpy.newbyteorder("<"))
    if datatype is DataType.BF16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw


def _compare_arrays(before: NumpyArray, after: NumpyArray, shape: tuple[int, ...], atol: float, rtol: float) -> str:
    if before.size != after.size:
        return "the answers cannot be read"
    if before.dtype.kind == "f":
        # in doubles the difference of two halves cannot overflow
        wide_before, wide_after = before.astype(np.float64), after.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            gaps = np.abs(wide_after - wide_before)
            is_same = (wide_before == wide_after) | (np.isnan(wide_before) & np.isnan(wide_after))
            is_near = np.isfinite(wide_before) & (gaps <= atol + rtol * np.abs(wide_before))
        wrong = ~(is_same | is_near)
    elif before.dtype.kind in "iu" and (atol or rtol):
        # the difference of two unsigned or two far apart signed numbers does not fit their type
        gaps = np.abs(after.astype(np.float64) - before.astype(np.float64))
        wrong = (before != after) & (gaps > atol + rtol * np.abs(before.astype(np.float64)))
    else:
        wrong = before != after
    if not wrong.any():
        return ""
    at = int(np.flatnonzero(wrong)[0])
    place = [int(each) for each in np.unravel_index(at, shape)] if math.prod(shape) == before.size else [at]
    return (
        f"{int(wrong.sum())} of {before.size} values differ, the first at {place}: "
        f"{before[at].item()!r} became {after[at].item()!r}"
    )


def _compare_texts(before: memoryview, after: memoryview) -> str:
    pairs = zip(_walk(before), _walk(after), strict=True)
    for index, (text, other) in enumerate(pairs):
        if text != other:
            return f"text {index} differs: {_show(text)} became {_show(other)}"
    return ""


def _walk(data: memoryview) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        if at + 4 + length > len(data):
            raise ValueError("a text ends early")
        yield bytes(data[at + 4 : at + 4 + length])
        at += 4 + length


def _show(text: bytes) -> str:
    return repr(text[:40].decode("utf-8", "replace")) + ("..." if len(text) > 40 else "")
