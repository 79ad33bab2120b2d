"""The section of a model configuration for stateful models: whose requests belong together, and what they carry on."""

from __future__ import annotations

import enum
from collections.abc import Iterator

from pydantic import Field, model_validator

from aiorch_server.config.problems import Problem, raise_problems
from aiorch_server.config.section import ConfigDataType, Dim, FileName, Flag, Int32, Microseconds, Number, Section
from aiorch_server.types import DataType

#: What a CONTROL_SEQUENCE_CORRID tensor can hold.
CORRELATION_TYPES = (DataType.UINT64, DataType.INT64, DataType.UINT32, DataType.INT32, DataType.BYTES)
_PAIRS = {
    "int32_false_true": DataType.INT32,
    "fp32_false_true": DataType.FP32,
    "bool_false_true": DataType.BOOL,
}


class ControlKind(enum.StrEnum):
    """What a control tensor of a stateful model tells."""

    CONTROL_SEQUENCE_START = "CONTROL_SEQUENCE_START"
    CONTROL_SEQUENCE_READY = "CONTROL_SEQUENCE_READY"
    CONTROL_SEQUENCE_END = "CONTROL_SEQUENCE_END"
    CONTROL_SEQUENCE_CORRID = "CONTROL_SEQUENCE_CORRID"


class SequenceControl(Section):
    """One signal in a control tensor: a pair of numbers for false and true, or the type of the correlation id."""

    kind: ControlKind = ControlKind.CONTROL_SEQUENCE_START
    int32_false_true: tuple[Int32, ...] = ()
    fp32_false_true: tuple[Number, ...] = ()
    bool_false_true: tuple[Flag, ...] = ()
    data_type: ConfigDataType | None = None

    @property
    def tensor_type(self) -> DataType:
        """The element type of the control tensor."""
        written = next((datatype for name, datatype in _PAIRS.items() if getattr(self, name)), DataType.BOOL)
        return self.data_type or written

    @property
    def false_true(self) -> tuple[float, float]:
        """The two values of a START, END or READY tensor."""
        pair = self.int32_false_true or self.fp32_false_true or self.bool_false_true
        return pair[0], pair[1]

    @model_validator(mode="after")
    def _check(self) -> SequenceControl:
        raise_problems(self._find_problems())
        return self

    def _find_problems(self) -> Iterator[Problem]:
        written = [name for name in _PAIRS if getattr(self, name)]
        if self.kind is ControlKind.CONTROL_SEQUENCE_CORRID:
            if self.data_type not in CORRELATION_TYPES:
                found = self.data_type.config_name if self.data_type else "nothing"
                known = ", ".join(each.config_name for each in CORRELATION_TYPES)
                yield Problem(("data_type",), f"found {found}; a correlation id is one of {known}")
            for name in written:
                yield Problem((name,), "is not for CONTROL_SEQUENCE_CORRID; remove it")
            return
        if len(written) != 1:
            found = " and ".join(written) or "none"
            yield Problem((), f"found {found}; exactly one of {', '.join(_PAIRS)} must be written")
        elif len(pair := getattr(self, written[0])) != 2:
            yield Problem((written[0],), f"found {len(pair)} values; two are right, for false and for true")
        if self.data_type is not None:
            yield Problem(("data_type",), "is only for CONTROL_SEQUENCE_CORRID; the pair gives the type here")


