"""From what an artefact holds and what a configuration declares to the signature that is served.

The rules are Triton's auto-completion (https://github.com/triton-inference-server/server, docs/user_guide/
model_configuration.md): a first dimension that is variable in every tensor is the batch dimension, shapes in a
signature leave it out, and a declaration may narrow what the artefact allows but never contradict it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aiorch_backends.common.artefacts import refuse
from aiorch_server.backend import LoadContext
from aiorch_server.types import DataType, ModelSignature, TensorSpec


@dataclass(frozen=True, slots=True)
class FoundTensor:
    """One input or output as the artefact describes it: ``shape`` is whole, -1 any size, None of unknown rank."""

    name: str
    datatype: DataType
    shape: tuple[int, ...] | None
    is_optional: bool = False


def complete_signature(
    context: LoadContext,
    inputs: Sequence[FoundTensor],
    outputs: Sequence[FoundTensor],
    *,
    batch_limit: int | None = None,
) -> ModelSignature:
    """The signature of an artefact whose tensors are known, narrowed by the declaration.

    ``batch_limit`` is the largest batch that the artefact itself allows, where it says; 0 says that its first
    dimensions are not a batch's. Raises ModelLoadError where the declaration names what is not there or contradicts
    type, rank or sizes.
    """
    max_batch_size = _choose_max_batch_size(context, inputs, outputs, batch_limit)
    is_batching = max_batch_size > 0
    required = {tensor.name for tensor in inputs if not tensor.is_optional}
    served_inputs = _narrow(context, "input", inputs, context.declared.inputs, is_batching, required)
    served_outputs = _narrow(context, "output", outputs, context.declared.outputs, is_batching, set())
    return ModelSignature(served_inputs, served_outputs, max_batch_size)


def _choose_max_batch_size(
    context: LoadContext, inputs: Sequence[FoundTensor], outputs: Sequence[FoundTensor], batch_limit: int | None
) -> int:
    declared = context.declared.max_batch_size
    if declared == 0 or (declared is None and batch_limit == 0):
        return 0
    fixed = [tensor for tensor in (*inputs, *outputs) if not _has_free_first_dimension(tensor)]
    if declared is None:
        if fixed or _is_declared_whole(context, (*inputs, *outputs)):
            return 0
        size = context.default_max_batch_size
        return size if batch_limit is None else min(size, batch_limit)
    if fixed:
        shape = _show(fixed[0].shape or ())
        raise refuse(
            context,
            f"max_batch_size {declared} is declared, but the first dimension of '{fixed[0].name}' {shape} is not "
            "variable; export the model with a dynamic batch dimension or declare max_batch_size 0",
        )
    if batch_limit == 0:
        raise refuse(
            context,
            f"max_batch_size {declared} is declared, but the model's inputs and outputs share no first dimension",
        )
    if batch_limit is not None and declared > batch_limit:
        raise refuse(context, f"max_batch_size {declared} is declared, but the model takes {batch_limit} rows at most")
    return declared


def _has_free_first_dimension(tensor: FoundTensor) -> bool:
    return tensor.shape is None or (len(tensor.shape) > 0 and tensor.shape[0] == -1)


def _is_declared_whole(context: LoadContext, tensors: Iterable[FoundTensor]) -> bool:
    """Whether a declaration without max_batch_size spells out every dimension, so the first is no batch's."""
    ranks = {tensor.name: len(tensor.shape) for tensor in tensors if tensor.shape is not None}
    declared = (*context.declared.inputs, *context.declared.outputs)
    return bool(declared) and all(ranks.get(spec.name) == len(spec.shape) for spec in declared)


def _narrow(
    context: LoadContext,
    kind: str,
    found: Sequence[FoundTensor],
    declared: Sequence[TensorSpec],
    is_batching: bool,
    required: set[str],
) -> tuple[TensorSpec, ...]:
    if not declared:
        return tuple(_spec_of(context, kind, tensor, is_batching) for tensor in found if not tensor.is_optional)
    by_name = {tensor.name: tensor for tensor in found}
    missing = required - {spec.name for spec in declared}
    if missing:
        raise refuse(context, f"{kind} '{min(missing)}' of the model is not declared; declared: {_names(declared)}")
    return tuple(_check(context, kind, spec, by_name, is_batching) for spec in declared)


def _spec_of(context: LoadContext, kind: str, tensor: FoundTensor, is_batching: bool) -> TensorSpec:
    if tensor.shape is None:
        raise refuse(
            context,
            f"the artefact does not say how many dimensions {kind} '{tensor.name}' has; declare it in the "
            f'configuration: {kind} [ {{ name: "{tensor.name}" data_type: {tensor.datatype.config_name} dims: '
            "[ ... ] } ]",
        )
    return TensorSpec(tensor.name, tensor.datatype, tensor.shape[1:] if is_batching else tensor.shape)


def _check(
    context: LoadContext, kind: str, spec: TensorSpec, by_name: dict[str, FoundTensor], is_batching: bool
) -> TensorSpec:
    tensor = by_name.get(spec.name)
    if tensor is None:
        raise refuse(context, f"{kind} '{spec.name}' is declared, but the model has {_names(by_name.values())}")
    if spec.datatype is not tensor.datatype:
        raise refuse(
            context,
            f"{kind} '{spec.name}' is declared as {spec.datatype.config_name}, but the model has "
            f"{tensor.datatype.config_name}",
        )
    if spec.optional and not tensor.is_optional:
        raise refuse(context, f"{kind} '{spec.name}' is declared optional, but the model requires it")
    if tensor.shape is not None:
        shape = tensor.shape[1:] if is_batching else tensor.shape
        # A variable dimension may be narrowed to a size; a fixed one may not be widened to any size.
        is_narrower = len(spec.shape) == len(shape) and all(
            own in (-1, asked) for own, asked in zip(shape, spec.shape, strict=True)
        )
        if not is_narrower:
            left_out = " (without the batch dimension)" if is_batching else ""
            raise refuse(
                context,
                f"{kind} '{spec.name}' is declared with dims {_show(spec.shape)}, but the model has "
                f"{_show(shape)}{left_out}",
            )
    return spec


def _names(tensors: Iterable[FoundTensor | TensorSpec]) -> str:
    return ", ".join(f"'{tensor.name}'" for tensor in tensors) or "none"


def _show(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
