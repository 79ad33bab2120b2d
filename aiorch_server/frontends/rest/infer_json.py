"""The documents of POST .../infer: a body to an ``InferenceRequest``, an ``InferenceResponse`` to a body.

A body is a JSON document, and after it, when the header ``Inference-Header-Content-Length`` says where the document
ends, the raw bytes of those tensors that have ``binary_data_size`` instead of ``data``, in their order.
Source: the V2 protocol's required API and its extensions for binary tensor data and parameters.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

from aiorch_server.errors import AiorchError, PayloadTooLarge, RequestError, UnsupportedRequest
from aiorch_server.frontends.rest.number_text import PIECE_BYTES, NotPlain, NumberText, cut_numbers, put_numbers
from aiorch_server.frontends.rest.tensor_json import name_json_type, pack_data, render_data
from aiorch_server.types import DataType, InferenceRequest, InferenceResponse, Parameter, RequestedOutput, Tensor

_T = TypeVar("_T")
_Items = TypeVar("_Items", list[Any], dict[str, Any])
#: Bound of tensors, parameters and dimensions of a request; each costs Python time, and no model has as many.
MAX_ELEMENTS = 1024
_INT64_MAX = 2**63 - 1
_UINT64_MAX = 2**64 - 1
_DATATYPES = {member.value: member for member in DataType}
_EXPECTED = {str: "a string", list: "an array", dict: "an object", int: "an integer", bool: "a boolean"}


@dataclass(frozen=True, slots=True)
class InferCall:
    """A parsed request, and which of the answer's outputs shall be binary."""

    request: InferenceRequest
    is_binary_by_default: bool
    is_binary: Mapping[str, bool]


