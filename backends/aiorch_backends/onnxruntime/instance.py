"""Running batches on an ONNX Runtime session."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from aiorch_backends.common import decode_text, encode_text, import_framework
from aiorch_server.backend import ModelInstance
from aiorch_server.types import DataType, ModelSignature, NumpyArray

if TYPE_CHECKING:
    from aiorch_backends.onnxruntime.native import NativeSession

#: onnx.TensorProto.BFLOAT16, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_ONNX_BFLOAT16 = 16


class OnnxInstance(ModelInstance):
    """Tensors that numpy carries as they are; ``provider`` is the execution provider that the session got."""

    def __init__(self, session: Any, signature: ModelSignature) -> None:
        self._session = session
        self._names = [spec.name for spec in signature.outputs]
        self.provider: str = session.get_providers()[0]

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        """Only the served outputs are computed; they are fresh arrays. Releases the interpreter lock while it runs."""
        return dict(zip(self._names, self._session.run(self._names, inputs), strict=True))

    def close(self) -> None:
        """Lets go of the session and its thread pool."""
        self._session = None


class NativeInstance(ModelInstance):
    """Runs over the C API: the server needs no interpreter for its batches."""

    def __init__(self, session: NativeSession, signature: ModelSignature) -> None:
        inputs, outputs = ([spec.name for spec in side] for side in (signature.inputs, signature.outputs))
        self._session = session
        self._runner = session.make_runner(inputs, outputs)
        self.provider: str = session.get_providers()[0]

    @property
    def compiled(self) -> object:
        """The runner's capsule."""
        return self._runner.capsule

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        """Only the served outputs are computed; they are fresh arrays. Releases the interpreter lock while it runs."""
        return self._runner.execute(inputs)

    def close(self) -> None:
        """Frees what the last batch left; the session goes with the instance."""
        self._runner.close()


class TextInstance(OnnxInstance):
    """Also BYTES, which ONNX Runtime takes and gives as UTF-8 text."""

    def __init__(self, session: Any, signature: ModelSignature) -> None:
        super().__init__(session, signature)
        self._text_inputs = {spec.name for spec in signature.inputs if spec.datatype is DataType.BYTES}
        self._text_outputs = [spec.name for spec in signature.outputs if spec.datatype is DataType.BYTES]

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        """As in the base; RequestError for BYTES that are not UTF-8."""
        feeds = {
            name: decode_text(array, name) if name in self._text_inputs else array for name, array in inputs.items()
        }
        outputs = dict(super().execute(feeds))
        for name in self._text_outputs:
            outputs[name] = encode_text(outputs[name])
        return outputs


class BrainFloatInstance(OnnxInstance):
    """Also BF16, which numpy has not: tensors travel as ONNX Runtime's own values over ``uint16`` bit patterns."""

    def __init__(self, session: Any, signature: ModelSignature) -> None:
        super().__init__(session, signature)
        self._values = import_framework("onnxruntime", extra="onnx").OrtValue
        self._brain_inputs = {spec.name for spec in signature.inputs if spec.datatype is DataType.BF16}
        self._brain_outputs = {spec.name for spec in signature.outputs if spec.datatype is DataType.BF16}

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        """As in the base."""
        feeds = {name: self._wrap(name, array) for name, array in inputs.items()}
        results = self._session.run_with_ort_values(self._names, feeds)
        return {name: self._unwrap(name, value) for name, value in zip(self._names, results, strict=True)}

    def _wrap(self, name: str, array: NumpyArray) -> Any:
        if name in self._brain_inputs:
            return self._values.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
        return self._values.ortvalue_from_numpy(array)

    def _unwrap(self, name: str, value: Any) -> NumpyArray:
        if name not in self._brain_outputs:
            array: NumpyArray = value.numpy()
            return array
        # OrtValue.numpy() knows no bfloat16; the bytes are copied out while the value is alive.
        raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
        return np.frombuffer(bytearray(raw), dtype=np.uint16).reshape(value.shape())
