"""Tensors from files and standard input, and from nothing: made up for a model's inputs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from aiorch_client import ModelMetadata, TensorMetadata

from aiorch_server.cli.output import UsageError

#: What one gRPC message may hold; more could not be sent.
MAX_BYTES = 2**31 - 1
_FORMATS = "a .npy or .npz file, or JSON: an array, or an object of arrays by input name"
_NUMPY: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "BF16": np.float32,
    "FP32": np.float32,
    "FP64": np.float64,
}


def read_inputs(arguments: Sequence[str]) -> Any:
    """The inputs in ``NAME=FILE`` or ``FILE`` arguments (``-`` is standard input): a mapping, or one array alone.

    UsageError says which argument is wrong and what would be right.
    """
    named: dict[str, Any] = {}
    alone: list[Any] = []
    if sum(argument.rpartition("=")[2] == "-" for argument in arguments) > 1:
        raise UsageError("--input: standard input (-) can be read once only")
    for argument in arguments:
        name, separator, path = argument.partition("=")
        # a file may have '=' in its name: one that is there is meant as it stands
        if not separator or Path(argument).is_file():
            name, path = "", argument
        found = _read(path)
        if not isinstance(found, Mapping):
            if name in named:
                raise UsageError(f"--input {argument}: input '{name}' is given twice")
            if name:
                named[name] = found
            else:
                alone.append(found)
            continue
        if name and len(found) != 1:
            raise UsageError(f"--input {argument}: the file holds {len(found)} arrays, NAME= needs exactly one")
        for key, value in found.items():
            if (name or key) in named:
                raise UsageError(f"--input {argument}: input '{name or key}' is given twice")
            named[name or key] = value
    if alone and (named or len(alone) > 1):
        raise UsageError("several inputs need names: --input NAME=FILE for each")
    return alone[0] if alone else named


def make_inputs(
    metadata: ModelMetadata,
    *,
    rows: int,
    is_batching: bool,
    shapes: Mapping[str, Sequence[int]],
    generator: np.random.Generator | None,
) -> dict[str, npt.NDArray[Any]]:
    """Arrays for all inputs of a model: random, or zeros where ``generator`` is None.

    ``rows`` fills the first dimension of a batching model, ``shapes`` gives the others (by input name, without the
    batch dimension); what is open beyond that becomes 1.
    """
    unknown = sorted(shapes.keys() - {tensor.name for tensor in metadata.inputs})
    if unknown:
        raise UsageError(f"--shape names {unknown}, the inputs are {[tensor.name for tensor in metadata.inputs]}")
    made = {}
    for tensor in metadata.inputs:
        inner = tensor.shape[1:] if is_batching else tensor.shape
        wanted = tuple(shapes.get(tensor.name, [max(size, 1) if size == -1 else size for size in inner]))
        fits = len(wanted) == len(inner) and all(has in (-1, want) for has, want in zip(inner, wanted, strict=True))
        if not fits:
            raise UsageError(f"--shape {tensor.name}:{_join(wanted)} does not fit {list(inner)} of the model")
        made[tensor.name] = _make(tensor, (rows, *wanted) if is_batching else wanted, generator)
    return made


def parse_shapes(arguments: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes in ``NAME:D1,D2`` arguments."""
    shapes = {}
    for argument in arguments:
        name, separator, text = argument.rpartition(":")
        sizes = text.split(",") if text else []
        if not separator or not name or not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
            raise UsageError(f"--shape {argument}: expected NAME:D1,D2 with sizes above 0, for example image:3,224,224")
        shapes[name] = tuple(map(int, sizes))
    return shapes


def _make(tensor: TensorMetadata, shape: tuple[int, ...], generator: np.random.Generator | None) -> npt.NDArray[Any]:
    if tensor.datatype == "BYTES":
        array = np.empty(shape, np.object_)
        array[...] = b"" if generator is None else generator.bytes(8).hex().encode()
        return array
    if tensor.datatype not in _NUMPY:
        raise UsageError(f"input '{tensor.name}' is {tensor.datatype}, for which no values can be made: use --input")
    dtype = np.dtype(_NUMPY[tensor.datatype])
    if generator is None:
        return np.zeros(shape, dtype)
    # small numbers are the likeliest to be right for indices, tokens and measurements alike
    return generator.random(shape).astype(dtype) if dtype.kind == "f" else generator.integers(0, 2, shape).astype(dtype)


def _read(path: str) -> Any:
    where = "standard input" if path == "-" else path
    try:
        if path == "-":
            content = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--input {where} cannot be read: {error.strerror}; expected {_FORMATS}") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"--input {where} is larger than {MAX_BYTES} bytes, which no request can hold")
    try:
        if content.startswith(b"\x93NUMPY"):
            return np.load(io.BytesIO(content), allow_pickle=False)
        if content.startswith(b"PK"):
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                return dict(archive)
        found = json.loads(content)
    except Exception as error:  # numpy and zipfile raise many kinds for a broken file
        raise UsageError(f"--input {where} cannot be understood: {error}; expected {_FORMATS}") from error
    return _name_v2_inputs(found, where) if isinstance(found, dict) and isinstance(found.get("inputs"), list) else found


def _name_v2_inputs(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tensors of a V2 REST request (``{"inputs": [{"name", "shape", "data"}]}``), as it is written for curl."""
    try:
        named = {}
        for tensor in document["inputs"]:
            items = np.array(tensor["data"], np.object_)
            named[tensor["name"]] = items.reshape(tensor["shape"]).tolist()
        return named
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--input {where}: not a V2 request: {error!r}; expected {_FORMATS}") from error


def _join(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))
