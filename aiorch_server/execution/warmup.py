"""Warm-up batches: run once by each instance before it serves, so that no client pays for a first execution.

Besides the ``model_warmup`` entries of a configuration, each instance runs a batch of zeros with one row and one with
the largest number of rows. Where a signature has variable sizes or strings, those zeros are only a guess (a network may
need images of at least 32 x 32), so a guess that fails is logged, while any other failing warm-up fails the load.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aiorch_server.backend import ModelInstance, RequestInstance
from aiorch_server.config.model import ModelConfig
from aiorch_server.config.parameters import read_flag
from aiorch_server.config.tensors import ModelWarmup, WarmupInput
from aiorch_server.errors import CapacityError, ModelLoadError, NotFoundError, RequestError
from aiorch_server.execution.rehearsal import rehearse
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec

logger = logging.getLogger(__name__)

#: A tensor above this size is not made up for a warm-up: it would cost more memory than it saves time.
MAX_SAMPLE_BYTES = 256 * 1024 * 1024
MAX_REPETITIONS = 1000
_HINT = '; the parameter warmup "false" leaves out the warm-up with zeros'


@dataclass(frozen=True, slots=True)
class WarmupSample:
    """Inputs of one batch, how often it runs, and whether its failure fails the load (``hint``: how to avoid that)."""

    name: str
    inputs: Mapping[str, NumpyArray]
    rows: int
    count: int = 1
    is_required: bool = True
    hint: str = ""

    @property
    def is_made_up(self) -> bool:
        """Whether nobody asked for it by name."""
        return bool(self.hint)


def make_samples(config: ModelConfig, signature: ModelSignature, directory: Path) -> list[WarmupSample]:
    """All warm-up batches of a model whose folder is ``directory``.

    The parameter ``warmup: "false"`` leaves out the batches of zeros. Raises ModelLoadError for an entry of
    ``model_warmup`` that does not fit the signature or whose file is missing.
    """
    samples: list[WarmupSample] = []
    if read_flag(config.to_strings(), "warmup"):
        for rows in sorted({1, max(1, signature.max_batch_size)}):
            sample = _make_zeros(signature, rows)
            if sample is not None:
                samples.append(sample)
    samples.extend(_make_configured(entry, signature, directory) for entry in config.model_warmup)
    return samples


def warm_up(
    instance: ModelInstance, signature: ModelSignature, samples: Sequence[WarmupSample], label: str = "model"
) -> None:
    """Runs all samples on ``instance`` and checks what comes out against ``signature``; ``label`` is for the log.

    Raises ModelLoadError when a required sample fails or gives outputs that the signature does not promise. Instances
    that take requests get no zeros that nobody asked for: their models may do anything with a request.
    """
    for sample in samples:
        if sample.is_made_up and isinstance(instance, RequestInstance):
            continue
        try:
            for _ in range(sample.count):
                if isinstance(instance, RequestInstance):
                    rehearse(instance, signature, sample.inputs)
                    continue
                problem = find_mismatch(instance.execute(sample.inputs), signature, sample.rows)
                if problem:
                    raise ModelLoadError(problem)
        except Exception as error:
            # A model may refuse zeros that nobody asked for, or ask others that are not loaded yet.
            is_refusal = isinstance(error, RequestError | NotFoundError | CapacityError)
            if sample.is_required and not (sample.is_made_up and is_refusal):
                raise ModelLoadError(
                    f"warm-up '{sample.name}' failed: {type(error).__name__}: {error}{sample.hint}"
                ) from error
            reason = f"{type(error).__name__}: {error}"
            logger.warning("%s: warm-up '%s' failed and is left out: %s", label, sample.name, reason)


def find_mismatch(outputs: Mapping[str, object], signature: ModelSignature, rows: int) -> str:
    """What is wrong with ``outputs`` of a batch of ``rows`` rows, "" if nothing."""
    for spec in signature.outputs:
        array = outputs.get(spec.name)
        if array is None:
            return f"output '{spec.name}' is missing, the model gave {sorted(outputs)}"
        if not isinstance(array, np.ndarray):
            return f"output '{spec.name}' is a {type(array).__name__}, expected a numpy array"
        is_string = array.dtype.kind in "OSU"
        if is_string != (spec.datatype is DataType.BYTES) or not (is_string or array.dtype == spec.datatype.numpy):
            return f"output '{spec.name}' has dtype {array.dtype}, expected {spec.datatype.numpy}"
        expected = (rows, *spec.shape) if signature.max_batch_size else spec.shape
        if len(array.shape) != len(expected) or any(
            want not in (-1, got) for want, got in zip(expected, array.shape, strict=True)
        ):
            return f"output '{spec.name}' has shape {list(array.shape)}, expected {list(expected)}"
    return ""


def _whole_shape(spec: TensorSpec, signature: ModelSignature, rows: int) -> tuple[int, ...]:
    dims = tuple(1 if dim < 0 else dim for dim in spec.shape)
    return (rows, *dims) if signature.max_batch_size else dims


def _make_zeros(signature: ModelSignature, rows: int) -> WarmupSample | None:
    required = [spec for spec in signature.inputs if not spec.optional]
    shapes = {spec.name: _whole_shape(spec, signature, rows) for spec in required}
    size_bytes = sum(math.prod(shapes[spec.name]) * (spec.datatype.itemsize or 64) for spec in required)
    if size_bytes > MAX_SAMPLE_BYTES:
        logger.debug("warm-up with %d rows of zeros is left out: it takes %d bytes", rows, size_bytes)
        return None
    is_guess = any(spec.datatype is DataType.BYTES or min(spec.shape, default=0) < 0 for spec in required)
    inputs = {spec.name: _fill(spec.datatype, shapes[spec.name], None) for spec in required}
    return WarmupSample(
        f"zeros, {rows} row{'s' if rows > 1 else ''}", inputs, rows, is_required=not is_guess, hint=_HINT
    )


def _fill(datatype: DataType, shape: Sequence[int], random: np.random.Generator | None) -> NumpyArray:
    """Zeros, or random values where a generator is given; empty strings for BYTES."""
    if datatype is DataType.BYTES:
        strings = np.full(shape, b"", dtype=np.object_)
        if random is not None:
            strings.reshape(-1)[:] = [random.bytes(8).hex().encode() for _ in range(strings.size)]
        return strings
    if random is None:
        return np.zeros(shape, dtype=datatype.numpy)
    if datatype.numpy.kind == "f":
        return random.random(shape).astype(datatype.numpy)
    high = 2 if datatype is DataType.BOOL else 128
    return random.integers(0, high, shape).astype(datatype.numpy)


def _make_configured(entry: ModelWarmup, signature: ModelSignature, directory: Path) -> WarmupSample:
    where = f"model_warmup '{entry.name}'"
    specs = {spec.name: spec for spec in signature.inputs}
    missing = [name for name, spec in specs.items() if not spec.optional and name not in entry.inputs]
    unknown = [name for name in entry.inputs if name not in specs]
    if missing or unknown:
        raise ModelLoadError(f"{where}: inputs {missing} are missing, inputs {unknown} do not exist in the model")
    if entry.count > MAX_REPETITIONS:
        raise ModelLoadError(f"{where}: count is {entry.count}, at most {MAX_REPETITIONS} is right")
    rows = max(1, entry.batch_size or 1)
    if signature.max_batch_size and rows > signature.max_batch_size:
        raise ModelLoadError(f"{where}: batch_size is {rows}, the model's max_batch_size is {signature.max_batch_size}")
    inputs = {}
    for name, given in entry.inputs.items():
        inputs[name] = _make_input(f"{where}, input '{name}'", given, specs[name], signature, rows, directory)
    return WarmupSample(entry.name, inputs, rows, count=max(1, entry.count))


def _make_input(
    where: str, given: WarmupInput, spec: TensorSpec, signature: ModelSignature, rows: int, directory: Path
) -> NumpyArray:
    datatype, dims = given.data_type, given.dims
    if datatype is not spec.datatype:
        raise ModelLoadError(
            f"{where}: data_type is {datatype.config_name}, the model takes {spec.datatype.config_name}"
        )
    if len(dims) != len(spec.shape) or any(w not in (-1, g) for w, g in zip(spec.shape, dims, strict=True)):
        raise ModelLoadError(f"{where}: dims are {list(dims)}, the model takes {list(spec.shape)}")
    shape = (rows, *dims) if signature.max_batch_size else dims
    if math.prod(shape) * (datatype.itemsize or 64) > MAX_SAMPLE_BYTES:
        raise ModelLoadError(f"{where}: shape {list(shape)} takes more than {MAX_SAMPLE_BYTES} bytes")
    if given.input_data_file:
        return _read_input(where, given.input_data_file, datatype, dims, shape, directory)
    # A fixed seed: a warm-up that fails must fail again when somebody looks for the reason.
    return _fill(datatype, shape, np.random.default_rng(0) if given.random_data else None)


def _read_input(
    where: str, name: str, datatype: DataType, dims: Sequence[int], shape: Sequence[int], directory: Path
) -> NumpyArray:
    """One row in V2's raw form from ``<model>/warmup/<name>``, repeated for all rows."""
    folder = (directory / "warmup").resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise ModelLoadError(f"{where}: file '{name}' is outside the model's warmup folder")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{where}: '{name}' cannot be read from the warmup folder: {error.strerror}") from None
    try:
        row: NumpyArray
        if datatype is DataType.BYTES:
            row = _split_strings(raw, math.prod(dims)).reshape(dims)
        else:
            row = np.frombuffer(raw, dtype=datatype.numpy).reshape(dims)
    except (ValueError, struct.error) as error:
        raise ModelLoadError(
            f"{where}: file '{name}' holds {len(raw)} bytes, which do not make {list(dims)}: {error}"
        ) from None
    return np.ascontiguousarray(np.broadcast_to(row, shape))


def _split_strings(raw: bytes, count: int) -> NumpyArray:
    strings = np.empty(count, dtype=np.object_)
    position = 0
    for index in range(count):
        (size,) = struct.unpack_from("<I", raw, position)
        if position + 4 + size > len(raw):
            raise ValueError(f"element {index} runs past the end")
        strings[index] = raw[position + 4 : position + 4 + size]
        position += 4 + size
    if position != len(raw):
        raise ValueError(f"{len(raw) - position} bytes are left over")
    return strings
