"""``InferenceRequest.exec`` and ``async_exec``: calls to other models over ``LoadContext.call_model``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from aiorch_backends.python.triton import messages
from aiorch_backends.python.triton.failures import TritonError, TritonModelException, to_triton_error
from aiorch_backends.python.triton.messages import InferenceResponse
from aiorch_backends.python.triton.tensors import Tensor, deserialize_bytes_tensor, serialize_byte_tensor
from aiorch_server.backend import CallModel, ModelCall
from aiorch_server.errors import AiorchError
from aiorch_server.types import FINAL_RESPONSE, DataType, Parameter, RequestedOutput
from aiorch_server.types import InferenceRequest as CallRequest
from aiorch_server.types import InferenceResponse as CallAnswer
from aiorch_server.types import Tensor as CallTensor

_MANY_ANSWERS = (
    "exec was called for one answer, but model '{}' is decoupled and gave more; call exec(decoupled=True) and iterate"
)


class ResponseIterator:
    """The answers of a decoupled model, one after the other; the last may have no tensors."""

    def __init__(self, call: ModelCall) -> None:
        self._call = call
        self._answers: Iterator[CallAnswer] | None = None
        self._is_over = False

    def __iter__(self) -> ResponseIterator:
        return self

    def __next__(self) -> InferenceResponse:
        if self._is_over:
            raise StopIteration
        if self._answers is None:
            self._answers = iter(self._call)
        try:
            return _to_response(next(self._answers))
        except StopIteration:
            self._is_over = True
            raise
        except AiorchError as error:
            self._is_over = True
            return InferenceResponse(error=to_triton_error(error))

    def __del__(self) -> None:
        if not self._is_over:
            self.cancel()

    def cancel(self) -> None:
        """Wants no more; what is on its way may still come."""
        self._call.cancel()


class InferenceRequest(messages.InferenceRequest):
    """With the calls; each model has a subclass of its own that knows its server."""

    _call_model: ClassVar[CallModel | None] = None

    def exec(self, decoupled: bool = False) -> Any:
        """Asks the other model and waits: an InferenceResponse, or for ``decoupled`` an iterator of them.

        Errors of the other model come as ``error()``; TritonModelException where there is no way to ask.
        """
        call = self._start()
        if decoupled:
            return ResponseIterator(call)
        try:
            answers = iter(call)
            first = next(answers)
            return self._take_only(call, first)
        except AiorchError as error:
            return InferenceResponse(error=to_triton_error(error))

    def async_exec(self, decoupled: bool = False) -> asyncio.Future[Any]:
        """The same, to be awaited on the running event loop; the question is asked at once."""
        return asyncio.ensure_future(self._exec_async(self._start(), decoupled))

    async def _exec_async(self, call: ModelCall, decoupled: bool) -> Any:
        if decoupled:
            return ResponseIterator(call)
        try:
            async for first in call:
                return self._take_only(call, first)
            raise TritonModelException(f"model '{self._model_name}' gave no answer")
        except AiorchError as error:
            return InferenceResponse(error=to_triton_error(error))
        except asyncio.CancelledError:
            call.cancel()
            raise

    def _take_only(self, call: ModelCall, answer: CallAnswer) -> InferenceResponse:
        if answer.parameters.get(FINAL_RESPONSE):
            return _to_response(answer)
        call.cancel()
        return InferenceResponse(error=TritonError(_MANY_ANSWERS.format(self._model_name), TritonError.UNSUPPORTED))

    def _start(self) -> ModelCall:
        call_model = self._call_model
        if call_model is None:
            raise TritonModelException("Models cannot be called from here: this backend runs without a server.")
        if self._sender is not None:
            raise TritonModelException("A request that came to this model cannot be executed, make a new one.")
        parameters: dict[str, Parameter] = dict(self._parameters)
        if self._timeout_us:
            parameters["timeout"] = self._timeout_us
        if self._correlation_id:
            parameters["sequence_id"] = self._correlation_id
            parameters["sequence_start"] = bool(self._flags & messages.REQUEST_FLAG_SEQUENCE_START)
            parameters["sequence_end"] = bool(self._flags & messages.REQUEST_FLAG_SEQUENCE_END)
        request = CallRequest(
            self._model_name,
            "" if self._model_version == -1 else str(self._model_version),
            [_to_wire(tensor) for tensor in self._inputs],
            [RequestedOutput(name) for name in self._wanted],
            self._id,
            parameters,
        )
        return call_model(request)


def _to_wire(tensor: Tensor) -> CallTensor:
    array, datatype = tensor._array, tensor._datatype
    data: bytes | memoryview
    if datatype is DataType.BYTES:
        text = array.astype(np.object_) if array.dtype.kind == "U" else array
        data = serialize_byte_tensor(text) or b""
    else:
        data = array.tobytes()
    return CallTensor(tensor.name(), datatype.value, tuple(array.shape), data)


def _to_response(answer: CallAnswer) -> InferenceResponse:
    if isinstance(answer.error, AiorchError):
        return InferenceResponse(error=to_triton_error(answer.error))
    parameters = {name: value for name, value in answer.parameters.items() if name != FINAL_RESPONSE}
    return InferenceResponse([_from_wire(tensor) for tensor in answer.outputs], parameters=parameters)


def _from_wire(tensor: CallTensor) -> Tensor:
    datatype = DataType(tensor.datatype)
    data = tensor.data if tensor.data is not None else b""
    is_bytes = datatype is DataType.BYTES
    array = deserialize_bytes_tensor(bytes(data)) if is_bytes else np.frombuffer(data, datatype.numpy)
    return Tensor._of(tensor.name, array.reshape(tensor.shape), datatype)
