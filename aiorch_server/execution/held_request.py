"""One request in the hands of a model that answers request by request; the other side of ``backend.ModelRequest``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from aiorch_server._core import Member, encode_parameters
from aiorch_server.errors import AiorchError, Code, ModelExecutionError
from aiorch_server.execution.callers import Callers
from aiorch_server.execution.request_details import RequestDetails
from aiorch_server.execution.response_counts import ResponseCounts
from aiorch_server.tracing import Run
from aiorch_server.types import (
    FINAL_RESPONSE,
    DataType,
    InferenceResponse,
    ModelSignature,
    NumpyArray,
    Parameter,
    Tensor,
    TensorSpec,
)

CLOSED_TEXT: Final = "Unable to send response. Response sender has been closed."


_PLAIN: Final = RequestDetails()


@dataclass(frozen=True, slots=True)
class RequestOwner:
    """What all requests of one model version share."""

    model_name: str
    signature: ModelSignature
    counts: ResponseCounts


class HeldRequest:
    """Owns a member of a batch until it is settled. Any thread may use it; see ``ModelRequest`` for each method.

    ``on_end`` is called once, when it is settled.
    """

    __slots__ = (
        "__weakref__",
        "_abandoned",
        "_channel",
        "_details",
        "_inputs",
        "_is_ended",
        "_last_ns",
        "_lock",
        "_member",
        "_n_sent",
        "_on_end",
        "_owner",
        "_started_ns",
        "_wanted",
    )

    def __init__(self, member: Member, owner: RequestOwner, on_end: Callable[[HeldRequest], None]) -> None:
        details = member.attachment
        self._details = details if isinstance(details, RequestDetails) else _PLAIN
        self._channel = self._details.channel
        self._member = member
        self._owner = owner
        self._on_end = on_end
        self._lock = threading.Lock()
        self._is_ended = False
        self._abandoned: tuple[int, str] | None = None
        self._n_sent = 0
        self._wanted = member.wanted
        self._inputs: Mapping[str, NumpyArray] = member.gather()
        self._started_ns = self._last_ns = time.monotonic_ns()

    def __repr__(self) -> str:
        return f"<HeldRequest {self.id!r} of {self._owner.model_name!r}{', ended' if self._is_ended else ''}>"

    def __del__(self) -> None:
        # also one whose end was begun and failed: only what the member says counts
        if hasattr(self, "_started_ns") and not self._member.is_settled:
            self.abandon(int(Code.INTERNAL), self._describe_unanswered())

    @property
    def callers(self) -> Callers:
        """The models whose code asked for it."""
        return self._details.callers

    @property
    def run(self) -> Run | None:
        """Set where it is watched."""
        return self._details.run

    @property
    def id(self) -> str:
        """As the caller gave it."""
        return self._member.id

    @property
    def inputs(self) -> Mapping[str, NumpyArray]:
        """By name, of this request alone."""
        return self._inputs

    @property
    def requested_outputs(self) -> tuple[str, ...]:
        """Names, all if the caller named none."""
        return self._wanted

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The caller's own."""
        return self._details.parameters

    @property
    def correlation_id(self) -> int | str:
        """Of its sequence."""
        return self._details.sequence.correlation_id

    @property
    def is_sequence_start(self) -> bool:
        """Whether it opens its sequence."""
        return self._details.sequence.is_start

    @property
    def is_sequence_end(self) -> bool:
        """Whether it closes its sequence."""
        return self._details.sequence.is_end

    @property
    def timeout_us(self) -> int:
        """Of the queue, as the caller gave it."""
        return self._details.timeout_us

    @property
    def is_ended(self) -> bool:
        """Whether it was answered, ended or failed."""
        return self._is_ended

    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._member.is_cancelled

    def send(
        self,
        outputs: Mapping[str, NumpyArray],
        parameters: Mapping[str, Parameter] | None = None,
        *,
        is_final: bool = False,
    ) -> None:
        """See ``ModelRequest.send``."""
        if self._channel is None:
            self._answer(outputs, parameters)
            return
        tensors = encode_outputs(self._owner.signature, outputs, self._wanted)
        carried = dict(parameters or {})
        if is_final:
            carried[FINAL_RESPONSE] = True
        self._emit(InferenceResponse("", "", tensors, parameters=carried), is_final=is_final)

    def send_error(self, error: AiorchError) -> None:
        """See ``ModelRequest.send_error``."""
        if self._channel is None:
            self.fail(error)
            return
        self._emit(InferenceResponse("", "", (), error=error), is_final=False)

    def finish(self) -> None:
        """See ``ModelRequest.finish``."""
        self._claim()
        if self._channel is None:
            self._settle_failed(int(Code.INTERNAL), self._describe_unanswered())
            return
        self._owner.counts.add_empty(self._n_sent, time.monotonic_ns() - self._last_ns)
        self._settle()

    def fail(self, error: AiorchError) -> None:
        """See ``ModelRequest.fail``."""
        code, text = int(error.code), str(error)  # first: what the model's own class does may fail
        self._claim()
        if self._channel is not None:
            self._owner.counts.add_failure(self._n_sent, time.monotonic_ns() - self._last_ns)
        self._settle_failed(code, text)

    def abandon(self, code: int, text: str) -> None:
        """Fails it on behalf of the server; does nothing where it is settled."""
        self._is_ended, self._abandoned = True, (code, text)
        self._settle_failed(code, text)

    def _claim(self) -> None:
        with self._lock:
            if self._is_ended:
                raise ModelExecutionError(CLOSED_TEXT)
            self._is_ended = True

    def _answer(self, outputs: Mapping[str, NumpyArray], parameters: Mapping[str, Parameter] | None) -> None:
        self._claim()
        try:
            extra = b""
            if parameters and self._member.attachment is None:
                extra = encode_parameters(parameters)
            elif parameters:
                self._details.answer_parameters = dict(parameters)
            self._member.settle(outputs, extra)
        except BaseException as error:
            if isinstance(error, RuntimeError) and self._member.is_settled:  # by the server, meanwhile
                return
            self._is_ended = False  # nothing has left, so it can still be answered
            if self._abandoned is not None:  # while it was the model's to settle
                self.abandon(*self._abandoned)
            raise
        self._on_end(self)

    def _emit(self, response: InferenceResponse, *, is_final: bool) -> None:
        """Puts one answer into the channel and, if it is the last, ends the request."""
        channel = self._channel
        assert channel is not None
        if is_final:
            self._claim()
        elif self._is_ended:
            raise ModelExecutionError(CLOSED_TEXT)
        size_bytes = sum(len(tensor.data or b"") for tensor in response.outputs)
        started_ns = time.monotonic_ns()
        was_taken = channel.put(response, size_bytes)
        ended_ns = time.monotonic_ns()
        with self._lock:
            index, last_ns = self._n_sent, self._last_ns
            self._n_sent, self._last_ns = index + 1, ended_ns
        counts = self._owner.counts
        if not was_taken:
            counts.add_cancelled(index, ended_ns - last_ns)
        elif response.error is not None:
            counts.add_failure(index, ended_ns - last_ns)
        else:
            counts.add_success(index, started_ns - last_ns, ended_ns - started_ns)
            if index == 0:
                counts.add_first(started_ns - self._member.received_ns)
        if is_final:
            self._settle()

    def _settle(self) -> None:
        try:
            self._member.finish()
        except RuntimeError:
            return
        self._on_end(self)

    def _settle_failed(self, code: int, text: str) -> None:
        try:
            self._member.fail(code, text)
        except RuntimeError:
            return
        self._on_end(self)

    def _describe_unanswered(self) -> str:
        return f"model '{self._owner.model_name}' failed: it dropped this request without a final answer"


