"""What a configuration's ``sequence_batching`` means for a model: its control tensors, its state, its strategy."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aiorch_server._core import walk_elements
from aiorch_server.backend import DeclaredSignature
from aiorch_server.config.model import ModelConfig
from aiorch_server.config.sequence import ControlKind, SequenceBatching, SequenceControlInput, SequenceState
from aiorch_server.errors import ModelLoadError
from aiorch_server.types import DataType, ModelSignature, TensorSpec

#: The folder of a model in which `data_file` of an initial state lies.
INITIAL_STATE_FOLDER = "initial_state"
#: A state above this size is a mistake: each live sequence holds one.
MAX_STATE_BYTES = 256 << 20
_DEFAULT_IDLE_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Control:
    """A control tensor of one element; ``values`` are the bytes for false and for true, empty for a correlation id."""

    spec: TensorSpec
    kind: ControlKind
    values: tuple[bytes, bytes] | None = None


@dataclass(frozen=True, slots=True)
class State:
    """A tensor that a sequence keeps: ``shape`` and ``data`` are those of one row at its start."""

    spec: TensorSpec
    output_name: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """How the sequences of a model are run. ``slots`` are places of each instance."""

    model: str
    section: SequenceBatching
    controls: tuple[Control, ...]
    states: tuple[State, ...]

    @property
    def idle_ns(self) -> int:
        """How long a sequence may bring nothing."""
        return (self.section.max_sequence_idle_microseconds or _DEFAULT_IDLE_US) * 1000

    @property
    def is_direct(self) -> bool:
        """Whether a sequence keeps one row of the batch."""
        return self.section.oldest is None

    def count_slots(self, max_batch_size: int) -> int:
        """Sequences that one instance carries at the same time."""
        if self.section.oldest is not None:
            return self.section.oldest.max_candidate_sequences
        return max(1, max_batch_size)

    def declare(self, declared: DeclaredSignature) -> DeclaredSignature:
        """What the backend is to find in the artefact: also the tensors that no client sees."""
        inputs = self._own_inputs() if declared.inputs else []
        known = {spec.name for spec in declared.outputs}
        outputs = [
            TensorSpec(each.output_name, each.spec.datatype, each.spec.shape)
            for each in self.states
            if declared.outputs and each.output_name not in known
        ]
        return dataclasses.replace(declared, inputs=(*declared.inputs, *inputs), outputs=(*declared.outputs, *outputs))

    def separate(self, whole: ModelSignature, declared: DeclaredSignature) -> ModelSignature:
        """The part of ``whole`` that clients see; ModelLoadError where the model has not what the plan needs.

        A state's output is seen by clients only where ``declared`` names it as an output.
        """
        hidden = self._own_inputs()
        self._compare("input", hidden, whole.inputs)
        carried = [TensorSpec(each.output_name, each.spec.datatype, each.spec.shape) for each in self.states]
        self._compare("output", carried, whole.outputs)
        shown = {spec.name for spec in declared.outputs}
        hidden_inputs = {spec.name for spec in hidden}
        hidden_outputs = {spec.name for spec in carried} - shown
        public = dataclasses.replace(
            whole,
            inputs=tuple(spec for spec in whole.inputs if spec.name not in hidden_inputs),
            outputs=tuple(spec for spec in whole.outputs if spec.name not in hidden_outputs),
        )
        if whole.is_decoupled:
            raise ModelLoadError(
                f"sequence_batching of model '{self.model}' is not supported for a decoupled model, whose requests "
                "have any number of answers; write model_transaction_policy { decoupled: false }"
            )
        if not public.inputs or not public.outputs:
            missing = "input" if not public.inputs else "output"
            raise ModelLoadError(f"sequence_batching of model '{self.model}' leaves no {missing} for clients")
        return public

    def _own_inputs(self) -> list[TensorSpec]:
        return [*(control.spec for control in self.controls), *(state.spec for state in self.states)]

    def _compare(self, kind: str, wanted: Iterable[TensorSpec], found: Iterable[TensorSpec]) -> None:
        specs = {spec.name: spec for spec in found}
        for spec in wanted:
            own = specs.get(spec.name)
            if own is None:
                raise ModelLoadError(
                    f"sequence_batching of model '{self.model}': the model has no {kind} '{spec.name}', it has "
                    f"{', '.join(specs)}"
                )
            if (
                own.datatype is not spec.datatype
                or len(own.shape) != len(spec.shape)
                or any(
                    -1 not in (ours, theirs) and ours != theirs
                    for ours, theirs in zip(spec.shape, own.shape, strict=True)
                )
            ):
                raise ModelLoadError(
                    f"sequence_batching of model '{self.model}': {kind} '{spec.name}' is {spec.datatype.value} "
                    f"{list(spec.shape)} there, but the model has {own.datatype.value} {list(own.shape)} (without "
                    "the batch dimension, where it batches)"
                )


def read_plan(config: ModelConfig, directory: Path) -> SequencePlan | None:
    """The plan of ``config``, None for a model without sequences; ModelLoadError for initial data that does not fit."""
    section = config.sequence_batching
    if section is None:
        return None
    return SequencePlan(
        config.name,
        section,
        tuple(_read_control(each) for each in section.control_input),
        tuple(_read_state(each, config.name, directory) for each in section.state),
    )


def _read_control(written: SequenceControlInput) -> Control:
    signal = written.control[0]
    spec = TensorSpec(written.name, signal.tensor_type, (1,))
    if signal.kind is ControlKind.CONTROL_SEQUENCE_CORRID:
        return Control(spec, signal.kind)
    false, true = (np.array([value], spec.datatype.numpy).tobytes() for value in signal.false_true)
    return Control(spec, signal.kind, (false, true))


def _read_state(written: SequenceState, model: str, directory: Path) -> State:
    spec = TensorSpec(written.input_name, written.data_type, written.dims)
    initial = written.initial_state[0] if written.initial_state else None
    # Triton's rule: a size that nobody wrote is 1 at the start
    shape = initial.dims if initial is not None else tuple(1 if size < 0 else size for size in written.dims)
    count = math.prod(shape)
    where = f"initial_state of '{written.input_name}' of model '{model}'"
    if count * (spec.datatype.itemsize or 4) > MAX_STATE_BYTES:
        raise ModelLoadError(f"{where}: shape {list(shape)} is more than {MAX_STATE_BYTES} bytes")
    if initial is None or not initial.data_file:
        return State(spec, written.output_name, shape, bytes(count * (spec.datatype.itemsize or 4)))
    path = directory / INITIAL_STATE_FOLDER / initial.data_file
    try:
        size = path.stat().st_size
        if size > MAX_STATE_BYTES:
            raise ModelLoadError(f"{where}: '{path}' has {size} bytes, {MAX_STATE_BYTES} are allowed")
        data = path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{where}: '{path}' cannot be read: {error.strerror}") from error
    if spec.datatype is DataType.BYTES:
        found, end = walk_elements(memoryview(data), count + 1)
        if found != count or end != len(data):
            raise ModelLoadError(
                f"{where}: '{path}' does not hold exactly {count} strings, each behind its length in 4 bytes"
            )
    elif len(data) != count * spec.datatype.itemsize:
        raise ModelLoadError(f"{where}: '{path}' has {len(data)} bytes, {count * spec.datatype.itemsize} are needed")
    return State(spec, written.output_name, shape, data)


def encode_correlation(correlation_id: int | str, datatype: DataType) -> bytes:
    """The element of a correlation id tensor; ValueError, which says why, for an id that ``datatype`` cannot hold."""
    if datatype is DataType.BYTES:
        text = str(correlation_id).encode("utf-8", "surrogatepass")
        return struct.pack("<I", len(text)) + text
    if isinstance(correlation_id, str):
        raise ValueError(f"the model takes correlation IDs as {datatype.value}, a string is none")
    bits = datatype.itemsize * 8
    # 64 bits may be read as signed: clients write large numbers so
    limit = 1 << (bits - 1 if datatype is DataType.INT32 else bits)
    if correlation_id >= limit:
        raise ValueError(f"the model takes correlation IDs as {datatype.value}, {correlation_id} does not fit")
    return correlation_id.to_bytes(datatype.itemsize, "little")
