"""The documents of the generate extension: flat JSON objects whose keys are a model's tensors, or else parameters.

Source: server/docs/protocol/extension_generate.md; how values get a shape, server/src/http_server.cc
(``ExactMappingInput``).
"""

from __future__ import annotations

import json
from math import prod
from typing import Any

from aiorch_server.errors import PayloadTooLarge, RequestError
from aiorch_server.frontends.rest.infer_json import MAX_ELEMENTS, check_text, parse_document
from aiorch_server.frontends.rest.tensor_json import name_json_type, pack_data, render_data
from aiorch_server.types import (
    DataType,
    InferenceRequest,
    InferenceResponse,
    ModelMetadata,
    Parameter,
    Tensor,
    TensorMetadata,
)

_NESTED = "parameters"
_RESERVED_PREFIX = "triton_"
_PARAMETERS = (bool, int, float, str)


def parse_generate(body: bytes, model: ModelMetadata, version: str, max_json_bytes: int) -> InferenceRequest:
    """The request in ``body``; RequestError says where it is wrong, PayloadTooLarge.

    ``id`` is the request's; the members of ``parameters`` count like those beside it.
    """
    document = parse_document(body, max_json_bytes)
    specs = {spec.name: spec for spec in model.inputs}
    members = dict(document)
    request_id = members.pop("id", "") if "id" not in specs else ""
    if type(request_id) is not str:
        raise RequestError(f"id: must be a string, but is {name_json_type(request_id)}")
    if _NESTED in members:
        if _NESTED in specs:
            raise RequestError(f"Keyword '{_NESTED}' for nested schema also given as input tensor name")
        nested = members.pop(_NESTED)
        if type(nested) is not dict:
            raise RequestError(f"Expected JSON object for keyword: '{_NESTED}', but it is {name_json_type(nested)}")
        for key in nested.keys() & members.keys():
            raise RequestError(f"'{key}' is given twice, beside '{_NESTED}' and in it")
        members |= nested
    if len(members) > MAX_ELEMENTS:
        raise PayloadTooLarge(f"the request has {len(members)} members, expected at most {MAX_ELEMENTS}")
    inputs: list[Tensor] = []
    parameters: dict[str, Parameter] = {}
    for key, value in members.items():
        check_text(key, "a key of the request")
        if key in specs:
            inputs.append(_make_tensor(specs[key], value))
        elif type(value) in _PARAMETERS:
            parameters[key] = check_text(value, key) if type(value) is str else value
        else:
            raise RequestError(
                f"{key}: must be a boolean, number or string, because it is no input of model '{model.name}', but is "
                f"{name_json_type(value)}"
            )
    return InferenceRequest(model.name, version, inputs, id=check_text(request_id, "id"), parameters=parameters)


def render_generate(response: InferenceResponse) -> bytes:
    """The answer's document: parameters and outputs by name, an output of one element without an array.

    Raises RequestError where JSON cannot hold an output. May run on any thread.
    """
    members: dict[str, str] = {"id": _dump(response.id)} if response.id else {}
    members["model_name"] = _dump(response.model_name)
    members["model_version"] = _dump(response.model_version)
    for name, value in response.parameters.items():
        if not name.startswith(_RESERVED_PREFIX):
            members[name] = _dump(value)
    for tensor in response.outputs:
        text = render_data(tensor)
        members[tensor.name] = text if prod(tensor.shape) == 1 else f"[{text}]"
    return ("{" + ",".join(f"{_dump(name)}:{text}" for name, text in members.items()) + "}").encode("ascii")


def _make_tensor(spec: TensorMetadata, value: Any) -> Tensor:
    data = value if type(value) is list else [value]
    shape = _spread(spec, len(data))
    packed = pack_data(data, DataType(spec.datatype), shape, spec.name, spec.name)
    return Tensor(spec.name, spec.datatype, shape, packed)


def _spread(spec: TensorMetadata, count: int) -> tuple[int, ...]:
    """A shape for ``count`` elements: fixed sizes stay, the last of any size takes what is left, the others are 1."""
    fixed = prod(size for size in spec.shape if size >= 0)
    rest, odd = divmod(count, fixed) if fixed else (0, count)
    shape = list(spec.shape)
    for index in reversed(range(len(shape))):
        if shape[index] < 0:
            shape[index], rest = rest, 1
    if odd or rest != 1:
        raise RequestError(
            f"The schema can not convert input '{spec.name}' to tensor with proper shape: {count} elements do not fit "
            f"into {list(spec.shape)}"
        )
    return tuple(shape)


def _dump(value: object) -> str:
    return json.dumps(value)
