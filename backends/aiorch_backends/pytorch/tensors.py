"""What both formats share: torch dtypes, names of places, and the shape of a loaded program."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from aiorch_backends.common import import_framework
from aiorch_server.backend import LoadContext
from aiorch_server.types import DataType, ModelSignature, TensorSpec

#: Tensors by input name in, outputs in the signature's order out; the caller holds inference mode.
TorchCall = Callable[[Mapping[str, Any]], Sequence[Any]]

_TORCH_NAMES = {
    DataType.BOOL: "bool",
    DataType.UINT8: "uint8",
    DataType.UINT16: "uint16",
    DataType.UINT32: "uint32",
    DataType.UINT64: "uint64",
    DataType.INT8: "int8",
    DataType.INT16: "int16",
    DataType.INT32: "int32",
    DataType.INT64: "int64",
    DataType.FP16: "float16",
    DataType.FP32: "float32",
    DataType.FP64: "float64",
    DataType.BF16: "bfloat16",
}
_DATATYPES = {f"torch.{name}": datatype for datatype, name in _TORCH_NAMES.items()}
_INDEXED = re.compile(r"(?:INPUT|OUTPUT)__(\d{1,4})")


class TorchProgram(Protocol):
    """A loaded artefact of either format."""

    def inspect(self, context: LoadContext) -> ModelSignature:
        """The signature, completed from the declaration; ModelLoadError."""
        ...

    def bind(self, signature: ModelSignature, device: str) -> TorchCall:
        """Moves the program to ``device`` (torch's spelling) and gives what runs it."""
        ...


def import_torch() -> Any:
    """The framework; ModelLoadError when it is missing."""
    return import_framework("torch", extra="torch")


def torch_dtype(datatype: DataType) -> Any:
    """The torch dtype of a protocol type; None for BYTES, which torch has not."""
    name = _TORCH_NAMES.get(datatype)
    return None if name is None else getattr(import_torch(), name)


def find_datatype(dtype: Any) -> DataType | None:
    """The protocol's type of a torch dtype, None if it has none (complex, quantised, 8-bit floats)."""
    return _DATATYPES.get(str(dtype))


def find_place(name: str, names: Sequence[str]) -> int | None:
    """Where ``name`` stands among ``names``, directly or as ``INPUT__<i>`` / ``OUTPUT__<i>``; None for nowhere."""
    if name in names:
        return names.index(name)
    match = _INDEXED.fullmatch(name)
    if match is None or int(match[1]) >= len(names):
        return None
    return int(match[1])


def rename(names: Sequence[str], declared: Sequence[TensorSpec]) -> list[str]:
    """``names`` with those replaced that the declaration calls by their index."""
    renamed = list(names)
    for spec in declared:
        place = find_place(spec.name, names)
        if place is not None:
            renamed[place] = spec.name
    return renamed
