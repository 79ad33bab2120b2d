"""V2 datatypes and numpy: what may be sent as what, and the raw bytes of both directions.

Raw form: little-endian, row-major; BYTES elements each carry a 4-byte little-endian length in front
(https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol). BF16 has no numpy dtype: it is
float32 on this side and its upper 16 bits on the wire.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from aiorch_client.errors import RequestError

Array = npt.NDArray[Any]

_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<f4"),
    "BYTES": np.dtype(np.object_),
}
_LENGTH = struct.Struct("<I")
#: The whole numbers between these bounds are all exact; for floats 2 ** (bits of the significand).
_EXACT_INTEGERS: dict[str, tuple[int, int]] = {
    "BOOL": (0, 1),
    **{name: (0, 2 ** int(name[4:]) - 1) for name in ("UINT8", "UINT16", "UINT32", "UINT64")},
    **{
        name: (-(2 ** (int(name[3:]) - 1)), 2 ** (int(name[3:]) - 1) - 1)
        for name in ("INT8", "INT16", "INT32", "INT64")
    },
    **{name: (-(2**bits), 2**bits) for name, bits in {"BF16": 8, "FP16": 11, "FP32": 24, "FP64": 53}.items()},
}
_MAX_BF16 = float(np.array([0x7F7F0000], "<u4").view("<f4")[0])


def get_dtype(datatype: str) -> np.dtype[Any]:
    """The numpy dtype that stands for ``datatype`` on the client's side; RequestError for an unknown name."""
    try:
        return _DTYPES[datatype]
    except KeyError:
        raise RequestError(f"datatype '{datatype}' is unknown to this client; it knows {', '.join(_DTYPES)}") from None


def as_array(value: npt.ArrayLike, datatype: str, *, where: str) -> Array:
    """``value`` as an array of exactly ``datatype``'s dtype, without loss; RequestError naming ``where`` otherwise.

    An array keeps its promise: it is widened only where every value of its dtype fits (int8 to INT32, float32 to FP64).
    Python numbers and lists have no such dtype: they take the model's if each value fits; floats are rounded to the
    nearest value of a float type, integers never. Text is encoded as UTF-8 for BYTES. BF16 takes float32 arrays (and
    ``bfloat16`` ones), which are rounded to the nearest even value when they are sent.
    """
    dtype = get_dtype(datatype)
    if datatype == "BYTES":
        return _as_bytes_array(value, where)
    if not hasattr(value, "dtype") and not hasattr(value, "__array__") and not hasattr(value, "__array_interface__"):
        return _from_python(value, datatype, where)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"{where} is no array: {error}") from error
    if datatype == "BF16" and array.dtype.name == "bfloat16":
        return array.astype("<f4")
    if not _is_lossless(array.dtype, datatype):
        raise RequestError(
            f"{where} has dtype {array.dtype}, the model takes {datatype}; a cast could lose values: "
            f"convert it yourself, for example with .astype(np.{dtype.newbyteorder('=').name})"
        )
    return array.astype(dtype, copy=False)


def encode(array: Array, datatype: str) -> bytes:
    """The raw bytes of an array that ``as_array`` made for ``datatype``."""
    if datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(item)) + item for item in array.flat)
    if datatype == "BF16":
        return _round_to_bf16(array).tobytes()
    return array.tobytes()


