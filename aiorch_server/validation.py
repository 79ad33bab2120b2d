"""Checks a request against a model's signature and says in words what is wrong.

The compiled desk (`_core.spec.bind_request`) makes the same decisions without words; a request that it declines is
looked at here. Texts follow those that Triton's clients and tests match on, where such a text exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from aiorch_server._core import walk_elements
from aiorch_server.errors import RequestError
from aiorch_server.types import DataType, InferenceRequest, ModelSignature, SequencePlace, Tensor, TensorSpec

#: Parameters of requests that mean something; other names are the model's own business.
_ALLOWED_RESERVED = "triton_enable_empty_final_response"
_RESERVED_PREFIX = "triton_"
#: Bound of the other sizes of an empty tensor, multiplied: the compiled desk's MAX_EMPTY_ELEMENTS.
_MAX_EMPTY_ELEMENTS = 0x7FFFFFFF
_BATCH_NOTE = (
    "NOTE: this model batches (max_batch_size > 0), so each input carries the batch dimension in front of the dims "
    "of its configuration."
)


#: The longest string that names a sequence, in bytes; Triton's bound.
_MAX_CORRELATION_BYTES = 128


@dataclass(frozen=True, slots=True)
class QueueTerms:
    """How a request is to be queued: priority level (0: the default), timeout in microseconds (0: none), sequence."""

    priority: int = 0
    timeout_us: int = 0
    sequence: SequencePlace = field(default_factory=SequencePlace)


_PLAIN_TERMS = QueueTerms()


def check_request(request: InferenceRequest, model: str, signature: ModelSignature) -> QueueTerms:
    """Raises RequestError if the model cannot take ``request``; else how to queue it."""
    terms = _read_parameters(request) if request.parameters or request.sequence is not None else _PLAIN_TERMS
    given = _check_names(request.inputs, model, signature)
    rows: int | None = None
    for tensor, spec in given:
        rows = _check_tensor(tensor, spec, model, signature.max_batch_size, rows)
    if request.outputs:
        known = {spec.name for spec in signature.outputs}
        for output in request.outputs:
            if output.name not in known:
                raise RequestError(f"unexpected inference output '{output.name}' for model '{model}'")
    return terms


def _read_parameters(request: InferenceRequest) -> QueueTerms:
    for name in request.parameters:
        if name.startswith(_RESERVED_PREFIX) and name != _ALLOWED_RESERVED:
            raise RequestError(
                f"parameter '{name}' is refused: names that start with '{_RESERVED_PREFIX}' are reserved, only "
                f"'{_ALLOWED_RESERVED}' is accepted"
            )
    return QueueTerms(
        _read_count(request, "priority"), _read_count(request, "timeout"), request.sequence or _read_sequence(request)
    )


def find_correlation_id(request: InferenceRequest) -> int | str:
    """The sequence that ``request`` belongs to, 0 for none; also for one that ``check_request`` will refuse."""
    if request.sequence is not None:
        return request.sequence.correlation_id
    if "sequence_id" not in request.parameters:
        return 0
    try:
        return _read_sequence(request).correlation_id
    except RequestError:
        return 0


def _read_sequence(request: InferenceRequest) -> SequencePlace:
    correlation_id = request.parameters.get("sequence_id", 0)
    if isinstance(correlation_id, bool) or not isinstance(correlation_id, int | str):
        raise RequestError("invalid value type for 'sequence_id' parameter, expected int64_param or string_param.")
    if isinstance(correlation_id, int):
        if not -(1 << 63) <= correlation_id < 1 << 64:
            raise RequestError(f"parameter 'sequence_id' must fit 64 bits, got {correlation_id}")
        correlation_id %= 1 << 64  # clients send unsigned numbers in a signed parameter
    elif len(correlation_id.encode("utf-8", "surrogatepass")) > _MAX_CORRELATION_BYTES:
        raise RequestError(f"string correlation ID cannot be longer than {_MAX_CORRELATION_BYTES} bytes")
    flags = [request.parameters.get(name, False) for name in ("sequence_start", "sequence_end")]
    for name, value in zip(("sequence_start", "sequence_end"), flags, strict=True):
        if not isinstance(value, bool):
            raise RequestError(f"invalid value type for '{name}' parameter, expected bool_param.")
    return SequencePlace(correlation_id, bool(flags[0]), bool(flags[1]))


def _read_count(request: InferenceRequest, name: str) -> int:
    value = request.parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 53:
        raise RequestError(f"parameter '{name}' must be an integer of at least 0, got {value!r}")
    return value


def _check_names(inputs: Sequence[Tensor], model: str, signature: ModelSignature) -> list[tuple[Tensor, TensorSpec]]:
    specs = {spec.name: spec for spec in signature.inputs}
    names = [tensor.name for tensor in inputs]
    if len(names) == len(specs) and specs.keys() == set(names):  # the usual case, at little cost
        return [(tensor, specs[tensor.name]) for tensor in inputs]
    required = [spec.name for spec in signature.inputs if not spec.optional]
    missing = [name for name in required if name not in names]
    if missing:
        expected = f"expected {len(required)} inputs"
        if len(required) != len(specs):
            expected = f"expected number of inputs between {len(required)} and {len(specs)}"
        raise RequestError(
            f"{expected} but got {len(names)} inputs for model '{model}'. Got input(s) {names}, but missing required "
            f"input(s) {missing}. Please provide all required input(s)."
        )
    if not inputs:
        raise RequestError(
            f"expected at least one input for model '{model}' but got none, all of its inputs are optional"
        )
    for name in names:
        if name not in specs:
            raise RequestError(f"unexpected inference input '{name}' for model '{model}'")
        if names.count(name) > 1:
            raise RequestError(f"input '{name}' is given {names.count(name)} times for model '{model}'")
    return [(tensor, specs[tensor.name]) for tensor in inputs]


def _check_tensor(tensor: Tensor, spec: TensorSpec, model: str, max_batch_size: int, rows: int | None) -> int | None:
    """Gives the number of rows of a batching model, None for another."""
    if tensor.datatype != spec.datatype.value:
        raise RequestError(
            f"inference input '{tensor.name}' data-type is '{tensor.datatype}', but model '{model}' expects "
            f"'{spec.datatype.value}'"
        )
    batch = (-1,) if max_batch_size else ()
    expected = batch + spec.shape
    shape = tuple(tensor.shape)
    if (
        len(shape) != len(expected)
        or any(dim < 0 for dim in shape)
        or (max_batch_size and shape[0] < 1)
        or any(want >= 0 and want != got for want, got in zip(expected, shape, strict=True))
    ):
        note = _BATCH_NOTE if max_batch_size else ""
        raise RequestError(
            f"unexpected shape for input '{tensor.name}' for model '{model}'. Expected {_shape(expected)}, got "
            f"{_shape(shape)}. {note}".rstrip()
        )
    if max_batch_size:
        if shape[0] > max_batch_size:
            raise RequestError(f"inference request batch-size must be <= {max_batch_size} for '{model}'")
        if rows is not None and rows != shape[0]:
            raise RequestError(
                f"input '{tensor.name}' batch size does not match other inputs for '{model}': {shape[0]} against {rows}"
            )
        rows = shape[0]
    _check_size(tensor, spec, model)
    return rows


def _check_size(tensor: Tensor, spec: TensorSpec, model: str) -> None:
    if tensor.data is None:
        raise RequestError(f"unable to find data for input tensor '{tensor.name}' for model '{model}' in request.")
    data = memoryview(tensor.data).cast("B")
    count = math.prod(tensor.shape)
    if count == 0 and math.prod(dim for dim in tensor.shape if dim) > _MAX_EMPTY_ELEMENTS:
        raise RequestError(
            f"shape {_shape(tensor.shape)} of the empty input '{tensor.name}' for model '{model}' is too large: its "
            f"sizes other than 0 multiply to more than {_MAX_EMPTY_ELEMENTS}"
        )
    if spec.datatype is DataType.BYTES:
        _check_elements(tensor.name, data, count, model)
    elif count * spec.datatype.itemsize != data.nbytes:
        raise RequestError(
            f"input byte size mismatch for input '{tensor.name}' for model '{model}'. Expected "
            f"{count * spec.datatype.itemsize}, got {data.nbytes}"
        )


def _check_elements(name: str, data: memoryview, count: int, model: str) -> None:
    """BYTES: each element is a 4-byte little-endian length and that many bytes."""
    found, at = walk_elements(data, min(count, data.nbytes) + 1)
    rest = data.nbytes - at
    if found <= count and 0 < rest < 4:
        raise RequestError(
            f"incomplete string length indicator for inference input '{name}' for model '{model}', expecting 4 "
            f"bytes but only {rest} bytes available"
        )
    if found <= count and rest:
        length = int.from_bytes(data[at : at + 4], "little")
        raise RequestError(
            f"incomplete string data for inference input '{name}' for model '{model}', expecting string of length "
            f"{length} but only {rest - 4} bytes available"
        )
    if found != count:
        more = "more than " if found > count else ""
        raise RequestError(
            f"unexpected number of string elements {more}{min(found, count)} for inference input '{name}' for model "
            f"'{model}', expecting {count}"
        )


def _shape(shape: Sequence[int]) -> str:
    return "[" + ",".join(str(dim) for dim in shape) + "]"