def parse_document(body: bytes | memoryview, max_json_bytes: int) -> dict[str, Any]:
    """``body`` as one JSON object in UTF-8; RequestError with the place of the first fault, PayloadTooLarge."""
    if len(body) > max_json_bytes:
        raise PayloadTooLarge(
            f"the request's JSON of {len(body)} bytes exceeds the maximum allowed size of {max_json_bytes} bytes; "
            "send large tensors in the binary data format"
        )
    try:
        document = _decode(body)
    except UnicodeDecodeError as error:
        raise RequestError(f"the request is not valid JSON: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the request is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except RecursionError:
        raise RequestError("the request is not valid JSON: it is nested too deeply") from None
    except ValueError:
        raise RequestError("the request is not valid JSON: it holds a number with too many digits") from None
    if type(document) is not dict:
        raise RequestError(f"the request must be a JSON object, but is {name_json_type(document)}")
    return document


def _decode(body: bytes | memoryview) -> Any:
    """Like ``json.loads``, whose errors it raises, at six times its speed."""
    import msgspec  # with the first document: a server asked only over gRPC never needs it

    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        # What is wrong and where, bare NaN and Infinity, numbers beyond FP64 and halves of surrogate pairs.
        return json.loads(str(body, "utf-8"))


def parse_infer(
    body: bytes, header_length: str | None, model_name: str, model_version: str, max_json_bytes: int
) -> InferCall:
    """The request in ``body``; its binary tensors are views on it. RequestError says where it is wrong."""
    json_bytes = _parse_header_length(header_length, len(body))
    view = memoryview(body)
    if 2 * PIECE_BYTES < json_bytes <= max_json_bytes:
        with contextlib.suppress(NotPlain, AiorchError):
            text, numbers = cut_numbers(view[:json_bytes])
            document = parse_document(text, max_json_bytes)
            put_numbers(document, numbers)
            return _read_infer(document, view, json_bytes, model_name, model_version)
    document = parse_document(view[:json_bytes], max_json_bytes)
    return _read_infer(document, view, json_bytes, model_name, model_version)


def _read_infer(
    document: dict[str, Any], body: memoryview, json_bytes: int, model_name: str, model_version: str
) -> InferCall:
    parameters = _parse_parameters(document, "parameters")
    is_binary_by_default = _pop_flag(parameters, "binary_data_output", "parameters")
    inputs: list[Tensor] = []
    offset = json_bytes
    for index, item in enumerate(_check_count(_require(document, "inputs", list, ""), "inputs")):
        tensor, used_bytes = _parse_input(item, f"inputs[{index}]", body[offset:], model_name)
        offset += used_bytes
        inputs.append(tensor)
    if offset != len(body):
        raise RequestError(
            f"unexpected additional input data for model '{model_name}': "
            f"{len(body) - offset} bytes after the last binary input"
        )
    outputs: list[RequestedOutput] = []
    is_binary: dict[str, bool] = {}
    for index, item in enumerate(_check_count(_find(document, "outputs", list, "") or [], "outputs")):
        path = f"outputs[{index}]"
        name = check_text(_require(_check(item, dict, path), "name", str, path), f"{path}.name")
        options = _parse_parameters(item, f"{path}.parameters")
        if "shared_memory_region" in options and options.get("binary_data") is True:
            raise RequestError("Output can't set both 'shared_memory_region' and 'binary_data'")
        is_binary[name] = _pop_flag(options, "binary_data", f"{path}.parameters", is_binary_by_default)
        outputs.append(RequestedOutput(name, options))
    request_id = check_text(_find(document, "id", str, "") or "", "id")
    request = InferenceRequest(model_name, model_version, inputs, outputs, request_id, parameters)
    return InferCall(request, is_binary_by_default, is_binary)


def measure_json(body: bytes, header_length: str | None) -> int:
    """How many bytes of ``body`` are JSON, all of them if ``header_length`` does not tell."""
    if header_length is None or len(header_length) > 18 or not (header_length.isascii() and header_length.isdigit()):
        return len(body)
    return min(int(header_length), len(body))


def count_json_bytes(response: InferenceResponse, call: InferCall) -> int:
    """How many bytes of tensors ``render_infer`` writes out as JSON."""
    return sum(len(tensor.data or b"") for tensor in response.outputs if not _is_binary(tensor, call))


def _is_binary(tensor: Tensor, call: InferCall) -> bool:
    return call.is_binary.get(tensor.name, call.is_binary_by_default)


def render_infer(response: InferenceResponse, call: InferCall) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON part if binary tensors follow it (else None)."""
    outputs: list[str] = []
    binary: list[bytes | memoryview] = []
    for tensor in response.outputs:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if tensor.data is None:  # shared memory: for Triton's C++ client parameters mean binary data
            outputs.append(_dump(entry))
            continue
        if tensor.parameters:
            entry["parameters"] = dict(tensor.parameters)
        if _is_binary(tensor, call):
            data = tensor.data
            size = data.nbytes if isinstance(data, memoryview) else len(data)
            entry.setdefault("parameters", {})["binary_data_size"] = size
            if size:
                binary.append(data)
            outputs.append(_dump(entry))
        else:
            outputs.append(f'{_dump(entry)[:-1]},"data":[{render_data(tensor)}]}}')
    document: dict[str, Any] = {"id": response.id} if response.id else {}
    document["model_name"] = response.model_name
    document["model_version"] = response.model_version
    if response.parameters:
        document["parameters"] = dict(response.parameters)
    text = f'{_dump(document)[:-1]},"outputs":[{",".join(outputs)}]}}'.encode("ascii")
    if not binary:
        return text, None
    return b"".join((text, *binary)), len(text)


def _dump(document: dict[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"))


def _parse_header_length(header_length: str | None, body_bytes: int) -> int:
    if header_length is None:
        return body_bytes
    if not (header_length.isascii() and header_length.isdigit()):
        raise RequestError(f"unable to parse Inference-Header-Content-Length, got: {header_length[:40]}")
    if len(header_length) > 18 or int(header_length) > body_bytes:
        raise RequestError(
            f"inference header size should be in range (0, {body_bytes}), got: {header_length[:40]}; "
            "Inference-Header-Content-Length reaches beyond the body"
        )
    length = int(header_length)
    if length == 0:
        raise UnsupportedRequest(
            "raw binary requests (Inference-Header-Content-Length: 0) are not supported; "
            "send the JSON part with name, datatype, shape and binary_data_size of the input"
        )
    return length


def _parse_input(item: object, path: str, rest: memoryview, model_name: str) -> tuple[Tensor, int]:
    """One input, and how many bytes of ``rest`` belong to it."""
    document = _check(item, dict, path)
    name = check_text(_require(document, "name", str, path), f"{path}.name")
    spelling = _require(document, "datatype", str, path)
    datatype = _DATATYPES.get(spelling)
    if datatype is None:
        known = ", ".join(_DATATYPES)
        raise RequestError(f"{path}.datatype: {json.dumps(spelling[:40])} is no datatype; expected one of {known}")
    shape = _parse_shape(_require(document, "shape", list, path), f"{path}.shape")
    parameters = _parse_parameters(document, f"{path}.parameters")
    _check_one_source(document, parameters, path)
    if "data" in document:
        data, place = document["data"], f"{path}.data"
        if isinstance(data, NumberText):
            packed = data.pack(datatype, prod(shape), name, place)
        else:
            packed = pack_data(_check(data, list, place), datatype, shape, name, place)
        return Tensor(name, spelling, shape, packed, parameters), 0
    if "binary_data_size" not in parameters:
        return Tensor(name, spelling, shape, None, parameters), 0
    size = parameters.pop("binary_data_size")
    if type(size) is not int or size < 0:
        raise RequestError(f"{path}.parameters.binary_data_size: must be a number of bytes, 0 or more")
    if size > len(rest):
        raise RequestError(
            f"{path}: unexpected size for input '{name}', expecting {size - len(rest)} additional bytes "
            f"for model '{model_name}'"
        )
    return Tensor(name, spelling, shape, rest[:size], parameters), size


def _check_one_source(document: Mapping[str, Any], parameters: Mapping[str, Parameter], path: str) -> None:
    sources = [
        source
        for source, is_given in (
            ("data", "data" in document),
            ("binary_data_size", "binary_data_size" in parameters),
            ("shared_memory_region", "shared_memory_region" in parameters),
        )
        if is_given
    ]
    if len(sources) != 1:
        found = "set " + " ".join(f"'{source}'" for source in sources) if sources else "no field is set"
        raise RequestError(
            f"{path}: Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
            f"'shared_memory_region' in 'parameters'. But {found}"
        )


def _parse_shape(items: list[Any], path: str) -> tuple[int, ...]:
    for index, size in enumerate(_check_count(items, path)):
        if type(size) is not int:
            raise RequestError(f"{path}[{index}]: must be an integer, but is {name_json_type(size)}")
        if not 0 <= size <= _INT64_MAX:
            raise RequestError(f"{path}[{index}]: must be from 0 to {_INT64_MAX}, but is {_shorten(size)}")
    if prod(items) > _INT64_MAX:
        raise RequestError(f"{path}: causes the total element count to exceed the maximum of {_INT64_MAX}")
    return tuple(items)


def _parse_parameters(document: Mapping[str, Any], path: str) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = _find(document, "parameters", dict, path.rpartition(".")[0]) or {}
    for key, value in _check_count(parameters, path).items():
        check_text(key, path)
        if type(value) is str:
            check_text(value, f"{path}.{key}")
        elif type(value) is int:
            if not -_INT64_MAX - 1 <= value <= _UINT64_MAX:
                raise RequestError(f"{path}.{key}: {_shorten(value)} does not fit into 64 bits")
        elif type(value) not in (bool, float):
            raise RequestError(f"{path}.{key}: must be a boolean, number or string, but is {name_json_type(value)}")
    return parameters


def _pop_flag(parameters: dict[str, Parameter], key: str, path: str, default: bool = False) -> bool:
    value = parameters.pop(key, default)
    if type(value) is not bool:
        raise RequestError(f"{path}.{key}: must be a boolean, but is {name_json_type(value)}")
    return value


def _find(document: Mapping[str, Any], key: str, kind: type[_T], path: str) -> _T | None:
    if key not in document:
        return None
    return _check(document[key], kind, f"{path}.{key}" if path else key)


def _require(document: Mapping[str, Any], key: str, kind: type[_T], path: str) -> _T:
    found = _find(document, key, kind, path)
    if found is None:
        raise RequestError(f"{path}.{key}: is missing" if path else f"{key}: is missing")
    return found


def _check(value: object, kind: type[_T], path: str) -> _T:
    if type(value) is not kind:
        raise RequestError(f"{path}: must be {_EXPECTED[kind]}, but is {name_json_type(value)}")
    return value


def _check_count(items: _Items, path: str) -> _Items:
    if len(items) > MAX_ELEMENTS:
        raise PayloadTooLarge(f"{path}: has {len(items)} elements, expected at most {MAX_ELEMENTS}")
    return items


def check_text(value: str, path: str) -> str:
    """``value`` if UTF-8 can hold it, else RequestError led by ``path``."""
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RequestError(f"{path}: holds half a surrogate pair, which is no text") from None
    return value


def _shorten(value: int) -> str:
    """``value`` in digits as far as a reader needs them: clients can send thousands."""
    return str(value) if -_UINT64_MAX <= value <= _UINT64_MAX else f"a number of {value.bit_length()} bits"
