"""Inputs made up from a signature, and declarations that contradict one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from aiorch_server.backend import DeclaredSignature
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec

#: What stands in for a variable dimension.
FREE_SIZE = 3
_TEXTS = (b"", b"plain", "Zürich 東京".encode(), b"two words", "é".encode() * 50)


def make_inputs(signature: ModelSignature, rows: int, seed: int = 0) -> dict[str, NumpyArray]:
    """Reproducible arrays for all inputs: ``rows`` first where the model batches, 3 for each variable dimension.

    Floats are in [-1, 1), integers in [0, 8), BYTES are UTF-8 texts with an empty one among them, BF16 are the bit
    patterns of floats.
    """
    generator = np.random.default_rng(seed)
    front = (rows,) if signature.max_batch_size else ()
    arrays: dict[str, NumpyArray] = {}
    for spec in signature.inputs:
        shape = front + tuple(FREE_SIZE if size == -1 else size for size in spec.shape)
        arrays[spec.name] = _make_array(spec.datatype, shape, generator)
    return arrays


def _make_array(datatype: DataType, shape: tuple[int, ...], generator: np.random.Generator) -> NumpyArray:
    if datatype is DataType.BYTES:
        count = int(np.prod(shape))
        texts = np.empty(count, dtype=np.object_)
        offset = int(generator.integers(len(_TEXTS)))
        texts[:] = [_TEXTS[(offset + index) % len(_TEXTS)] for index in range(count)]
        return texts.reshape(shape)
    if datatype is DataType.BF16:
        floats = generator.uniform(-1, 1, shape).astype(np.float32)
        return np.ascontiguousarray((floats.view(np.uint32) >> 16).astype(np.uint16)).reshape(shape)
    if datatype.numpy.kind == "f":
        return np.asarray(generator.uniform(-1, 1, shape)).astype(datatype.numpy)
    if datatype is DataType.BOOL:
        return generator.integers(0, 2, shape).astype(np.bool_)
    return np.asarray(generator.integers(0, 8, shape)).astype(datatype.numpy)


def contradict(signature: ModelSignature) -> Iterator[tuple[str, DeclaredSignature]]:
    """Declarations that differ from ``signature`` in one point each, with the word that the refusal must hold."""
    correct = DeclaredSignature(signature.inputs, signature.outputs, signature.max_batch_size)
    for kind, specs in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        first, rest = specs[0], specs[1:]
        other = DataType.INT8 if first.datatype is not DataType.INT8 else DataType.FP32
        for wrong in (
            replace(first, name="no_such_tensor"),
            replace(first, datatype=other),
            replace(first, shape=(*first.shape, 7)),
        ):
            yield wrong.name, _replace_tensors(correct, kind, (wrong, *rest))


def _replace_tensors(declared: DeclaredSignature, kind: str, specs: tuple[TensorSpec, ...]) -> DeclaredSignature:
    return replace(declared, inputs=specs) if kind == "inputs" else replace(declared, outputs=specs)
