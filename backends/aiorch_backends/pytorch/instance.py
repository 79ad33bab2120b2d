"""Running batches through a bound torch program."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from aiorch_backends.pytorch.tensors import TorchCall, find_datatype, import_torch, torch_dtype
from aiorch_server.backend import ModelInstance
from aiorch_server.errors import ModelExecutionError
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec


class TorchInstance(ModelInstance):
    """Inputs are seen without a copy on the CPU; ``device`` is where it really runs."""

    def __init__(self, call: TorchCall, signature: ModelSignature, device: str, threads: int) -> None:
        self._torch: Any = import_torch()
        self._call: TorchCall | None = call
        self._inputs = {spec.name: spec.datatype for spec in signature.inputs}
        self._outputs = [(spec, torch_dtype(spec.datatype)) for spec in signature.outputs]
        self._threads = threads
        self.device = device
        self._claim_thread()

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        """Outputs may share memory with inputs or parameters; ModelExecutionError for an output of the wrong type."""
        call = self._call
        if call is None:
            raise ModelExecutionError("the instance is closed")
        if threading.get_ident() != self._thread:
            self._claim_thread()
        with self._torch.inference_mode():
            results = call({name: self._to_tensor(name, array) for name, array in inputs.items()})
            return {
                spec.name: self._to_array(spec, dtype, result)
                for (spec, dtype), result in zip(self._outputs, results, strict=True)
            }

    def close(self) -> None:
        """Lets go of the program and its weights."""
        self._call = None

    def _claim_thread(self) -> None:
        # OpenMP keeps the number of threads per calling thread, so it is set in the one that runs the batches.
        self._torch.set_num_threads(self._threads)
        self._thread = threading.get_ident()

    def _to_tensor(self, name: str, array: NumpyArray) -> Any:
        # from_numpy warns about read-only memory; programs may write in place, so such memory is copied.
        tensor = self._torch.from_numpy(array if array.flags.writeable else array.copy())
        if self._inputs[name] is DataType.BF16:
            tensor = tensor.view(self._torch.bfloat16)
        return tensor if self.device == "cpu" else tensor.to(self.device)

    def _to_array(self, spec: TensorSpec, dtype: Any, result: Any) -> NumpyArray:
        if not isinstance(result, self._torch.Tensor):
            raise ModelExecutionError(f"output '{spec.name}' is a {type(result).__name__}, not a tensor")
        if result.dtype is not dtype:
            found = find_datatype(result.dtype)
            raise ModelExecutionError(
                f"output '{spec.name}' is {result.dtype if found is None else found.config_name}, but "
                f"{spec.datatype.config_name} is declared"
            )
        if spec.datatype is DataType.BF16:
            result = result.view(self._torch.uint16)
        return np.ascontiguousarray(result.cpu().numpy()).reshape(tuple(result.shape))
