"""Protobuf messages of the V2 service to neutral values and back.

Only form is checked here, in Triton's words where its clients know them; whether a request fits a model is the data
plane's to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from aiorch_proto.v2 import inference_pb2, model_config_pb2
from google.protobuf.message import DecodeError, Message

from aiorch_server.errors import PayloadTooLarge, RequestError
from aiorch_server.types import (
    BatchStatistics,
    DataType,
    Duration,
    InferenceRequest,
    InferenceResponse,
    ModelIndexEntry,
    ModelMetadata,
    ModelStatistics,
    Parameter,
    RequestedOutput,
    ResponseStatistics,
    ServerMetadata,
    Tensor,
    TensorMetadata,
)

#: Bound of tensors, parameters and dimensions of a message; each costs Python time, and no model has as many.
MAX_ELEMENTS: Final = 1024
#: Elements of typed contents taken in one step, between two chances for other threads to run (about 2 ms).
_CHUNK: Final = 1 << 14

_INT = ("int_contents", np.dtype("<i4"))
_UINT = ("uint_contents", np.dtype("<u4"))
# Which list of InferTensorContents carries a datatype, and with which element type; FP16 and BF16 have none.
_CONTENTS: Final[dict[DataType, tuple[str, np.dtype[np.generic]]]] = {
    DataType.BOOL: ("bool_contents", np.dtype("?")),
    DataType.UINT8: _UINT,
    DataType.UINT16: _UINT,
    DataType.UINT32: _UINT,
    DataType.UINT64: ("uint64_contents", np.dtype("<u8")),
    DataType.INT8: _INT,
    DataType.INT16: _INT,
    DataType.INT32: _INT,
    DataType.INT64: ("int64_contents", np.dtype("<i8")),
    DataType.FP32: ("fp32_contents", np.dtype("<f4")),
    DataType.FP64: ("fp64_contents", np.dtype("<f8")),
    DataType.BYTES: ("bytes_contents", np.dtype("O")),
}


def parse_message(message_class: Any, data: bytes) -> Any:
    """A message of ``message_class`` read from ``data``; RequestError if the bytes are none."""
    try:
        return message_class.FromString(data)
    except DecodeError:
        name = message_class.DESCRIPTOR.name
        raise RequestError(f"the {len(data)} bytes of the request are not a valid {name} message") from None


# ------------------------------------------------------------------------------------------------------- inference


def count_contents(message: inference_pb2.ModelInferRequest) -> int:
    """The number of elements of all typed contents; ``ByteSize`` would take longer than reading the message did."""
    inputs = message.inputs if len(message.inputs) <= MAX_ELEMENTS else ()
    return sum(
        len(values) for tensor in inputs if tensor.HasField("contents") for _, values in tensor.contents.ListFields()
    )


def decode_infer_request(message: inference_pb2.ModelInferRequest) -> InferenceRequest:
    """The neutral request in ``message``; typed contents become raw bytes.

    Inputs in shared memory (parameter ``shared_memory_region``) have ``data`` None and take no entry of
    ``raw_input_contents``. Raises RequestError for contents that are missing, double, surplus or of the wrong type.
    """
    model = message.model_name
    owner = f"the request for model '{model}'"
    for label, elements in (
        ("inputs", message.inputs),
        ("outputs", message.outputs),
        ("raw_input_contents", message.raw_input_contents),
    ):
        _check_count(len(elements), label, owner)
    raw = message.raw_input_contents
    n_used = 0
    inputs = []
    for tensor in message.inputs:
        name = tensor.name
        parameters = decode_parameters(tensor.parameters, f"input '{name}' for model '{model}'")
        _check_count(len(tensor.shape), f"dimensions of input '{name}'", owner)
        data: bytes | None = None
        if "shared_memory_region" in parameters:
            if tensor.HasField("contents"):
                raise RequestError(
                    f"unexpected 'content' provided when using shared memory for input tensor '{name}' "
                    f"for model '{model}'"
                )
        elif tensor.HasField("contents"):
            if raw:
                raise RequestError(
                    f"contents field must not be specified when using raw_input_contents for '{name}' "
                    f"for model '{model}'"
                )
            data = _flatten_contents(tensor, model)
        elif n_used < len(raw):
            data = raw[n_used]
            n_used += 1
        else:
            raise RequestError(f"unable to find data for input tensor '{name}' for model '{model}' in request.")
        inputs.append(Tensor(name, tensor.datatype, tuple(tensor.shape), data, parameters))
    if n_used < len(raw):
        raise RequestError(
            f"expected {n_used} raw_input_contents but got {len(raw)} for model '{model}': "
            "one for each input that is not in shared memory"
        )
    return InferenceRequest(
        model_name=model,
        model_version=message.model_version,
        inputs=inputs,
        outputs=[
            RequestedOutput(
                output.name, decode_parameters(output.parameters, f"output '{output.name}' for model '{model}'")
            )
            for output in message.outputs
        ],
        id=message.id,
        parameters=decode_parameters(message.parameters, owner),
    )


def decode_parameters(parameters: Mapping[str, Any], owner: str) -> dict[str, Parameter]:
    """The values of a parameter map; RequestError for one whose value was never set."""
    _check_count(len(parameters), "parameters", owner)
    values: dict[str, Parameter] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise RequestError(
                f"parameter '{name}' of {owner} has no value, expected one of bool_param, int64_param, string_param, "
                "double_param, uint64_param"
            )
        values[name] = getattr(parameter, choice)
    return values


def encode_infer_response(response: InferenceResponse) -> inference_pb2.ModelInferResponse:
    """The message for ``response``; all outputs are raw, one entry for each in order, which is what clients read."""
    message = inference_pb2.ModelInferResponse(
        model_name=response.model_name, model_version=response.model_version, id=response.id
    )
    encode_parameters(response.parameters, message.parameters)
    for output in response.outputs:
        tensor = message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        encode_parameters(output.parameters, tensor.parameters)
        # None stands for an output that went to shared memory: an empty entry keeps the order.
        message.raw_output_contents.append(b"" if output.data is None else bytes(output.data))
    return message


def encode_parameters(values: Mapping[str, Parameter], target: Any) -> None:
    """Writes ``values`` into the parameter map ``target``; whole numbers beyond int64 as uint64."""
    for name, value in values.items():
        if isinstance(value, bool):
            target[name].bool_param = value
        elif isinstance(value, int):
            if value < 1 << 63:
                target[name].int64_param = value
            else:
                target[name].uint64_param = value
        elif isinstance(value, float):
            target[name].double_param = value
        else:
            target[name].string_param = value


def _flatten_contents(tensor: Any, model: str) -> bytes:
    name, contents = tensor.name, tensor.contents
    try:
        datatype = DataType(tensor.datatype)
    except ValueError:
        known = ", ".join(member.value for member in DataType)
        raise RequestError(
            f"inference input '{name}' for model '{model}' has unknown data-type '{tensor.datatype}', expected one of "
            f"{known}"
        ) from None
    if datatype not in _CONTENTS:
        raise RequestError(
            f"data-type '{datatype.value}' of inference input '{name}' for model '{model}' has no typed contents, "
            "use raw_input_contents"
        )
    field, dtype = _CONTENTS[datatype]
    for other, _ in contents.ListFields():
        if other.name != field:
            raise RequestError(
                f"unexpected explicit tensor data for input tensor '{name}' for model '{model}': data-type "
                f"'{datatype.value}' is expected in {field}, got {other.name}"
            )
    values = getattr(contents, field)
    if datatype is DataType.BYTES:
        return b"".join(part for value in values for part in (len(value).to_bytes(4, "little"), value))
    array = np.empty(len(values), dtype)
    for start in range(0, len(values), _CHUNK):
        array[start : start + _CHUNK] = values[start : start + _CHUNK]
    if datatype.itemsize != dtype.itemsize:
        array = _narrow(array, datatype, name, model)
    return array.tobytes()


def _narrow(array: Any, datatype: DataType, name: str, model: str) -> Any:
    narrow = datatype.numpy.newbyteorder("<")
    limits = np.iinfo(narrow)  # type: ignore[type-var]
    outside = array[(array < limits.min) | (array > limits.max)]
    if outside.size:
        raise RequestError(
            f"value {outside[0]} of input '{name}' for model '{model}' does not fit data-type '{datatype.value}', "
            f"expected {limits.min} to {limits.max}"
        )
    return array.astype(narrow)


def _check_count(count: int, what: str, owner: str) -> None:
    if count > MAX_ELEMENTS:
        raise PayloadTooLarge(f"{count} {what} in {owner}, expected at most {MAX_ELEMENTS}")


# ------------------------------------------------------------------------------------------------------ repository


def decode_load_parameters(parameters: Mapping[str, Any], model: str) -> tuple[str | None, dict[str, bytes]]:
    """The JSON configuration and the files (``<version>/<name>`` -> content) of a RepositoryModelLoad.

    Raises RequestError for unknown parameters, values of the wrong type, and files without a configuration.
    """
    config: str | None = None
    files: dict[str, bytes] = {}
    for name, parameter in parameters.items():
        if name == "config":
            config = _take(parameter, "string_param", name, "load")
        elif name.startswith("file:"):
            files[name.removeprefix("file:")] = _take(parameter, "bytes_param", name, "load")
        else:
            raise RequestError(f"unrecognized load parameter '{name}', expected 'config' or 'file:<version>/<name>'")
    if files and config is None:
        raise RequestError(
            f"load of model '{model}' with 'file:' parameters needs the parameter 'config' as well, because they stand "
            "in for the whole model"
        )
    return config, files


def decode_unload_parameters(parameters: Mapping[str, Any]) -> bool:
    """Whether models that are built on the named one go with it; RequestError for anything else."""
    unload_dependents = False
    for name, parameter in parameters.items():
        if name != "unload_dependents":
            raise RequestError(f"unrecognized unload parameter '{name}', expected 'unload_dependents'")
        unload_dependents = _take(parameter, "bool_param", name, "unload")
    return unload_dependents


def _take(parameter: Any, field: str, name: str, action: str) -> Any:
    choice = parameter.WhichOneof("parameter_choice")
    if choice != field:
        raise RequestError(f"invalid value type for {action} parameter '{name}', expected {field}, got {choice}")
    return getattr(parameter, field)


def encode_index(entries: Iterable[ModelIndexEntry]) -> inference_pb2.RepositoryIndexResponse:
    """The message for the rows of the repository index."""
    message = inference_pb2.RepositoryIndexResponse()
    for entry in entries:
        message.models.add(name=entry.name, version=entry.version, state=entry.state.value, reason=entry.reason)
    return message


# --------------------------------------------------------------------------------- metadata, configuration, counts


def encode_server_metadata(metadata: ServerMetadata) -> inference_pb2.ServerMetadataResponse:
    """The message for the server's metadata."""
    return inference_pb2.ServerMetadataResponse(
        name=metadata.name, version=metadata.version, extensions=metadata.extensions
    )


