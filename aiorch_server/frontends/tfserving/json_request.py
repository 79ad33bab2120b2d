"""The documents of :predict, :classify and :regress to tensors and examples.

Texts follow tensorflow_serving/util/json_tensor.cc. A tensor is nested lists, whose nesting is its shape, or a bare
value; strings of any bytes are ``{"b64": "..."}``. ``instances`` (row format) holds one value, or one object of named
values, for each row; ``inputs`` (column format) one value, or one object of named values, for all rows.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Final

import numpy as np
from aiorch_proto.tfserving import core_pb2, serving_pb2

from aiorch_server.errors import RequestError
from aiorch_server.frontends.rest.tensor_json import pack_data
from aiorch_server.frontends.tfserving.elements import join_elements, pack_floats
from aiorch_server.types import DataType, ModelSignature, Tensor, TensorSpec

_B64: Final = "b64"
_MOST_CHARACTERS: Final = 256
_INT64: Final = range(-(2**63), 2**63)
#: Floating-point types that JSON has no place for in the V2 protocol; here numbers are rounded to them.
_ROUNDED: Final = (DataType.FP16, DataType.BF16)
_JSON_TYPES: Final = {
    dict: "Object",
    list: "Array",
    str: "String",
    bool: "Bool",
    int: "Number",
    float: "Number",
    type(None): "Null",
}


@dataclass(frozen=True, slots=True)
class PredictCall:
    """The inputs of a :predict, and whether they came, and the outputs shall go, by rows."""

    inputs: Sequence[Tensor]
    is_by_rows: bool


def read_signature_name(document: Mapping[str, Any]) -> str:
    """The signature that a document names, "" if it names none."""
    name = document.get("signature_name", "")
    if type(name) is not str:
        raise RequestError(
            f"JSON Value: {_show(document)} not formatted correctly. 'signature_name' key must be a string value."
        )
    return name


def read_predict(document: Mapping[str, Any], signature: ModelSignature) -> PredictCall:
    """The inputs in ``document``; RequestError says what is wrong with it."""
    if not signature.inputs:
        raise RequestError("Failed to get input map for signature: DEFAULT")
    columns: Mapping[str, Any]
    if "instances" in document and "inputs" in document:
        raise RequestError(
            f"JSON Value: {_show(document)} Not formatted correctly expecting only one of 'inputs' or 'instances' keys "
            "to exist "
        )
    if "instances" in document:
        rows = document["instances"]
        if type(rows) is not list:
            raise RequestError(f"JSON Value: {_show(document)} Expecting 'instances' to be an list/array")
        if not rows:
            raise RequestError(f"JSON Value: {_show(document)} No values in 'instances' array")
        columns = _read_rows(rows, signature)
    elif "inputs" in document:
        columns = _read_columns(document["inputs"], signature)
    else:
        raise RequestError("Missing 'inputs' or 'instances' key")
    specs = {spec.name: spec for spec in signature.inputs}
    inputs = [_pack(value, specs[name]) for name, value in columns.items()]
    return PredictCall(inputs, "instances" in document)


def read_examples(document: Mapping[str, Any], method: str) -> serving_pb2.Input:
    """The examples in ``document``, for ``method``; RequestError says what is wrong with it."""
    rows = serving_pb2.Input()
    target = rows.example_list
    if "context" in document:
        target = rows.example_list_with_context
        _fill_example(document["context"], target.context)
    if "examples" not in document:
        raise RequestError(
            f"JSON Value: {_show(document)} When method is {method}, key 'examples' is expected and was not found"
        )
    examples = document["examples"]
    if type(examples) is not list:
        raise RequestError(f"JSON Value: {_show(document)} Expecting 'examples' value to be an list/array")
    if not examples:
        raise RequestError(f"JSON Value: {_show(document)} 'examples' value is an empty array")
    for example in examples:
        _fill_example(example, target.examples.add())
    return rows


def _read_rows(rows: list[Any], signature: ModelSignature) -> dict[str, list[Any]]:
    """The rows' values by input."""
    has_names = _is_names(rows[0])
    if not has_names and len(signature.inputs) > 1:
        raise RequestError(
            "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
            "tensorinfo_map"
        )
    for index, row in enumerate(rows):
        if _is_names(row) is not has_names:
            expected, got = ("object", "list") if has_names else ("value/list", "object")
            raise RequestError(f"Expecting {expected} but got {got} at item {index} of input list")
    if not has_names:
        return {signature.inputs[0].name: rows}
    columns: dict[str, list[Any]] = {name: [] for name in rows[0]}
    where = "Failed to process element: 0 of 'instances' list."
    _check_columns(columns, signature, f"{where} JSON object: {_show(rows[0])}")
    for index, row in enumerate(rows):
        if row.keys() != columns.keys():
            raise RequestError(
                f"Failed to process element: {index} of 'instances' list. JSON object: {_show(row)} keys must be equal "
                f"to: {','.join(sorted(columns))}"
            )
        for name, value in row.items():
            columns[name].append(value)
    return columns


def _read_columns(value: object, signature: ModelSignature) -> Mapping[str, Any]:
    if not _is_names(value):
        if len(signature.inputs) > 1:
            raise RequestError(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                "tensorinfo_map"
            )
        return {signature.inputs[0].name: value}
    assert isinstance(value, dict)
    for spec in signature.inputs:
        if spec.name not in value and not spec.optional:
            raise RequestError(f"Missing named input: {spec.name} in 'inputs' object.")
    _check_columns(value, signature, "")
    return value


