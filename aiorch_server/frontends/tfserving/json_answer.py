"""Outputs, results and states as the documents that TensorFlow Serving's clients read.

Texts follow tensorflow_serving/util/json_tensor.cc. Numbers of FP32 are written with as many digits as tell them
apart (0.2, not 0.20000000298); ``NaN``, ``Infinity`` and ``-Infinity`` stand bare, as in TensorFlow Serving.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from aiorch_proto.tfserving import serving_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from aiorch_server.errors import RequestError
from aiorch_server.frontends.tfserving.elements import Array, read_elements, split_elements
from aiorch_server.frontends.tfserving.information import encode_signatures
from aiorch_server.frontends.tfserving.models import Served
from aiorch_server.types import DataType, Tensor

#: Outputs of strings with such a name are written as base64: nothing else tells bytes from text.
_BYTES_SUFFIX: Final = "_bytes"
#: Elements written in one step, between two chances for other threads to run (about 4 ms).
_CHUNK: Final = 8192


def render_predict(outputs: Sequence[Tensor], *, is_by_rows: bool) -> bytes:
    """The document of :predict; may run on any thread. RequestError for what cannot be told by rows, or in JSON."""
    if not outputs:
        raise RequestError("Cannot convert empty tensor map to JSON")
    if is_by_rows:
        _check_rows(outputs)
    arrays = {output.name: _list_values(output) for output in outputs}
    if len(arrays) == 1:
        (text,) = map(_render, arrays.values())
    elif is_by_rows:
        rows = range(outputs[0].shape[0])
        text = "[" + ",".join(_render_object({n: array[row] for n, array in arrays.items()}) for row in rows) + "]"
    else:
        text = _render_object(arrays)
    return f'{{"{"predictions" if is_by_rows else "outputs"}":{text}}}'.encode("ascii")


def render_classes(result: serving_pb2.ClassificationResult) -> bytes:
    """The document of :classify: for each example a list of labels with their scores."""
    rows = []
    for classes in (row.classes for row in result.classifications):
        scores = _list(np.array([each.score for each in classes], np.float32))
        rows.append([[each.label, score] for each, score in zip(classes, scores, strict=True)])
    return _dump({"results": rows})


def render_values(result: serving_pb2.RegressionResult) -> bytes:
    """The document of :regress: a value for each example."""
    return _dump({"results": _list(np.array([each.value for each in result.regressions], np.float32))})


def render_status(response: serving_pb2.GetModelStatusResponse) -> bytes:
    """The document of a model's status."""
    return _dump(_show(response))


def render_metadata(model: Served) -> bytes:
    """The document of a model's metadata."""
    spec = {"name": model.name, "signature_name": "", "version": str(model.version)}
    return _dump({"model_spec": spec, "metadata": {"signature_def": _show(encode_signatures(model.signature))}})


def _check_rows(outputs: Sequence[Tensor]) -> None:
    rows: int | None = None
    for output in outputs:
        if not output.shape:
            raise RequestError(f"Tensor name: {output.name} has no shape information ")
        if rows is not None and output.shape[0] != rows:
            raise RequestError(
                f"Tensor name: {output.name} has inconsistent batch size: {output.shape[0]} expecting: {rows}"
            )
        rows = output.shape[0]


def _list_values(output: Tensor) -> Array:
    """The elements as JSON writes them, in their shape."""
    datatype = DataType(output.datatype)
    if datatype is DataType.BYTES:
        elements = split_elements(output)
        values = np.empty(len(elements), np.object_)
        is_text = not output.name.endswith(_BYTES_SUFFIX)
        values[:] = [_decode(each, output.name) if is_text else _encode(each) for each in elements]
        return values.reshape(output.shape)
    array = read_elements(output)
    return array.astype(np.float64) if datatype in (DataType.FP16, DataType.BF16) else array


def _decode(element: bytes, name: str) -> str:
    try:
        return element.decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(
            f"output '{name}' holds bytes that are not UTF-8 text; outputs whose names end in '{_BYTES_SUFFIX}' are "
            "written as base64"
        ) from None


def _encode(element: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(element).decode("ascii")}


def _render_object(values: dict[str, Array]) -> str:
    return "{" + ",".join(f"{json.dumps(name)}:{_render(value)}" for name, value in values.items()) + "}"


def _render(values: Any) -> str:
    """An array, or an element of one, as JSON."""
    if not isinstance(values, np.ndarray):
        return json.dumps(_list(np.asarray(values)) if isinstance(values, np.generic) else values)
    if values.size <= _CHUNK:
        return json.dumps(_list(values), separators=(",", ":"))
    if values.ndim == 1:
        parts = (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))
        return "[" + ",".join(json.dumps(_list(part), separators=(",", ":"))[1:-1] for part in parts) + "]"
    return "[" + ",".join(map(_render, values)) + "]"


def _list(values: Array) -> Any:
    if values.dtype != np.float32:
        return values.tolist()
    shortest = np.fromiter(map(float, map(str, values.reshape(-1))), np.float64, values.size)
    return shortest.reshape(values.shape).tolist()


def _show(message: Message) -> dict[str, Any]:
    shown: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return shown


def _dump(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode("ascii")