def encode_model_metadata(metadata: ModelMetadata) -> inference_pb2.ModelMetadataResponse:
    """The message for a model's metadata."""

    def encode(tensor: TensorMetadata) -> Message:
        return inference_pb2.ModelMetadataResponse.TensorMetadata(
            name=tensor.name, datatype=tensor.datatype, shape=tensor.shape
        )

    return inference_pb2.ModelMetadataResponse(
        name=metadata.name,
        versions=metadata.versions,
        platform=metadata.platform,
        inputs=map(encode, metadata.inputs),
        outputs=map(encode, metadata.outputs),
    )


def encode_model_config(config: Mapping[str, Any]) -> inference_pb2.ModelConfigResponse:
    """The message for a configuration in protobuf's JSON form with the field names of the .proto file."""
    from google.protobuf import json_format  # few ask

    return inference_pb2.ModelConfigResponse(config=json_format.ParseDict(config, model_config_pb2.ModelConfig()))


def encode_statistics(statistics: Iterable[ModelStatistics]) -> inference_pb2.ModelStatisticsResponse:
    """The message for the statistics of model versions."""
    return inference_pb2.ModelStatisticsResponse(model_stats=map(_encode_model_statistics, statistics))


def _encode_model_statistics(statistics: ModelStatistics) -> Message:
    return inference_pb2.ModelStatistics(
        name=statistics.name,
        version=statistics.version,
        last_inference=statistics.last_inference_ms,
        inference_count=statistics.inference_count,
        execution_count=statistics.execution_count,
        inference_stats=inference_pb2.InferStatistics(
            success=_encode_duration(statistics.success),
            fail=_encode_duration(statistics.fail),
            queue=_encode_duration(statistics.queue),
            compute_input=_encode_duration(statistics.compute_input),
            compute_infer=_encode_duration(statistics.compute_infer),
            compute_output=_encode_duration(statistics.compute_output),
            cache_hit=_encode_duration(statistics.cache_hit),
            cache_miss=_encode_duration(statistics.cache_miss),
        ),
        batch_stats=map(_encode_batch_statistics, statistics.batches),
        response_stats={place: _encode_responses(each) for place, each in statistics.responses.items()},
    )


def _encode_responses(responses: ResponseStatistics) -> Message:
    return inference_pb2.InferResponseStatistics(
        **{each.name: _encode_duration(getattr(responses, each.name)) for each in dataclasses.fields(responses)}
    )


def _encode_batch_statistics(batch: BatchStatistics) -> Message:
    return inference_pb2.InferBatchStatistics(
        batch_size=batch.batch_size,
        compute_input=_encode_duration(batch.compute_input),
        compute_infer=_encode_duration(batch.compute_infer),
        compute_output=_encode_duration(batch.compute_output),
    )


def _encode_duration(duration: Duration) -> Message:
    return inference_pb2.StatisticDuration(count=duration.count, ns=duration.ns)
