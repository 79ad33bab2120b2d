"""TensorProto messages to neutral tensors and back.

Source of the rules: TensorFlow's ``Tensor::FromProto`` (tensorflow/core/framework/tensor.cc): elements are in
``tensor_content`` or in the list for their type; a list shorter than the shape is continued with its last element, an
empty one stands for zeros. Refused here, where TensorFlow cuts or ignores: too many elements, elements in the list of
another type, and values that the type cannot hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Final

import numpy as np
from aiorch_proto.tfserving import core_pb2

from aiorch_server.errors import PayloadTooLarge, RequestError
from aiorch_server.frontends.tfserving.elements import join_elements, pack_integers, read_elements, split_elements
from aiorch_server.types import DataType, Tensor

#: TensorFlow's bound of the dimensions of a tensor (TensorShape::MaxDimensions).
_MAX_DIMENSIONS: Final = 254
#: Elements taken in one step, between two chances for other threads to run (about 2 ms).
_CHUNK: Final = 65536
#: Bound of the elements of a tensor; what it may hold in bytes is another question.
_MAX_COUNT: Final = 2**40

_INT = ("int_val", np.dtype("<i4"))
_HALF = ("half_val", np.dtype("<i4"))
#: Which list carries a datatype, with which element type, and how the datatype is called in messages.
_LISTS: Final[dict[DataType, tuple[str, np.dtype[Any]]]] = {
    DataType.BOOL: ("bool_val", np.dtype("?")),
    DataType.UINT8: _INT,
    DataType.UINT16: _INT,
    DataType.UINT32: ("uint32_val", np.dtype("<u4")),
    DataType.UINT64: ("uint64_val", np.dtype("<u8")),
    DataType.INT8: _INT,
    DataType.INT16: _INT,
    DataType.INT32: _INT,
    DataType.INT64: ("int64_val", np.dtype("<i8")),
    DataType.FP16: _HALF,
    DataType.BF16: _HALF,
    DataType.FP32: ("float_val", np.dtype("<f4")),
    DataType.FP64: ("double_val", np.dtype("<f8")),
    DataType.BYTES: ("string_val", np.dtype("O")),
}
NUMBERS: Final[dict[DataType, int]] = {
    DataType.BOOL: core_pb2.DT_BOOL,
    DataType.UINT8: core_pb2.DT_UINT8,
    DataType.UINT16: core_pb2.DT_UINT16,
    DataType.UINT32: core_pb2.DT_UINT32,
    DataType.UINT64: core_pb2.DT_UINT64,
    DataType.INT8: core_pb2.DT_INT8,
    DataType.INT16: core_pb2.DT_INT16,
    DataType.INT32: core_pb2.DT_INT32,
    DataType.INT64: core_pb2.DT_INT64,
    DataType.FP16: core_pb2.DT_HALF,
    DataType.BF16: core_pb2.DT_BFLOAT16,
    DataType.FP32: core_pb2.DT_FLOAT,
    DataType.FP64: core_pb2.DT_DOUBLE,
    DataType.BYTES: core_pb2.DT_STRING,
}
_DATATYPES: Final = {number: datatype for datatype, number in NUMBERS.items()}
_VALUE_FIELDS: Final = frozenset(field for field, _ in _LISTS.values())
#: Lists whose packed form in a message is the raw form of the elements: field number, by name.
_RAW_LISTS: Final = {"float_val": 5, "double_val": 6, "bool_val": 11}


def decode_tensors(protos: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a request by name; RequestError says which one is wrong and why."""
    return [_decode(name, proto) for name, proto in protos.items()]


def measure_tensors(protos: Mapping[str, Any], max_bytes: int) -> int:
    """How many bytes ``decode_tensors`` will make of the tensors, found without making them.

    A few bytes can stand for a large tensor. Raises PayloadTooLarge above ``max_bytes``, and RequestError.
    """
    total = 0
    for name, proto in protos.items():
        datatype, shape = _read_head(name, proto)
        count = prod(shape)
        if datatype is DataType.BYTES:
            values = proto.string_val
            last = len(values[-1]) if values else 0
            total += len(proto.tensor_content) + sum(map(len, values)) + 4 * count
            total += max(0, count - len(values)) * last
        else:
            total += count * datatype.itemsize
        if total > max_bytes:
            raise PayloadTooLarge(
                f"tensor parsing error: {name}: with it the inputs hold more than the maximum of {max_bytes} bytes"
            )
    return total


