"""One request on its way through a sequence, and what comes back of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from aiorch_server._core import decode_response
from aiorch_server.errors import CapacityError, InternalError
from aiorch_server.execution.request_details import RequestDetails
from aiorch_server.scheduling.sequence_table import Member
from aiorch_server.tracing import current_run
from aiorch_server.types import InferenceRequest, InferenceResponse, ModelSignature, SequencePlace, Tensor

#: All outputs of one row, the state's among them, or what went wrong.
Outcome = list[Tensor] | Exception
#: Takes the outcome of a member that was handed to an instance; never raises.
Settle = Callable[[Member, Outcome], None]


class Job:
    """A request, the outputs to ask the model for, and the future of who sent it."""

    __slots__ = (
        "deadline_ns",
        "details",
        "future",
        "n_bytes",
        "outputs",
        "place",
        "received_ns",
        "request",
        "run",
        "wanted",
    )

    def __init__(
        self,
        request: InferenceRequest,
        place: SequencePlace,
        outputs: Sequence[str],
        deadline_ns: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.request = request
        self.place = place
        self.outputs = outputs
        self.wanted = frozenset(output.name for output in request.outputs)
        self.deadline_ns = deadline_ns
        self.received_ns = time.monotonic_ns()
        self.run = current_run.get()  # made in the task of who sent it
        self.details = RequestDetails.of(request, place, run=self.run)
        self.n_bytes = sum(memoryview(tensor.data or b"").nbytes for tensor in request.inputs)
        self.future: asyncio.Future[InferenceResponse] = loop.create_future()

    def close_stamps(self) -> None:
        """Completes the doorways of a request that has ended: it was queued when it came, whenever its turn was."""
        if self.run is None:
            return
        stamps = self.run.stamps
        stamps.received_ns = stamps.enqueued_ns = self.received_ns
        stamps.settled_ns = stamps.settled_ns or time.monotonic_ns()

    def find_input(self, name: str) -> bytes | memoryview:
        """The bytes of an input that is there."""
        return next(tensor.data or b"" for tensor in self.request.inputs if tensor.name == name)

    def make_response(self, outputs: Sequence[Tensor], signature: ModelSignature, version: int) -> InferenceResponse:
        """The answer: what was asked for, or all that clients see."""
        shown = self.wanted or {spec.name for spec in signature.outputs}
        return InferenceResponse(
            model_name=self.request.model_name,
            model_version=str(version),
            outputs=[tensor for tensor in outputs if tensor.name in shown],
            id=self.request.id,
            parameters=self.details.answer_parameters,
        )


def describe_loss(model: str, key: int | str, error: Exception) -> CapacityError:
    """What a sequence is told whose instance ended with ``error``."""
    return CapacityError(
        f"sequence {key} of model '{model}' is lost, the instance that ran it ended ({error}); begin again with START"
    )


def job_of(member: Member) -> Job:
    """What ``member`` carries."""
    assert isinstance(member.payload, Job)
    return member.payload


def read_outcome(answer: asyncio.Future[memoryview]) -> Outcome:
    """The outputs in an answer, or why there are none."""
    if answer.cancelled():
        return InternalError("the request was cancelled inside the server")
    error = answer.exception()
    if error is not None:
        return error if isinstance(error, Exception) else InternalError(type(error).__name__)
    try:
        _, _, _, outputs = decode_response(answer.result())
    except Exception as broken:
        return InternalError(f"the answer was lost: {type(broken).__name__}")
    return [Tensor(name, datatype, shape, data) for name, datatype, shape, data in outputs]