def decode(data: bytes, datatype: str, shape: tuple[int, ...]) -> Array:
    """The array in ``data``: a read-only view on it, apart from BYTES (objects) and BF16 (widened to float32).

    ValueError where the number of bytes does not fit the shape.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        items = list(_split_bytes(data))
        if len(items) != count:
            raise ValueError(f"{len(items)} elements for shape {list(shape)}, which needs {count}")
        return objects(items, shape)
    itemsize = 2 if datatype == "BF16" else get_dtype(datatype).itemsize
    if len(data) != count * itemsize:
        raise ValueError(f"{len(data)} bytes for shape {list(shape)} of {datatype}, which needs {count * itemsize}")
    if datatype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    return np.frombuffer(data, get_dtype(datatype)).reshape(shape)


def objects(items: Iterable[object], shape: tuple[int, ...]) -> Array:
    """An object array of ``items`` in row-major order; never looks into the items as numpy itself would."""
    flat = list(items)
    array = np.empty(len(flat), np.object_)
    for index, item in enumerate(flat):
        array[index] = item
    return array.reshape(shape)


def _is_lossless(source: np.dtype[Any], datatype: str) -> bool:
    if datatype == "BF16":
        # numpy cannot be asked: 8 bits of significand hold a byte, and float32 is rounded by contract
        return source.name in ("float32", "bool", "int8", "uint8")
    target = get_dtype(datatype)
    # numpy calls 64-bit integers to float64 safe; beyond 2**53 they are not
    if source.kind in "iu" and source.itemsize == 8 and target.kind == "f":
        return False
    return source.kind in "biuf" and np.can_cast(source, target, "safe")


def _from_python(value: npt.ArrayLike, datatype: str, where: str) -> Array:
    dtype = get_dtype(datatype)
    try:
        natural = np.array(value)
        if natural.size == 0 or _is_sure_to_fit(natural, datatype):
            return natural.astype(dtype)
        items = np.array(value, np.object_)
    except (ValueError, TypeError) as error:
        raise RequestError(f"{where} is no regular array: {error}") from error
    kept = [_fit(item, datatype, dtype, where) for item in items.flat]
    return np.array(kept, dtype).reshape(items.shape)


def _is_sure_to_fit(natural: Array, datatype: str) -> bool:
    """Whether the quick look at whole arrays is enough; False also means "look at each item"."""
    dtype = get_dtype(datatype)
    if dtype.kind == "b":
        return natural.dtype.kind == "b"
    if natural.dtype.kind in "biu":
        low, high = _EXACT_INTEGERS[datatype]
        return low <= int(natural.min()) and int(natural.max()) <= high
    if natural.dtype.kind == "f" and dtype.kind == "f":
        largest = _MAX_BF16 if datatype == "BF16" else float(np.finfo(dtype).max)
        finite = natural[np.isfinite(natural)]
        return finite.size == 0 or bool(np.abs(finite).max() <= largest)
    return False


def _fit(item: object, datatype: str, dtype: np.dtype[Any], where: str) -> bool | int | float:
    is_bool = isinstance(item, bool | np.bool_)
    is_integer = is_bool or isinstance(item, int | np.integer)
    is_number = is_integer or isinstance(item, float | np.floating)
    if not {"b": is_bool, "f": is_number}.get(dtype.kind, is_integer):
        raise RequestError(f"{where} holds {item!r} ({type(item).__name__}), the model takes {datatype}")
    low, high = _EXACT_INTEGERS[datatype]
    number: Any = item
    if not is_integer:
        # a float that is finite, but not after the rounding
        if math.isfinite(number) and not math.isfinite(float(_round(number, datatype))):
            raise RequestError(f"{where} holds {item!r}, which {datatype} cannot hold")
    elif not low <= number <= high and (dtype.kind != "f" or _round(number, datatype) != number):
        raise RequestError(f"{where} holds {item!r}, which {datatype} cannot hold exactly")
    return number  # type: ignore[no-any-return]


def _round(number: float, datatype: str) -> Any:
    """``number`` as the float type keeps it, infinite where it is too large."""
    try:
        with np.errstate(over="ignore"):
            kept = np.array([number], np.float64).astype(get_dtype(datatype))
    except OverflowError:
        return math.inf
    return decode(encode(kept, datatype), datatype, (1,))[0].item()


def _as_bytes_array(value: npt.ArrayLike, where: str) -> Array:
    if isinstance(value, str | bytes):
        given: Array = objects([value], ())
    else:
        try:
            # dtype object first: numpy's own string dtypes drop trailing zero bytes
            given = np.asarray(value) if hasattr(value, "dtype") else np.array(value, np.object_)
        except ValueError as error:
            raise RequestError(f"{where} has rows of different lengths: {error}") from error
    return objects((_as_bytes(item, where) for item in given.flat), given.shape)


def _as_bytes(item: object, where: str) -> bytes:
    if isinstance(item, str):
        return item.encode()
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    if isinstance(item, list | tuple):
        raise RequestError(f"{where} has rows of different lengths")
    raise RequestError(f"{where} holds {item!r} ({type(item).__name__}), the model takes BYTES: text or bytes")


def _round_to_bf16(array: Array) -> Array:
    bits = np.ascontiguousarray(array, "<f4").view("<u4")
    # Round to nearest, ties to even; a NaN must not be carried over into infinity.
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype("<u4")) >> 16).astype("<u2")
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16).astype("<u2") | np.uint16(0x0040), rounded).astype("<u2")


def _split_bytes(data: bytes) -> Iterable[bytes]:
    position = 0
    while position < len(data):
        if position + _LENGTH.size > len(data):
            raise ValueError("a BYTES element is cut off within its length")
        (length,) = _LENGTH.unpack_from(data, position)
        position += _LENGTH.size
        if position + length > len(data):
            raise ValueError(f"a BYTES element of {length} bytes runs past the end")
        yield data[position : position + length]
        position += length