def encode_tensor(tensor: Tensor, proto: Any) -> None:
    """Writes an output into the TensorProto ``proto``; elements go into the list for their type, as clients expect."""
    datatype = DataType(tensor.datatype)
    field = _LISTS[datatype][0]
    if datatype is DataType.BYTES:
        proto.string_val.extend(split_elements(tensor))
    elif field in _RAW_LISTS:
        packed = read_elements(tensor).tobytes()  # the list's packed form, without an object for each element
        proto.MergeFromString(bytes((_RAW_LISTS[field] << 3 | 2,)) + _encode_varint(len(packed)) + packed)
    else:
        held = DataType.UINT16.value if field == "half_val" else tensor.datatype
        elements = read_elements(replace(tensor, datatype=held)).reshape(-1)
        for start in range(0, len(elements), _CHUNK):
            getattr(proto, field).extend(elements[start : start + _CHUNK].tolist())
    proto.dtype = NUMBERS[datatype]
    proto.tensor_shape.SetInParent()
    for size in tensor.shape:
        proto.tensor_shape.dim.add(size=size)


def _read_head(name: str, proto: Any) -> tuple[DataType, tuple[int, ...]]:
    datatype = _DATATYPES.get(proto.dtype)
    if datatype is None:
        known = core_pb2.DataType.DESCRIPTOR.values_by_number.get(proto.dtype)
        raise _refuse(name, f"type {known.name if known else proto.dtype} is not served")
    if proto.tensor_shape.unknown_rank:
        raise _refuse(name, "its shape has an unknown rank")
    if len(proto.tensor_shape.dim) > _MAX_DIMENSIONS:
        raise _refuse(name, f"it has {len(proto.tensor_shape.dim)} dimensions, expected at most {_MAX_DIMENSIONS}")
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    if min(shape, default=0) < 0:
        raise _refuse(name, f"its shape [{','.join(map(str, shape))}] has a negative size")
    if prod(size for size in shape if size) > _MAX_COUNT:
        raise _refuse(name, f"its shape has more than {_MAX_COUNT} elements")
    return datatype, shape


def _decode(name: str, proto: Any) -> Tensor:
    datatype, shape = _read_head(name, proto)
    field = _LISTS[datatype][0]
    count = prod(shape)
    used = [each.name for each, _ in proto.ListFields() if each.name in _VALUE_FIELDS]
    if proto.tensor_content and used:
        raise _refuse(name, f"it has both tensor_content and {used[0]}")
    for other in used:
        if other != field:
            raise _refuse(name, f"type {_name_type(proto)} is expected in {field}, got {other}")
    if proto.tensor_content:
        data = _read_content(name, proto, datatype, count)
    else:
        values = getattr(proto, field)
        if len(values) > count:
            raise _refuse(name, f"it has {len(values)} elements in {field}, but its shape has {count}")
        data = _read_values(name, values, datatype, count)
    return Tensor(name, datatype.value, shape, data)


def _read_content(name: str, proto: Any, datatype: DataType, count: int) -> bytes:
    content: bytes = proto.tensor_content
    if datatype is DataType.BYTES:
        return _read_packed_strings(name, content, count)
    if len(content) != count * datatype.itemsize:
        raise _refuse(
            name, f"tensor_content has {len(content)} bytes, but its shape and type {count * datatype.itemsize}"
        )
    if datatype is DataType.BOOL:  # any byte but 0 is true in TensorFlow, 1 is the only one for us
        return np.frombuffer(content, np.uint8).astype(np.bool_).tobytes()
    return content


def _read_packed_strings(name: str, content: bytes, count: int) -> bytes:
    """Strings as TensorFlow's ``EncodeStringList`` packs them: all lengths as varints, then all bytes."""
    lengths: list[int] = []
    offset = 0
    for _ in range(count):
        length = shift = 0
        while True:
            if offset >= len(content) or shift > 28:
                raise _refuse(name, f"tensor_content does not hold {count} strings")
            byte = content[offset]
            offset += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        lengths.append(length)
    if offset + sum(lengths) != len(content):
        raise _refuse(name, f"tensor_content does not hold {count} strings")
    elements: list[bytes] = []
    for length in lengths:
        elements.append(content[offset : offset + length])
        offset += length
    return join_elements(elements)


def _read_values(name: str, values: Sequence[Any], datatype: DataType, count: int) -> bytes:
    field, dtype = _LISTS[datatype]
    given = len(values)
    if datatype is DataType.BYTES:
        last = values[-1] if given else b""
        return join_elements(values) + join_elements((last,)) * (count - given)
    array = np.zeros(count, dtype)
    for start in range(0, given, _CHUNK):
        part = values[start : start + _CHUNK]
        array[start : start + len(part)] = part
    if given:
        array[given:] = array[given - 1]
    if datatype.itemsize == dtype.itemsize:
        return array.tobytes()
    held = DataType.UINT16 if field == "half_val" else datatype  # bit patterns
    return pack_integers(array, held, f"tensor parsing error: {name}")


def _name_type(proto: Any) -> str:
    return str(core_pb2.DataType.Name(proto.dtype))


def _refuse(name: str, why: str) -> RequestError:
    return RequestError(f"tensor parsing error: {name}: {why}")


def _encode_varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
