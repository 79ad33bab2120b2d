"""``pb_utils.InferenceRequest`` and ``InferenceResponse``, and the sender that answers request by request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from aiorch_backends.python.triton.failures import TritonError, TritonModelException, to_server_error
from aiorch_backends.python.triton.tensors import Tensor
from aiorch_server.backend import ModelRequest
from aiorch_server.errors import ModelExecutionError
from aiorch_server.types import DataType, ModelSignature, NumpyArray, Parameter, TensorSpec

REQUEST_FLAG_SEQUENCE_START: Final = 1
REQUEST_FLAG_SEQUENCE_END: Final = 2
RESPONSE_COMPLETE_FINAL: Final = 1
REQUEST_RELEASE_ALL: Final = 1
REQUEST_RELEASE_RESCHEDULE: Final = 2


class PreferredMemory:
    """Where a caller would like the outputs; accepted, everything is in main memory here."""

    def __init__(self, preferred_memory_type: int, preferred_device_id: int = 0) -> None:
        self.preferred_memory_type = preferred_memory_type
        self.preferred_device_id = preferred_device_id


class InferenceTrace:
    """The trace of a request; empty."""

    def get_context(self) -> str | None:
        """No context is handed to models."""
        return None


class InferenceResponse:
    """Tensors, or an error."""

    __slots__ = ("_error", "_parameters", "_tensors")

    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: TritonError | None = None,
        parameters: Mapping[str, Parameter] | None = None,
    ) -> None:
        self._tensors = list(output_tensors)
        for tensor in self._tensors:
            if not isinstance(tensor, Tensor):
                raise TritonModelException(
                    f"Output tensor for inference response should be a Tensor, not a {type(tensor).__name__}."
                )
        if error is not None and not isinstance(error, TritonError):
            raise TypeError(f"error must be a TritonError, not a {type(error).__name__}")
        self._error = error
        self._parameters = check_parameters(parameters)

    def output_tensors(self) -> list[Tensor]:
        """None where there is an error."""
        return self._tensors

    def has_error(self) -> bool:
        """Whether ``error`` gives one."""
        return self._error is not None

    def error(self) -> TritonError | None:
        """The error, None where there is none."""
        return self._error

    def parameters(self) -> str:
        """As a JSON object."""
        return json.dumps(self._parameters)


class ResponseSender:
    """Answers one request from any thread; what it allows is what Triton's allows."""

    __slots__ = ("_has_answered", "_is_closed", "_is_decoupled", "_outputs", "_request")

    def __init__(self, request: ModelRequest, signature: ModelSignature) -> None:
        self._request = request
        self._is_decoupled = signature.is_decoupled
        self._outputs = signature.outputs
        self._has_answered = False
        self._is_closed = False

    @property
    def has_answered(self) -> bool:
        """Whether something was sent."""
        return self._has_answered

    def is_cancelled(self) -> bool:
        """Whether nobody waits for answers any more."""
        return self._request.is_cancelled()

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """Sends an answer, or with the flag COMPLETE_FINAL the end; TritonModelException where that cannot be."""
        if flags not in (0, RESPONSE_COMPLETE_FINAL):
            raise TritonModelException("Unable to send response. Unsupported flag provided.")
        if response is None and flags == 0:
            raise TritonModelException(
                "Inference Response object must be provided when the response flags is set to zero."
            )
        is_final = flags == RESPONSE_COMPLETE_FINAL
        self._check(response)
        try:
            self._send(response, is_final)
        except ModelExecutionError as error:
            raise TritonModelException(str(error)) from None
        self._has_answered = self._has_answered or response is not None
        self._is_closed = self._is_closed or is_final

    def _check(self, response: InferenceResponse | None) -> None:
        if not self._is_decoupled:
            if response is not None and self._has_answered:
                raise TritonModelException(
                    "Unable to send response. Non-decoupled model cannot send more than one response."
                )
            if response is None and not self._has_answered:
                raise TritonModelException(
                    "Unable to send response. Non-decoupled model cannot send complete final before sending a response."
                )
        if self._is_closed:
            raise TritonModelException("Unable to send response. Response sender has been closed.")

    def _send(self, response: InferenceResponse | None, is_final: bool) -> None:
        if response is None:
            if self._is_decoupled:
                self._request.finish()
            return
        error = response.error()
        if error is None:
            given = {tensor.name(): tensor._array for tensor in response.output_tensors()}
            outputs = {spec.name: fit_output(given[spec.name], spec) for spec in self._outputs if spec.name in given}
            self._request.send(outputs, response._parameters, is_final=is_final)
        elif is_final:
            self._request.fail(to_server_error(error))
        else:
            self._request.send_error(to_server_error(error))