def encode_outputs(
    signature: ModelSignature, outputs: Mapping[str, NumpyArray], wanted: Collection[str]
) -> list[Tensor]:
    """The wanted ones among ``outputs`` as bytes of their own; ModelExecutionError for a type that is not declared."""
    return [
        _encode_output(spec, outputs[spec.name])
        for spec in signature.outputs
        if spec.name in outputs and spec.name in wanted
    ]


def _encode_output(spec: TensorSpec, given: NumpyArray) -> Tensor:
    array = np.asarray(given)
    if spec.datatype is DataType.BYTES:
        if array.dtype.kind not in "OSU":
            raise ModelExecutionError(f"output '{spec.name}' has numpy type {array.dtype}; BYTES needs object")
        data = b"".join(part for element in array.ravel().tolist() for part in _encode_element(element))
    elif array.dtype != spec.datatype.numpy:
        raise ModelExecutionError(
            f"output '{spec.name}' has numpy type {array.dtype}; {spec.datatype.value} needs {spec.datatype.numpy}"
        )
    else:
        data = array.tobytes()
    return Tensor(spec.name, spec.datatype.value, tuple(array.shape), data)


def _encode_element(element: object) -> tuple[bytes, bytes]:
    if isinstance(element, (bytearray, memoryview)):
        element = bytes(element)
    text = element if isinstance(element, bytes) else str(element).encode()
    return len(text).to_bytes(4, "little"), text
