"""Running batches through an opened TensorFlow program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from aiorch_backends.common import import_framework
from aiorch_backends.tensorflow.programs import OpenedProgram
from aiorch_server.backend import ModelInstance
from aiorch_server.errors import ModelExecutionError
from aiorch_server.types import DataType, ModelSignature, NumpyArray


class TensorFlowInstance(ModelInstance):
    """Inputs are copied into tensors (TensorFlow needs its own alignment); ``device`` is where it runs."""

    def __init__(self, program: OpenedProgram, signature: ModelSignature, device: str) -> None:
        self._tf: Any = import_framework("tensorflow", extra="tensorflow")
        self._program: OpenedProgram | None = program
        self._inputs = {spec.name: spec.datatype for spec in signature.inputs}
        self._outputs = [(spec.name, spec.datatype) for spec in signature.outputs]
        self.device = device

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        """Outputs are fresh arrays."""
        program = self._program
        if program is None:
            raise ModelExecutionError("the instance is closed")
        with self._tf.device(self.device):
            results = program.call({name: self._to_tensor(name, array) for name, array in inputs.items()})
            return {name: _to_array(results[name], kind) for name, kind in self._outputs}

    def close(self) -> None:
        """Lets go of the model and its variables."""
        self._program = None

    def _to_tensor(self, name: str, array: NumpyArray) -> Any:
        if self._inputs[name] is DataType.BF16:
            return self._tf.constant(array.view(self._tf.bfloat16.as_numpy_dtype))
        if self._inputs[name] is DataType.BYTES:
            return self._tf.constant(array, dtype=self._tf.string)
        return self._tf.constant(array)


def _to_array(tensor: Any, kind: DataType) -> NumpyArray:
    array = np.asarray(tensor.numpy(), dtype=np.object_ if kind is DataType.BYTES else None)
    return array.view(np.uint16) if kind is DataType.BF16 else array
