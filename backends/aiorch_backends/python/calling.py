"""Calls to other models with arrays, for ``Model`` classes: a thin layer over ``LoadContext.call_model``.

::

    from aiorch_backends.python.calling import call, call_async

    class Model:
        def load(self, context):
            self.context = context

        def execute(self, inputs):
            answer = call(self.context, "tokenizer", {"text": inputs["text"]}, timeout_s=5)
            return {"ids": answer["input_ids"]}

The other model has its own queue and batches as ever. ``execute`` occupies its instance until the answer is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aiorch_backends.common import encode_text
from aiorch_server.backend import LoadContext, ModelCall
from aiorch_server.errors import AiorchError, InternalError, UnsupportedRequest
from aiorch_server.types import (
    FINAL_RESPONSE,
    DataType,
    InferenceRequest,
    InferenceResponse,
    NumpyArray,
    RequestedOutput,
    Tensor,
)


def call(
    context: LoadContext,
    model: str,
    inputs: Mapping[str, Any],
    *,
    version: str = "",
    outputs: Sequence[str] = (),
    timeout_s: float | None = None,
) -> dict[str, NumpyArray]:
    """The other model's outputs by name; blocks the calling thread. Raises what that model raised.

    UnsupportedRequest where it gives several answers: iterate ``context.call_model`` then. Arrays are read-only views.
    """
    pending = _start(context, model, inputs, version, outputs, timeout_s)
    for answer in pending:
        return _read(pending, model, answer)
    raise InternalError(f"model '{model}' gave no answer")


async def call_async(
    context: LoadContext,
    model: str,
    inputs: Mapping[str, Any],
    *,
    version: str = "",
    outputs: Sequence[str] = (),
    timeout_s: float | None = None,
) -> dict[str, NumpyArray]:
    """The same for coroutines, on whichever event loop they run; cancelling it cancels the call."""
    pending = _start(context, model, inputs, version, outputs, timeout_s)
    async for answer in pending:
        return _read(pending, model, answer)
    raise InternalError(f"model '{model}' gave no answer")


def _start(
    context: LoadContext,
    model: str,
    inputs: Mapping[str, Any],
    version: str,
    outputs: Sequence[str],
    timeout_s: float | None,
) -> ModelCall:
    if context.call_model is None:
        raise InternalError("models cannot be called from here: this backend runs without a server")
    tensors = [_write_tensor(name, np.asarray(array)) for name, array in inputs.items()]
    request = InferenceRequest(model, version, tensors, [RequestedOutput(name) for name in outputs])
    return context.call_model(request, timeout_s=timeout_s)


def _read(pending: ModelCall, model: str, answer: InferenceResponse) -> dict[str, NumpyArray]:
    if isinstance(answer.error, AiorchError):
        raise answer.error
    if not answer.parameters.get(FINAL_RESPONSE):
        pending.cancel()
        raise UnsupportedRequest(f"model '{model}' is decoupled; take its answers one by one from context.call_model")
    return {tensor.name: _read_tensor(tensor) for tensor in answer.outputs}


def _write_tensor(name: str, array: NumpyArray) -> Tensor:
    datatype = DataType.from_numpy(array.dtype)
    if datatype is DataType.BYTES:
        elements = encode_text(array).ravel().tolist()
        data: bytes | memoryview = b"".join(
            part for element in elements for part in (len(element).to_bytes(4, "little"), element)
        )
    else:
        whole = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        data = whole.reshape(-1).view(np.uint8).data if whole.size else b""
    return Tensor(name, datatype.value, array.shape, data)


def _read_tensor(tensor: Tensor) -> NumpyArray:
    datatype, data = DataType(tensor.datatype), tensor.data if tensor.data is not None else b""
    if datatype is not DataType.BYTES:
        return np.frombuffer(data, datatype.numpy).reshape(tensor.shape)
    raw, at, elements = bytes(data), 0, []
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        elements.append(raw[at + 4 : end])
        at = end
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array.reshape(tensor.shape)
