"""Protobuf messages to and from the SDK's values; checks a request against the model's metadata. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import grpc
import numpy as np
from aiorch_proto.v2 import inference_pb2 as pb
from google.protobuf.descriptor import FieldDescriptor

from aiorch_client.datatypes import Array, as_array, decode, encode, get_dtype, objects
from aiorch_client.errors import ClientError, RequestError, ServerError
from aiorch_client.types import (
    BatchStatistics,
    Duration,
    InferRequest,
    InferResult,
    ModelMetadata,
    ModelStatistics,
    Parameter,
    TensorMetadata,
)

_INT64_MIN, _INT64_MAX, _UINT64_MAX = -(2**63), 2**63 - 1, 2**64 - 1
#: Which repeated field of InferTensorContents carries a datatype; FP16 and BF16 travel raw only.
_TYPED_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def check_version(version: str) -> None:
    """RequestError unless ``version`` is a whole number above 0 or empty."""
    if version and not (version.isascii() and version.isdigit() and int(version) > 0):
        raise RequestError(f"version is '{version}', expected a whole number above 0, or '' for the server's choice")


def name_inputs(request: InferRequest, metadata: ModelMetadata) -> Mapping[str, Any]:
    """The request's inputs by name; a bare array gets the name of the model's only input."""
    if isinstance(request.inputs, Mapping):
        return request.inputs
    if len(metadata.inputs) != 1:
        raise RequestError(
            f"model '{metadata.name}' has {len(metadata.inputs)} inputs ({_list(metadata.inputs)}): "
            "pass a mapping of names to arrays, not one array alone"
        )
    return {metadata.inputs[0].name: request.inputs}


def find_missing(request: InferRequest, metadata: ModelMetadata) -> list[str]:
    """Inputs in the metadata that the request lacks; the metadata does not tell which of them are optional."""
    given = name_inputs(request, metadata)
    return [tensor.name for tensor in metadata.inputs if tensor.name not in given]


def encode_infer(request: InferRequest, metadata: ModelMetadata) -> Any:
    """The ModelInferRequest for ``request`` with raw contents, checked; RequestError names what does not fit.

    Missing inputs are not looked for here (see ``find_missing``).
    """
    message = pb.ModelInferRequest(model_name=request.model, model_version=request.version, id=request.request_id)
    specs = {tensor.name: tensor for tensor in metadata.inputs}
    for name, value in name_inputs(request, metadata).items():
        if name not in specs:
            raise RequestError(f"model '{request.model}' has no input '{name}'; it takes {_list(metadata.inputs)}")
        array = _check_input(value, specs[name], request.model)
        message.inputs.add(name=name, datatype=specs[name].datatype, shape=array.shape)
        message.raw_input_contents.append(encode(array, specs[name].datatype))
    known = {tensor.name for tensor in metadata.outputs}
    for name in [request.outputs] if isinstance(request.outputs, str) else request.outputs or ():
        if name not in known:
            raise RequestError(f"model '{request.model}' has no output '{name}'; it gives {_list(metadata.outputs)}")
        message.outputs.add(name=name)
    for key, parameter in request.parameters.items():
        _set_parameter(message.parameters[key], key, parameter)
    return message


def decode_infer(message: Any) -> InferResult:
    """The answer in a ModelInferResponse; ServerError where its bytes do not fit its own shapes."""
    has_raw = len(message.raw_output_contents) > 0
    if has_raw and len(message.raw_output_contents) != len(message.outputs):
        raise _malformed(f"{len(message.outputs)} outputs with {len(message.raw_output_contents)} raw contents")
    outputs: dict[str, Array] = {}
    for index, tensor in enumerate(message.outputs):
        try:
            if has_raw:
                array = decode(message.raw_output_contents[index], tensor.datatype, tuple(tensor.shape))
            else:
                array = _decode_typed(tensor)
        except (ValueError, OverflowError, RequestError) as error:
            raise _malformed(f"output '{tensor.name}': {error}") from error
        array.flags.writeable = False
        outputs[tensor.name] = array
    return InferResult(
        model_name=message.model_name,
        model_version=message.model_version,
        outputs=outputs,
        id=message.id,
        parameters={key: _get_parameter(value) for key, value in message.parameters.items()},
    )


def decode_stream_reply(message: Any) -> InferResult | ClientError:
    """The answer in a ModelStreamInferResponse, or the error of that one request; the protocol tells no code."""
    if not message.error_message:
        return decode_infer(message.infer_response)
    return ClientError(message.error_message, code=grpc.StatusCode.UNKNOWN, request_id=message.infer_response.id)


def decode_model_metadata(message: Any) -> ModelMetadata:
    """The values of a ModelMetadataResponse."""
    return ModelMetadata(
        name=message.name,
        versions=tuple(message.versions),
        platform=message.platform,
        inputs=tuple(TensorMetadata(t.name, t.datatype, tuple(t.shape)) for t in message.inputs),
        outputs=tuple(TensorMetadata(t.name, t.datatype, tuple(t.shape)) for t in message.outputs),
    )


def decode_statistics(message: Any) -> tuple[ModelStatistics, ...]:
    """The values of a ModelStatisticsResponse."""
    return tuple(
        ModelStatistics(
            name=model.name,
            version=model.version,
            last_inference_ms=model.last_inference,
            inference_count=model.inference_count,
            execution_count=model.execution_count,
            success=_duration(model.inference_stats.success),
            fail=_duration(model.inference_stats.fail),
            queue=_duration(model.inference_stats.queue),
            compute_input=_duration(model.inference_stats.compute_input),
            compute_infer=_duration(model.inference_stats.compute_infer),
            compute_output=_duration(model.inference_stats.compute_output),
            batches=tuple(
                BatchStatistics(
                    batch_size=batch.batch_size,
                    compute_input=_duration(batch.compute_input),
                    compute_infer=_duration(batch.compute_infer),
                    compute_output=_duration(batch.compute_output),
                )
                for batch in model.batch_stats
            ),
        )
        for model in message.model_stats
    )


def to_plain(message: Any) -> dict[str, Any]:
    """The set fields of a message by their protocol names: enums by name, numbers as numbers, bytes as they are."""
    return {field.name: _plain_field(field, value) for field, value in message.ListFields()}


def _plain_field(field: FieldDescriptor, value: Any) -> Any:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        item = entry.fields_by_name["value"]
        return {key: _plain_value(item, value[key]) for key in value}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain_value(field, item) for item in value]
    return _plain_value(field, value)


def _plain_value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return to_plain(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return value if known is None else known.name
    return value


def _check_input(value: Any, spec: TensorMetadata, model: str) -> Array:
    where = f"input '{spec.name}' of model '{model}'"
    array = as_array(value, spec.datatype, where=where)
    fits = len(array.shape) == len(spec.shape) and all(
        wanted in (-1, given) for wanted, given in zip(spec.shape, array.shape, strict=True)
    )
    if fits:
        return array
    text = f"{where} has shape {list(array.shape)}, expected {list(spec.shape)}"
    if spec.shape[:1] == (-1,) and len(array.shape) == len(spec.shape) - 1:
        text += "; the first dimension is the batch: for one row pass array[None]"
    raise RequestError(text)


def _set_parameter(target: Any, key: str, value: Parameter) -> None:
    if isinstance(value, bool | np.bool_):
        target.bool_param = bool(value)
    elif isinstance(value, int | np.integer):
        if _INT64_MIN <= value <= _INT64_MAX:
            target.int64_param = int(value)
        elif value <= _UINT64_MAX and value > 0:
            target.uint64_param = int(value)
        else:
            raise RequestError(f"parameter '{key}' is {value}, which 64 bits cannot hold")
    elif isinstance(value, float | np.floating):
        target.double_param = float(value)
    elif isinstance(value, str):
        target.string_param = value
    else:
        raise RequestError(f"parameter '{key}' is a {type(value).__name__}, expected bool, int, float or str")


def _get_parameter(message: Any) -> Parameter:
    chosen = message.WhichOneof("parameter_choice")
    return "" if chosen is None else getattr(message, chosen)


def _decode_typed(tensor: Any) -> Array:
    field = _TYPED_FIELDS.get(tensor.datatype)
    if field is None:
        raise ValueError(f"{tensor.datatype} cannot travel as typed contents")
    items = getattr(tensor.contents, field)
    shape = tuple(tensor.shape)
    if field == "bytes_contents":
        return objects(items, shape)
    return np.array(items, get_dtype(tensor.datatype)).reshape(shape)


def _duration(message: Any) -> Duration:
    return Duration(count=message.count, ns=message.ns)


def _malformed(text: str) -> ServerError:
    return ServerError(f"the server's answer cannot be read: {text}", code=grpc.StatusCode.INTERNAL)


def _list(tensors: Iterable[TensorMetadata]) -> str:
    return ", ".join(f"'{t.name}' {t.datatype} {list(t.shape)}" for t in tensors) or "nothing"
