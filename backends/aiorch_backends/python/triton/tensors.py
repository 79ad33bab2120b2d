"""``pb_utils.Tensor``, and the conversions between Triton's, numpy's and the protocol's types."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from aiorch_backends.python.triton.failures import TritonModelException
from aiorch_server.types import DataType, NumpyArray

_CPU_DEVICES = (1, 3)  # DLPack: kDLCPU, kDLCUDAHost
_NUMPY_BY_NUMBER = {member.number: member.numpy.type for member in DataType if member is not DataType.BF16}
_BY_NUMBER = {member.number: member for member in DataType}


def triton_to_numpy_type(data_type: int) -> Any:
    """The numpy scalar type for a number of model_config.proto's DataType; None where there is none."""
    return _NUMPY_BY_NUMBER.get(data_type)


def numpy_to_triton_type(data_type: Any) -> int | None:
    """The number of model_config.proto's DataType for a numpy type; None where there is none."""
    try:
        return DataType.from_numpy(data_type).number
    except TypeError:
        return None


def triton_string_to_numpy(triton_type_string: str) -> Any:
    """The numpy scalar type for ``TYPE_FP32`` and so on; KeyError for what numpy cannot hold."""
    datatype = DataType.from_config_name(triton_type_string)
    if datatype is DataType.BF16:
        raise KeyError(triton_type_string)
    return bool if datatype is DataType.BOOL else datatype.numpy.type


def serialize_byte_tensor(input_tensor: NumpyArray) -> bytes | tuple[()] | None:
    """Each element with its 4-byte little-endian length in front; () for an empty array, None for a numeric one."""
    if input_tensor.size == 0:
        return ()
    if input_tensor.dtype.kind not in "OS":
        return None
    parts: list[bytes] = []
    for element in input_tensor.ravel().tolist():
        text = element if isinstance(element, bytes) else str(element).encode("utf-8")
        parts += (len(text).to_bytes(4, "little"), text)
    return b"".join(parts)


def deserialize_bytes_tensor(encoded_tensor: bytes) -> NumpyArray:
    """The elements of ``serialize_byte_tensor`` as a flat array of ``bytes``; ValueError where it is cut off."""
    view = memoryview(encoded_tensor).cast("B")
    elements: list[bytes] = []
    at = 0
    while at < len(view):
        size = int.from_bytes(view[at : at + 4], "little")
        if at + 4 + size > len(view):
            raise ValueError(f"element {len(elements)} needs {4 + size} bytes, {len(view) - at} are left")
        elements.append(bytes(view[at + 4 : at + 4 + size]))
        at += 4 + size
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array


class Tensor:
    """A named array; numpy's types say Triton's, but for BF16, which only comes from the server or over DLPack."""

    __slots__ = ("_array", "_datatype", "_name")

    def __init__(self, name: str, tensor: Any) -> None:
        if not name:
            raise TritonModelException("Tensor name cannot be an empty string.")
        if not isinstance(tensor, np.ndarray):
            raise TypeError(f"Tensor '{name}' takes a numpy array, not a {type(tensor).__name__}")
        try:
            self._datatype = DataType.from_numpy(tensor.dtype)
        except TypeError as error:
            raise TritonModelException(f"Tensor '{name}': {error}") from None
        self._name = name
        self._array: NumpyArray = np.ascontiguousarray(tensor).reshape(tensor.shape)

    def __repr__(self) -> str:
        return f"<Tensor {self._name!r} {self._datatype.value} {list(self._array.shape)}>"

    @classmethod
    def _of(cls, name: str, array: NumpyArray, datatype: DataType) -> Tensor:
        tensor = cls.__new__(cls)
        tensor._name, tensor._array, tensor._datatype = name, array, datatype
        return tensor

    def name(self) -> str:
        """As the model's configuration has it."""
        return self._name

    def as_numpy(self) -> NumpyArray:
        """The array itself, no copy; BYTES as objects of ``bytes``."""
        if self._datatype is DataType.BF16:
            raise TritonModelException("TYPE_BF16 is not supported by numpy; take the tensor with to_dlpack")
        return self._array

    def triton_dtype(self) -> int:
        """The number of model_config.proto's DataType."""
        return self._datatype.number

    def shape(self) -> list[int]:
        """With the batch dimension."""
        return list(self._array.shape)

    def is_cpu(self) -> bool:
        """Always: tensors reach this backend in main memory."""
        return True

    def to_dlpack(self) -> Any:
        """A DLPack capsule over the same memory."""
        return self.__dlpack__()

    def __dlpack__(self, stream: Any = None, **options: Any) -> Any:
        """DLPack's protocol; BF16 needs torch."""
        if self._datatype is DataType.BYTES:
            raise TritonModelException("DLPack does not have support for string tensors.")
        # DLPack cannot say "read only"
        array: Any = self._array if self._array.flags.writeable else self._array.copy()
        if self._datatype is DataType.BF16:
            import torch  # only for who has such tensors

            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).__dlpack__()
        return array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        """Main memory."""
        return (1, 0)

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> Tensor:
        """A tensor over what ``tensor`` holds: a DLPack capsule, or an object with ``__dlpack__``."""
        if not name:
            raise TritonModelException("Tensor name cannot be an empty string.")
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(tensor, torch.Tensor):
            return _from_torch(name, tensor.detach(), torch)
        if type(tensor).__name__ == "PyCapsule":
            if torch is not None:
                return _from_torch(name, torch.utils.dlpack.from_dlpack(tensor), torch)
            tensor = _Capsule(tensor)
        if not hasattr(tensor, "__dlpack__") or not hasattr(tensor, "__dlpack_device__"):
            raise TritonModelException(
                "Provided tensor is not supported. Tensor must be a DLPack capsule or have `__dlpack__` and "
                "`__dlpack_device__` attributes"
            )
        device = tensor.__dlpack_device__()[0]
        if device not in _CPU_DEVICES:
            raise TritonModelException(f"DLDevice type {int(device)} is not supported here, move the tensor to the CPU")
        return Tensor(name, np.from_dlpack(tensor))


class _Capsule:
    """Gives a capsule to numpy, which takes objects only."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **options: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def _from_torch(name: str, tensor: Any, torch: Any) -> Tensor:
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return Tensor._of(name, tensor.view(torch.int16).numpy().view(np.uint16), DataType.BF16)
    return Tensor(name, tensor.numpy())
