"""The tensors of one step of a sequence: what the client sent, the control signals, and the state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from aiorch_server.config.sequence import ControlKind
from aiorch_server.errors import RequestError
from aiorch_server.scheduling.sequence_plan import Control, SequencePlan, State, encode_correlation
from aiorch_server.scheduling.sequence_table import Member
from aiorch_server.types import ModelSignature, SequencePlace, Tensor

#: Bytes of one tensor's row and the row's shape.
Row = tuple[tuple[int, ...], bytes | memoryview]
#: A sequence's state: one row for each state tensor, by the name of the input.
Memory = dict[str, Row]


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Makes a request's inputs complete and takes its outputs apart; ``signature`` is the public one."""

    plan: SequencePlan
    signature: ModelSignature

    def check_correlation(self, place: SequencePlace) -> None:
        """RequestError for an id that the model's correlation id tensor cannot hold."""
        for control in self.plan.controls:
            if control.kind is ControlKind.CONTROL_SEQUENCE_CORRID:
                try:
                    encode_correlation(place.correlation_id, control.spec.datatype)
                except ValueError as error:
                    raise RequestError(f"inference request to model '{self.plan.model}': {error}") from None

    @property
    def initial_memory(self) -> Memory:
        """The state at the start of a sequence."""
        return {each.spec.name: (each.shape, each.data) for each in self.plan.states}

    def recall(self, member: Member) -> Memory:
        """The state that ``member`` begins with."""
        assert member.sequence is not None
        if member.is_start or member.sequence.memory is None:
            return self.initial_memory
        return cast(Memory, member.sequence.memory)

    def add_own(self, place: SequencePlace, memory: Memory) -> list[Tensor]:
        """Control and state tensors of one row."""
        tensors = [
            Tensor(each.spec.name, each.spec.datatype.value, self._whole((1,)), encode_control(each, place))
            for each in self.plan.controls
        ]
        for state in self.plan.states:
            shape, data = memory[state.spec.name]
            tensors.append(Tensor(state.spec.name, state.spec.datatype.value, self._whole(shape), data))
        return tensors

    def name_outputs(self, requested: Sequence[str]) -> list[str]:
        """The outputs to ask the model for: those that the client wants, and the state."""
        wanted = list(dict.fromkeys(requested)) or [spec.name for spec in self.signature.outputs]
        return list(dict.fromkeys((*wanted, *(state.output_name for state in self.plan.states))))

    def read_memory(self, outputs: Iterable[Tensor]) -> Memory:
        """The state that the model gave for one row; copied, so that an answer's memory does not stay with it."""
        found = {tensor.name: tensor for tensor in outputs}
        return {state.spec.name: self._read_row(state, found[state.output_name]) for state in self.plan.states}

    def _read_row(self, state: State, tensor: Tensor) -> Row:
        return tuple(tensor.shape[1:] if self.signature.max_batch_size else tensor.shape), bytes(tensor.data or b"")

    def _whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *shape) if self.signature.max_batch_size else shape


def encode_absent(control: Control) -> bytes:
    """The bytes of a control tensor's element in a row that has no request."""
    return bytes(control.spec.datatype.itemsize or 4) if control.values is None else control.values[False]


def encode_control(control: Control, place: SequencePlace) -> bytes:
    """The bytes of a control tensor's element in a row that has one; ValueError for an id that it cannot hold."""
    if control.values is None:
        return encode_correlation(place.correlation_id, control.spec.datatype)
    value = {
        ControlKind.CONTROL_SEQUENCE_START: place.is_start,
        ControlKind.CONTROL_SEQUENCE_END: place.is_end,
        ControlKind.CONTROL_SEQUENCE_READY: True,
    }[control.kind]
    return control.values[value]
