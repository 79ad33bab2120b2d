"""What requests of different shapes are to the model that runs them together: flat inputs, and where each ends.

A ragged input of several requests is one array of one dimension. Batch inputs tell how it is composed, batch outputs
are cut by the shape of an input. The kinds are those of the protocol's model_config.proto. Pure: no threads, no model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from aiorch_server.backend import DeclaredSignature
from aiorch_server.config.model import ModelConfig
from aiorch_server.config.tensors import BatchInput, BatchInputKind
from aiorch_server.errors import ModelExecutionError, ModelLoadError
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec

Tensors = Mapping[str, NumpyArray]


@dataclasses.dataclass(frozen=True, slots=True)
class _Given:
    """A tensor that the server makes of the shapes of ``source`` in each request of a batch."""

    name: str
    kind: BatchInputKind
    source: str
    datatype: DataType


@dataclasses.dataclass(frozen=True, slots=True)
class _Cut:
    """An output that is cut by the shape of ``source``; ``dims`` are those of the answer."""

    source: str
    dims: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class RaggedTensors:
    """Between the requests of a batch and the tensors of the model; ``dims`` of every input leave out the rows."""

    name: str
    max_batch_size: int
    dims: Mapping[str, tuple[int, ...]]
    ragged: frozenset[str]
    given: tuple[_Given, ...]
    cuts: Mapping[str, _Cut]

    @classmethod
    def of(cls, config: ModelConfig) -> RaggedTensors | None:
        """None for a model that has neither ragged inputs nor batch inputs or outputs."""
        ragged = frozenset(each.name for each in config.input if each.allow_ragged_batch)
        if not (ragged or config.batch_input or config.batch_output):
            return None
        outputs = {each.name: each.dims for each in config.output}
        return cls(
            name=config.name,
            max_batch_size=config.max_batch_size or 0,
            dims={each.name: each.dims for each in config.input},
            ragged=ragged,
            given=tuple(_read_given(each) for each in config.batch_input),
            cuts={
                each.target_name[0]: _Cut(each.source_input[0], outputs[each.target_name[0]])
                for each in config.batch_output
            },
        )

    def declare(self, declared: DeclaredSignature) -> DeclaredSignature:
        """What the backend is to find in the artefact: whole shapes, no batch dimension, and the tensors given."""
        inputs = [
            dataclasses.replace(spec, shape=(-1,) if spec.name in self.ragged else (-1, *spec.shape))
            for spec in declared.inputs
        ]
        inputs += [TensorSpec(each.name, each.datatype, self._shape_of(each)) for each in self.given]
        outputs = [
            dataclasses.replace(spec, shape=_pack(spec.shape) if spec.name in self.cuts else (-1, *spec.shape))
            for spec in declared.outputs
        ]
        return DeclaredSignature(tuple(inputs), tuple(outputs), max_batch_size=0)

    def show(self, signature: ModelSignature) -> ModelSignature:
        """What clients see of the artefact's signature; ModelLoadError where an output cannot be cut into answers."""
        names = {each.name for each in self.given}
        inputs = [
            dataclasses.replace(spec, shape=self.dims.get(spec.name, spec.shape), is_ragged=spec.name in self.ragged)
            for spec in signature.inputs
            if spec.name not in names
        ]
        outputs = signature.outputs
        if signature.max_batch_size == 0:
            outputs = tuple(self._show_output(spec) for spec in signature.outputs)
        return dataclasses.replace(
            signature, inputs=tuple(inputs), outputs=tuple(outputs), max_batch_size=self.max_batch_size
        )

    def gather(self, members: Sequence[Tensors]) -> dict[str, NumpyArray]:
        """The model's inputs of the requests of one batch; all members have the same inputs."""
        inputs = {name: self._join(name, [member[name] for member in members]) for name in members[0]}
        for each in self.given:
            inputs[each.name] = _describe(each, [member[each.source].shape for member in members])
        return inputs

    def cut(self, outputs: Tensors, members: Sequence[Tensors]) -> list[dict[str, NumpyArray]]:
        """Each member's part of ``outputs``, as views; ModelExecutionError where these are of another length."""
        answers: list[dict[str, NumpyArray]] = [{} for _ in members]
        for name, given in outputs.items():
            array = np.asarray(given)
            cut = self.cuts.get(name)
            parts = _cut_rows(name, array, members) if cut is None else _cut_by(name, cut, array, members)
            for answer, part in zip(answers, parts, strict=True):
                answer[name] = part
        return answers

    def _shape_of(self, given: _Given) -> tuple[int, ...]:
        is_table = given.kind is BatchInputKind.BATCH_ITEM_SHAPE
        return (-1, len(self.dims[given.source])) if is_table else (-1,)

    def _show_output(self, spec: TensorSpec) -> TensorSpec:
        if spec.name in self.cuts:
            return dataclasses.replace(spec, shape=self.cuts[spec.name].dims)
        if not spec.shape or spec.shape[0] != -1:
            raise ModelLoadError(
                f"model '{self.name}': output '{spec.name}' has shape {list(spec.shape)}; the first dimension must be "
                "variable, it has the rows of all requests of a batch. What is cut in another way needs a batch_output"
            )
        return dataclasses.replace(spec, shape=spec.shape[1:])

    def _join(self, name: str, parts: list[NumpyArray]) -> NumpyArray:
        if name in self.ragged:
            parts = [part.reshape(-1) for part in parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _read_given(entry: BatchInput) -> _Given:
    return _Given(entry.target_name[0], entry.kind, entry.source_input[0], entry.data_type)


def _pack(dims: tuple[int, ...]) -> tuple[int, ...]:
    """The model's shape of an output that is cut: rows and leading variable sizes make one dimension."""
    fixed = next((place for place, size in enumerate(dims) if size != -1), len(dims))
    return (-1,) if -1 in dims[fixed:] else (-1, *dims[fixed:])


def _describe(given: _Given, shapes: Sequence[tuple[int, ...]]) -> NumpyArray:
    """ModelExecutionError for a number that the type cannot hold: it would be the end of another request."""
    counts = [math.prod(shape) for shape in shapes]
    values: NumpyArray
    match given.kind:
        case BatchInputKind.BATCH_ELEMENT_COUNT:
            values = np.array(counts)
        case BatchInputKind.BATCH_ACCUMULATED_ELEMENT_COUNT:
            values = np.cumsum(counts)
        case BatchInputKind.BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO:
            values = np.cumsum([0, *counts])
        case BatchInputKind.BATCH_MAX_ELEMENT_COUNT_AS_SHAPE:
            return np.zeros(max(counts), given.datatype.numpy)
        case BatchInputKind.BATCH_ITEM_SHAPE | BatchInputKind.BATCH_ITEM_SHAPE_FLATTEN:
            rows = [shape[1:] for shape in shapes for _ in range(shape[0])]
            values = np.array(rows, np.int64).reshape(len(rows), len(shapes[0]) - 1)
            if given.kind is BatchInputKind.BATCH_ITEM_SHAPE_FLATTEN:
                values = values.reshape(-1)
    held = values.astype(given.datatype.numpy)
    if not np.array_equal(held, values):
        raise ModelExecutionError(
            f"batch input '{given.name}' has to tell of {values.max()} elements, which {given.datatype.config_name} "
            "cannot hold exactly"
        )
    return held


def _count_rows(member: Tensors) -> int:
    return len(next(iter(member.values())))


def _cut_rows(name: str, array: NumpyArray, members: Sequence[Tensors]) -> Iterator[NumpyArray]:
    rows = [_count_rows(member) for member in members]
    if array.ndim == 0 or array.shape[0] != sum(rows):
        raise ModelExecutionError(
            f"output '{name}' has shape {list(array.shape)} for a batch of {sum(rows)} rows; its first dimension must "
            f"be {sum(rows)}"
        )
    ends = np.cumsum(rows).tolist()
    return (array[end - size : end] for size, end in zip(rows, ends, strict=True))


def _cut_by(name: str, cut: _Cut, array: NumpyArray, members: Sequence[Tensors]) -> Iterator[NumpyArray]:
    shapes = []
    for member in members:
        rows, *own = member[cut.source].shape
        shapes.append((rows, *(own[place] if dim == -1 else dim for place, dim in enumerate(cut.dims))))
    sizes = [math.prod(shape) for shape in shapes]
    if array.size != sum(sizes):
        raise ModelExecutionError(
            f"output '{name}' has {array.size} elements (shape {list(array.shape)}); the shapes of input "
            f"'{cut.source}' in this batch ask for {sum(sizes)}"
        )
    flat, ends = array.reshape(-1), np.cumsum(sizes).tolist()
    return (flat[end - size : end].reshape(shape) for shape, size, end in zip(shapes, sizes, ends, strict=True))
