"""Tensors whose shape for clients is not the shape that the model sees; only shapes change, no bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from aiorch_server.backend import Backend, DeclaredSignature, LoadContext, ModelInstance, RequestInstance
from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import ModelExecutionError, ModelLoadError
from aiorch_server.types import ModelSignature, NumpyArray, TensorSpec

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Reshaping:
    """For each reshaped tensor by name: the clients' shape and the model's, without batch dimension, -1 for any."""

    inputs: Mapping[str, tuple[Shape, Shape]]
    outputs: Mapping[str, tuple[Shape, Shape]]

    @classmethod
    def of(cls, config: ModelConfig) -> Reshaping | None:
        """None where no tensor is reshaped."""
        inputs = {each.name: (each.dims, each.reshape.shape) for each in config.input if each.reshape is not None}
        outputs = {each.name: (each.dims, each.reshape.shape) for each in config.output if each.reshape is not None}
        return cls(inputs, outputs) if inputs or outputs else None

    def declare(self, declared: DeclaredSignature) -> DeclaredSignature:
        """What the backend is to find in the artefact: the model's shapes."""
        return dataclasses.replace(
            declared,
            inputs=tuple(_with_shape(spec, self.inputs, 1) for spec in declared.inputs),
            outputs=tuple(_with_shape(spec, self.outputs, 1) for spec in declared.outputs),
        )

    def show(self, signature: ModelSignature) -> ModelSignature:
        """What clients see of the artefact's signature."""
        return dataclasses.replace(
            signature,
            inputs=tuple(_with_shape(spec, self.inputs, 0) for spec in signature.inputs),
            outputs=tuple(_with_shape(spec, self.outputs, 0) for spec in signature.outputs),
        )


def _with_shape(spec: TensorSpec, shapes: Mapping[str, tuple[Shape, Shape]], side: int) -> TensorSpec:
    return dataclasses.replace(spec, shape=shapes[spec.name][side]) if spec.name in shapes else spec


class ReshapedBackend(Backend):
    """A backend whose instances take the clients' shapes; ``inner`` is the signature that the real one loads."""

    def __init__(self, backend: Backend, reshaping: Reshaping, inner: ModelSignature) -> None:
        self.name = backend.name  # type: ignore[misc]
        self._backend = backend
        self._reshaping = reshaping
        self._inner = inner

    def inspect(self, context: LoadContext) -> ModelSignature:
        """The clients' signature."""
        return self._reshaping.show(self._inner)

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        """An instance of the real backend behind one that changes shapes."""
        instance = self._backend.load(context, self._inner)
        if isinstance(instance, RequestInstance):
            instance.close()
            raise ModelLoadError(
                f"model '{context.model_name}': reshape: a model that takes its requests one by one gets them as they "
                "are; write the model's shape in 'dims'"
            )
        return _ReshapedInstance(instance, self._reshaping, int(self._inner.max_batch_size > 0))


class _ReshapedInstance(ModelInstance):
    """``n_batch`` dimensions in front belong to neither shape. Not compiled: there shapes are the signature's."""

    def __init__(self, instance: ModelInstance, reshaping: Reshaping, n_batch: int) -> None:
        self._instance = instance
        self._reshaping = reshaping
        self._n_batch = n_batch

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        taken = {name: self._change(name, array, self._reshaping.inputs, 0) for name, array in inputs.items()}
        given = self._instance.execute(taken)
        return {name: self._change(name, array, self._reshaping.outputs, 1) for name, array in given.items()}

    def _change(self, name: str, array: NumpyArray, shapes: Mapping[str, tuple[Shape, Shape]], side: int) -> NumpyArray:
        both = shapes.get(name)
        if both is None:
            return array
        found = array.shape[self._n_batch :]
        wanted, other = both[side], both[1 - side]
        if len(found) != len(wanted) or any(want not in (-1, got) for want, got in zip(wanted, found, strict=True)):
            batch = ["rows"] * self._n_batch
            raise ModelExecutionError(
                f"output '{name}' has shape {list(array.shape)}, expected {[*batch, *wanted]} as its reshape says"
            )
        return array.reshape(array.shape[: self._n_batch] + _fill(other, wanted, found))

    def close(self) -> None:
        self._instance.close()


def _fill(shape: Shape, other: Shape, sizes: Sequence[int]) -> Shape:
    """``shape`` with the sizes that stand where ``other`` has -1, in their order."""
    variable = iter([size for want, size in zip(other, sizes, strict=True) if want == -1])
    return tuple(next(variable) if dim == -1 else dim for dim in shape)