def _check_columns(columns: Mapping[str, Any], signature: ModelSignature, where: str) -> None:
    known = {spec.name for spec in signature.inputs}
    for name in columns:
        if name not in known:
            raise RequestError(f"JSON object: does not have named input: {name}")
    missing = {spec.name for spec in signature.inputs if not spec.optional} - columns.keys()
    if missing:
        raise RequestError(f"{where} keys must be equal to: {','.join(sorted(known))}")


def _pack(value: object, spec: TensorSpec) -> Tensor:
    """``value`` as the tensor that ``spec`` says, whatever shape it has."""
    shape: list[int] = []
    probe = value
    while type(probe) is list:
        shape.append(len(probe))
        if not probe:
            break
        probe = probe[0]
    flat: list[Any] = [value]
    for level, size in enumerate(shape):
        for each in flat if set(map(type, flat)) != {list} else ():
            if type(each) is not list:
                raise RequestError(
                    f"{spec.name}: JSON Value: {_show(each)} found at incorrect level: {level + 1} in the JSON DOM. "
                    f"Expected at level: {len(shape)}"
                )
        if set(map(len, flat)) - {size}:
            other = next(len(each) for each in flat if len(each) != size)
            raise RequestError(
                f"{spec.name}: Encountered list at unexpected size: {other} at level: {level} expected size: {size}"
            )
        flat = list(chain.from_iterable(flat))
    if any(type(each) is list for each in flat):
        raise RequestError(f"{spec.name}: Encountered list at unexpected level: {len(shape)} expected < {len(shape)}")
    return Tensor(spec.name, spec.datatype.value, tuple(shape), _pack_flat(flat, spec, tuple(shape)))


def _pack_flat(flat: list[Any], spec: TensorSpec, shape: tuple[int, ...]) -> bytes:
    if spec.datatype is DataType.BYTES:
        return join_elements(_encode_text(each, spec.name) for each in flat)
    if spec.datatype in _ROUNDED:
        wide = pack_data(flat, DataType.FP64, shape, spec.name, spec.name)
        return pack_floats(np.frombuffer(wide, "<f8"), spec.datatype, spec.name)
    return pack_data(flat, spec.datatype, shape, spec.name, spec.name)


def _encode_text(value: object, owner: str) -> bytes:
    if isinstance(value, str):
        try:
            return value.encode("utf-8")
        except UnicodeEncodeError:
            raise RequestError(f"{owner}: holds a string with half a surrogate pair, which is no text") from None
    if isinstance(value, dict):
        return _decode_base64(value, owner)
    raise RequestError(
        f"{owner}: JSON Value: {_show(value)} Type: {_JSON_TYPES[type(value)]} is not of expected type: string"
    )


def _decode_base64(value: Mapping[str, Any], owner: str) -> bytes:
    if not _is_base64(value):
        raise RequestError(f"{owner}: JSON Value: {_show(value)} not formatted correctly for base64 data")
    text: str = value[_B64]
    try:
        return base64.b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{owner}: Unable to base64 decode") from None


def _fill_example(value: object, example: core_pb2.Example) -> None:
    if type(value) is not dict:
        raise RequestError(f"Example must be JSON object but got JSON {_JSON_TYPES[type(value)]}")
    for name, content in value.items():
        try:
            feature = example.features.feature[name]
        except UnicodeEncodeError:
            raise RequestError(f"Feature: {_show(name)} holds half a surrogate pair, which is no text") from None
        _fill_feature(content if type(content) is list else [content], name, feature)


def _fill_feature(values: list[Any], name: str, feature: core_pb2.Feature) -> None:
    """Adds ``values`` to a feature, whose type the first of them decides; whole numbers among others are floats."""
    if float in map(type, values):
        values = [float(value) if type(value) is int and value in _INT64 else value for value in values]
    for value in values:
        kind, element = _read_feature(value, name)
        if feature.WhichOneof("kind") not in (None, kind):
            expected = str(feature.WhichOneof("kind")).removesuffix("_list")
            raise RequestError(f"Unexpected element type in feature: {name} expecting type: {expected}")
        getattr(feature, kind).value.append(element)


def _read_feature(value: object, name: str) -> tuple[str, Any]:
    owner = f"Feature: {name}"
    if isinstance(value, str) or _is_base64(value):
        return "bytes_list", _encode_text(value, owner)
    if isinstance(value, int):
        if value not in _INT64:
            raise RequestError(f"{owner} has uint64_t element. Only int64_t is supported.")
        return "int64_list", int(value)
    if isinstance(value, float):
        return "float_list", value
    raise RequestError(f"{owner} has element with unexpected JSON type: {_JSON_TYPES[type(value)]}")


def _is_names(value: object) -> bool:
    """Whether it is an object of named values."""
    return isinstance(value, dict) and not _is_base64(value)


def _is_base64(value: object) -> bool:
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get(_B64), str)


def _show(value: object) -> str:
    """The beginning of ``value`` as JSON."""
    return "".join(islice(json.JSONEncoder().iterencode(value), _MOST_CHARACTERS))[:_MOST_CHARACTERS]