class InferenceRequest:
    """A request that came, or one for another model that the model made itself."""

    def __init__(
        self,
        request_id: str = "",
        correlation_id: int | str = 0,
        *,
        inputs: Sequence[Tensor],
        requested_output_names: Sequence[str],
        model_name: str,
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: InferenceTrace | None = None,
        parameters: Mapping[str, Parameter] | None = None,
    ) -> None:
        # Triton takes bytes for strings as well: models pass on what they read from BYTES tensors
        request_id, model_name = to_text(request_id), to_text(model_name)
        requested_output_names = [to_text(name) for name in requested_output_names]
        if not isinstance(correlation_id, int | str):
            raise TritonModelException("Correlation ID must be integer or string")
        owner = f"for request with id '{request_id}' and model name '{model_name}'"
        for tensor in inputs:
            if not isinstance(tensor, Tensor):
                raise TritonModelException(f"Input tensor {owner} should be a Tensor, not a {type(tensor).__name__}.")
        if not all(isinstance(name, str) and name for name in requested_output_names):
            raise TritonModelException(f"Requested output name {owner} should not be empty.")
        self._id = request_id
        self._correlation_id = correlation_id
        self._inputs = list(inputs)
        self._wanted = list(requested_output_names)
        self._model_name = model_name
        self._model_version = model_version
        self._flags = flags
        self._timeout_us = timeout
        self._parameters = check_parameters(parameters)
        self._preferred_memory = preferred_memory
        self._trace = trace or InferenceTrace()
        self._sender: ResponseSender | None = None

    @classmethod
    def _of(
        cls,
        request: ModelRequest,
        specs: Mapping[str, TensorSpec],
        owner: tuple[str, int],
        signature: ModelSignature,
    ) -> InferenceRequest:
        self = cls.__new__(cls)
        self._id = request.id
        self._correlation_id = request.correlation_id
        self._inputs = [Tensor._of(name, array, specs[name].datatype) for name, array in request.inputs.items()]
        self._wanted = list(request.requested_outputs)
        self._model_name, self._model_version = owner
        self._flags = (
            request.is_sequence_start * REQUEST_FLAG_SEQUENCE_START
            + request.is_sequence_end * REQUEST_FLAG_SEQUENCE_END
        )
        self._timeout_us = request.timeout_us
        self._parameters = dict(request.parameters)
        self._preferred_memory = None
        self._trace = InferenceTrace()
        self._sender = ResponseSender(request, signature)
        return self

    def inputs(self) -> list[Tensor]:
        """All tensors that came."""
        return self._inputs

    def request_id(self) -> str:
        """Empty for none."""
        return self._id

    def correlation_id(self) -> int | str:
        """Of the sequence, 0 for none."""
        return self._correlation_id

    def requested_output_names(self) -> list[str]:
        """All outputs where the caller named none."""
        return self._wanted

    def model_name(self) -> str:
        """The model that is asked."""
        return self._model_name

    def model_version(self) -> int:
        """Its version, -1 for the server's choice."""
        return self._model_version

    def flags(self) -> int:
        """REQUEST_FLAG_SEQUENCE_START and REQUEST_FLAG_SEQUENCE_END."""
        return self._flags

    def set_flags(self, flags: int) -> None:
        """For requests to other models."""
        self._flags = flags

    def timeout(self) -> int:
        """Microseconds, 0 for none."""
        return self._timeout_us

    def parameters(self) -> str:
        """As a JSON object."""
        return json.dumps(self._parameters)

    def preferred_memory(self) -> PreferredMemory | None:
        """As it was given."""
        return self._preferred_memory

    def trace(self) -> InferenceTrace:
        """An empty trace."""
        return self._trace

    def get_response_sender(self) -> ResponseSender:
        """What answers this request."""
        if self._sender is None:
            raise TritonModelException("Only requests that came to this model have a response sender.")
        return self._sender

    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._sender is not None and self._sender.is_cancelled()

    def set_release_flags(self, flags: int) -> None:
        """Only REQUEST_RELEASE_ALL: requests cannot be put back into their sequence here."""
        if flags != REQUEST_RELEASE_ALL:
            raise TritonModelException(
                "Requests are not rescheduled by this server, only REQUEST_RELEASE_ALL is right."
            )


def to_text(text: Any) -> Any:
    """``bytes`` as ``str``, anything else as it is."""
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def fit_output(array: NumpyArray, spec: TensorSpec) -> NumpyArray:
    """``array`` in the declared type, if that is of the same kind and holds every value; else as it is.

    Triton sends what the model gives, whatever is declared; here clients get the declared type.
    """
    wanted = spec.datatype.numpy
    if array.dtype == wanted or spec.datatype in (DataType.BYTES, DataType.BF16):
        return array
    if not np.can_cast(array.dtype, wanted, "same_kind"):
        return array
    fitted = array.astype(wanted)
    return fitted if wanted.kind == "f" or np.array_equal(fitted, array) else array


def check_parameters(parameters: Mapping[str, Parameter] | None) -> dict[str, Parameter]:
    """A copy; TritonModelException for names that are no strings, and values that are not bool, int, float or str."""
    if parameters is None:
        return {}
    if not isinstance(parameters, Mapping):
        raise TritonModelException(f"parameters must be a dict, not a {type(parameters).__name__}")
    for name, value in parameters.items():
        if not isinstance(name, str) or not isinstance(value, bool | int | float | str):
            raise TritonModelException(
                f"Expect parameters to be a dict of bool, int, float or str by name, got {name!r}: {value!r}"
            )
    return dict(parameters)
