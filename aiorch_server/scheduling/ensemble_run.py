"""The tensors of one request on its way through an ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from aiorch_server.errors import ModelExecutionError, RequestError
from aiorch_server.scheduling.ensemble_graph import ModelKey, Plan, Step, convert_shape
from aiorch_server.types import InferenceRequest, InferenceResponse, ModelSignature, Tensor

if TYPE_CHECKING:
    from aiorch_server.scheduling.ensemble import StepServable

Held = TypeVar("Held", bound="StepServable")


@dataclass(frozen=True, slots=True)
class _Value:
    """A tensor on its way; ``rows`` is the batch size of whoever made it, 0 if it does not batch."""

    tensor: Tensor
    rows: int


class Run(Generic[Held]):
    """One request, or one answer of a decoupled step: the tensors so far, each a view of whatever memory it came in.

    A value is None where an optional tensor was left out, or nobody needs it any more. ``is_last``: no other branch of
    its request comes behind it.
    """

    __slots__ = ("_readers", "_values", "deadline_ns", "is_last", "leases", "plan", "request", "rows", "waited_ns")

    def __init__(
        self, request: InferenceRequest, plan: Plan, rows: int, deadline_ns: int, leases: Mapping[ModelKey, Held]
    ) -> None:
        self.request = request
        self.plan = plan
        self.rows = rows
        self.deadline_ns = deadline_ns
        self.leases = leases
        self.waited_ns = 0
        self.is_last = True
        self._values: dict[str, _Value | None] = {}
        self._readers = dict(plan.readers)

    def branch(self, *, is_last: bool) -> Run[Held]:
        """What one answer of a decoupled step goes on with: all that is there so far."""
        branch = Run(self.request, self.plan, self.rows, self.deadline_ns, self.leases)
        branch._values = dict(self._values)
        branch._readers = dict(self._readers)
        branch.is_last = self.is_last and is_last
        return branch

    def bring(self, signature: ModelSignature) -> None:
        """Takes the inputs of the request, which fits ``signature``."""
        given = {tensor.name: tensor for tensor in self.request.inputs}
        for spec in signature.inputs:
            tensor = given.get(spec.name)
            self._values[spec.name] = None if tensor is None else self._share(spec.name, tensor, self.rows)

    def is_ready(self, step: Step) -> bool:
        """Whether everything that ``step`` reads is there."""
        return all(tensor in self._values for tensor in step.inputs.values())

    def make_request(self, step: Step) -> InferenceRequest:
        """What to ask the model of ``step``; RequestError if none of its inputs was given."""
        whole, (name, version) = self.request, step.model
        inputs = self._gather(step, self.leases[step.model].signature)
        return InferenceRequest(
            name, version, inputs, self.plan.asked[step.index], whole.id, whole.parameters, whole.sequence
        )

    def _gather(self, step: Step, signature: ModelSignature) -> Sequence[Tensor]:
        is_batching = signature.max_batch_size > 0
        inputs = []
        for given, name in step.inputs.items():
            value = self._values[name]
            if value is None:  # optional, and not given: the step decides whether it can do without
                continue
            shape = value.tensor.shape
            if is_batching != bool(value.rows):
                dims = next((spec.shape for spec in signature.inputs if spec.name == given), ())
                shape = convert_shape(dims, is_batching, value.rows, shape)
            inputs.append(Tensor(given, value.tensor.datatype, shape, value.tensor.data))
        if not inputs:
            raise RequestError(f"none of the inputs of {step} was given")
        return inputs

    def take(self, step: Step, outputs: Sequence[Tensor]) -> None:
        """Takes what ``step`` has answered; ModelExecutionError if something is missing that others need."""
        is_batching = self.leases[step.model].signature.max_batch_size > 0
        for tensor in outputs:
            name = step.outputs[tensor.name]
            self._values[name] = self._share(name, tensor, tensor.shape[0] if is_batching and tensor.shape else 0)
        for given, name in step.outputs.items():
            if name in self.plan.readers and name not in self._values:
                raise ModelExecutionError(f"the answer has no output '{given}'")

    def _share(self, name: str, tensor: Tensor, rows: int) -> _Value:
        data = tensor.data
        if name in self.plan.shared and isinstance(data, memoryview):
            data = data.toreadonly()  # no reader may find what another has written into it
        return _Value(Tensor(name, tensor.datatype, tensor.shape, data), rows)

    def release(self, step: Step) -> None:
        """Lets go of the tensors that ``step`` was the last to read: in a long chain only few are held at a time."""
        for name in step.inputs.values():
            self._readers[name] -= 1
            if not self._readers[name]:
                self._values[name] = None

    def make_answer(self, name: str, version: str, signature: ModelSignature) -> InferenceResponse:
        """The outputs that were asked for, of the ensemble called ``name``."""
        wanted = {output.name for output in self.request.outputs}
        outputs = []
        for spec in signature.outputs:
            if wanted and spec.name not in wanted:
                continue
            value = self._values[spec.name]
            assert value is not None
            shape = convert_shape(spec.shape, self.rows > 0, value.rows, value.tensor.shape)
            outputs.append(Tensor(spec.name, value.tensor.datatype, shape, value.tensor.data))
        return InferenceResponse(name, version, outputs, self.request.id)