class SequenceControlInput(Section):
    """A control tensor and its one signal."""

    name: str = Field(min_length=1)
    control: tuple[SequenceControl, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> SequenceControlInput:
        if len(self.control) != 1:
            text = f"found {len(self.control)}; a control tensor carries exactly one signal"
            raise_problems([Problem(("control",), text)])
        return self


class SequenceInitialState(Section):
    """What a state tensor holds at the start of a sequence; ``data_file`` lies in the folder ``initial_state``."""

    data_type: ConfigDataType
    dims: tuple[Dim, ...] = ()
    zero_data: Flag | None = None
    data_file: FileName | None = None
    name: str = ""

    @model_validator(mode="after")
    def _check(self) -> SequenceInitialState:
        written = [name for name in ("zero_data", "data_file") if getattr(self, name)]
        if len(written) != 1:
            text = f"found {' and '.join(written) or 'none'}; exactly one of zero_data, data_file must be written"
            raise_problems([Problem((), text)])
        if any(size < 0 for size in self.dims):
            raise_problems([Problem(("dims",), f"found {list(self.dims)}; data has definite sizes above 0")])
        return self


class SequenceState(Section):
    """A tensor that is carried from one request of a sequence to the next; ``dims`` leaves out the batch dimension."""

    input_name: str = Field(min_length=1)
    output_name: str = Field(min_length=1)
    data_type: ConfigDataType
    dims: tuple[Dim, ...] = ()
    initial_state: tuple[SequenceInitialState, ...] = ()
    use_same_buffer_for_input_output: Flag = False
    use_growable_memory: Flag = False

    @model_validator(mode="after")
    def _check(self) -> SequenceState:
        raise_problems(self._find_problems())
        return self

    def _find_problems(self) -> Iterator[Problem]:
        if len(self.initial_state) > 1:
            yield Problem(("initial_state",), f"found {len(self.initial_state)}; a state begins with one value")
        for index, initial in enumerate(self.initial_state):
            where = ("initial_state", index)
            if initial.data_type is not self.data_type:
                text = f"found {initial.data_type.config_name}; the state is {self.data_type.config_name}"
                yield Problem((*where, "data_type"), text)
            if len(initial.dims) != len(self.dims) or any(
                want not in (-1, got) for want, got in zip(self.dims, initial.dims, strict=True)
            ):
                yield Problem((*where, "dims"), f"found {list(initial.dims)}; the state has dims {list(self.dims)}")


class SequenceDirect(Section):
    """Each sequence keeps one place in the batch."""

    max_queue_delay_microseconds: Microseconds = 0
    minimum_slot_utilization: Number = Field(default=0.0, ge=0.0, le=1.0)


class SequenceOldest(Section):
    """Requests of many sequences are batched dynamically, oldest first."""

    max_candidate_sequences: Int32 = Field(default=0, le=1 << 20)
    preferred_batch_size: tuple[Int32, ...] = ()
    max_queue_delay_microseconds: Microseconds = 0
    preserve_ordering: Flag = False

    @model_validator(mode="after")
    def _check(self) -> SequenceOldest:
        raise_problems(self._find_problems())
        return self

    def _find_problems(self) -> Iterator[Problem]:
        if self.max_candidate_sequences < 1:
            text = f"found {self.max_candidate_sequences}; an instance needs at least 1"
            yield Problem(("max_candidate_sequences",), text)
        for index, size in enumerate(self.preferred_batch_size):
            if size < 1:
                yield Problem(("preferred_batch_size", index), f"found {size}; a batch size must be at least 1")


class SequenceBatching(Section):
    """Requests of one sequence go to one instance, in order; ``direct`` unless ``oldest`` is written.

    A sequence that brings no request for ``max_sequence_idle_microseconds`` (0: one second) is dropped.
    """

    direct: SequenceDirect | None = None
    oldest: SequenceOldest | None = None
    max_sequence_idle_microseconds: Microseconds = 0
    control_input: tuple[SequenceControlInput, ...] = ()
    state: tuple[SequenceState, ...] = ()
    iterative_sequence: Flag = False

    @model_validator(mode="after")
    def _check(self) -> SequenceBatching:
        raise_problems(self._find_problems())
        return self

    def _find_problems(self) -> Iterator[Problem]:
        if self.direct is not None and self.oldest is not None:
            yield Problem(("oldest",), "found beside direct; only one strategy can be written")
        inputs: set[str] = set()
        kinds: set[ControlKind] = set()
        for index, control_input in enumerate(self.control_input):
            kind = control_input.control[0].kind
            if control_input.name in inputs:
                yield Problem(("control_input", index, "name"), f"found '{control_input.name}' for the second time")
            if kind in kinds:
                yield Problem(("control_input", index, "control"), f"found {kind} for the second time")
            inputs.add(control_input.name)
            kinds.add(kind)
        outputs: set[str] = set()
        for index, state in enumerate(self.state):
            if state.input_name in inputs:
                text = f"found '{state.input_name}' for the second time; names must differ"
                yield Problem(("state", index, "input_name"), text)
            if state.output_name in outputs:
                text = f"found '{state.output_name}' for the second time; names must differ"
                yield Problem(("state", index, "output_name"), text)
            inputs.add(state.input_name)
            outputs.add(state.output_name)
