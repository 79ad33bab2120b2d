"""Classify and Regress: examples to the model's inputs, its outputs to classes or values.

TensorFlow Serving gives serialized examples to the model's one input, and the model takes them apart. Models of other
frameworks cannot: their inputs are filled here from the features of the same name. Which outputs are meant is told by
the names that TensorFlow Serving asks for ("classes", "scores", "outputs") or, without them, by there being only one
output of floating-point numbers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from math import prod
from typing import Any, Final

import numpy as np
from aiorch_proto.tfserving import core_pb2, serving_pb2

from aiorch_server.errors import PayloadTooLarge, RequestError
from aiorch_server.frontends.tfserving.elements import (
    FLOATS,
    Array,
    join_elements,
    pack_floats,
    pack_integers,
    read_elements,
    split_elements,
)
from aiorch_server.frontends.tfserving.models import Infer, Served
from aiorch_server.types import DataType, ModelSignature, Tensor, TensorSpec

#: From this size on examples are taken apart on another thread.
_LARGE_BYTES: Final = 1 << 16
#: Bound of all copies of a context together: it is sent once and belongs to every example.
MOST_CONTEXT_BYTES: Final = 16 << 20
#: From this number on classes are written on another thread.
_MANY_CLASSES: Final = 1 << 12
#: Values taken from messages in one step, between two chances for other threads to run (about 1 ms).
_CHUNK: Final = 1 << 14
_KINDS: Final = {"bytes_list": "bytes", "float_list": "float", "int64_list": "int64"}


async def classify(model: Served, rows: serving_pb2.Input, infer: Infer) -> serving_pb2.ClassificationResult:
    """The classes of each example; RequestError if the model has no outputs that could be classes."""
    classes, scores = choose_class_outputs(model.signature)
    inputs, count = await _prepare(model, rows)
    names = [spec.name for spec in (classes, scores) if spec is not None]
    outputs = {tensor.name: tensor for tensor in (await model.run(infer, inputs, names)).outputs}
    labels = _read_labels(outputs[classes.name], count) if classes is not None else []
    values = _read_scores(outputs[scores.name], count) if scores is not None else np.zeros((0, 0), np.float32)
    if classes is not None and scores is not None and len(labels[0]) != values.shape[1]:
        raise RequestError(
            f"Tensors class and score should match in dim_size(1). Got {len(labels[0])} vs. {values.shape[1]}"
        )
    if classes is None and scores is not None:
        known = scores.labels if len(scores.labels) == values.shape[1] else ("",) * values.shape[1]
        labels = [list(known)] * count
    if sum(map(len, labels)) < _MANY_CLASSES:
        return _make_classes(labels, values)
    return await asyncio.to_thread(_make_classes, labels, values)


def _make_classes(labels: Sequence[Sequence[str]], scores: Array) -> serving_pb2.ClassificationResult:
    """``scores`` may be empty: then all are 0."""
    result = serving_pb2.ClassificationResult()
    for index, row in enumerate(labels):
        target = result.classifications.add().classes
        for position, label in enumerate(row):
            target.add(label=label, score=float(scores[index, position]) if scores.size else 0.0)
    return result


async def regress(model: Served, rows: serving_pb2.Input, infer: Infer) -> serving_pb2.RegressionResult:
    """The value of each example; RequestError if the model has no output that could be values."""
    spec = choose_value_output(model.signature)
    inputs, count = await _prepare(model, rows)
    (output,) = (await model.run(infer, inputs, [spec.name])).outputs
    shape = tuple(output.shape)
    if not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)):
        raise RequestError(
            f"Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got {_shape(shape)}"
        )
    if shape[0] != count:
        raise RequestError(f"Input batch size did not match output batch size: {count} vs. {shape[0]}")
    result = serving_pb2.RegressionResult()
    for value in _read_floats(output, "output").reshape(-1).tolist():
        result.regressions.add(value=value)
    return result


def choose_class_outputs(signature: ModelSignature) -> tuple[TensorSpec | None, TensorSpec | None]:
    """The outputs with the classes' names and with their scores; at least one of them, or RequestError."""
    named = {spec.name: spec for spec in signature.outputs}
    classes, scores = named.get("classes"), named.get("scores")
    if classes is None and scores is None:
        scores = _choose_floats(signature, 2)
    if classes is None and scores is None:
        raise RequestError(
            'Expected classification signature outputs to contain at least one of "classes" or "scores", or one '
            f"output of numbers with two dimensions. Signature was: {_describe(signature)}"
        )
    return classes, scores


def choose_value_output(signature: ModelSignature) -> TensorSpec:
    """The output with the values, or RequestError."""
    for spec in signature.outputs:
        if spec.name == "outputs":
            return spec
    found = _choose_floats(signature, 1, 2)
    if found is None:
        raise RequestError(
            'No regression outputs found in SignatureDef: expected "outputs" or one output of numbers. Signature was: '
            f"{_describe(signature)}"
        )
    return found


async def _prepare(model: Served, rows: serving_pb2.Input) -> tuple[list[Tensor], int]:
    if rows.ByteSize() + _measure_context(rows) < _LARGE_BYTES:
        return build_inputs(model.signature, rows)
    return await asyncio.to_thread(build_inputs, model.signature, rows)


def build_inputs(signature: ModelSignature, rows: serving_pb2.Input) -> tuple[list[Tensor], int]:
    """The model's inputs from examples, and how many examples there are; RequestError says what does not fit.

    PayloadTooLarge where the examples' context takes more than MOST_CONTEXT_BYTES.
    """
    examples = _read_examples(rows)
    if not examples:
        raise RequestError("Input is empty.")
    features = [example.features.feature for example in examples]
    # Asked by name: a set of all names is made in one step, in which no other thread runs.
    given = {spec.name for spec in signature.inputs if any(spec.name in row for row in features)}
    specs = [spec for spec in signature.inputs if not spec.optional or spec.name in given]
    if len(specs) == 1 and specs[0].datatype is DataType.BYTES and specs[0].name not in given:
        serialized = [[example.SerializeToString(deterministic=True)] for example in examples]
        return [_stack(signature, specs[0], serialized, "bytes")], len(examples)
    return [_gather(signature, spec, features) for spec in specs], len(examples)


def _read_examples(rows: serving_pb2.Input) -> list[core_pb2.Example]:
    if rows.WhichOneof("kind") != "example_list_with_context":
        return list(rows.example_list.examples)
    copied_bytes = _measure_context(rows)
    if copied_bytes > MOST_CONTEXT_BYTES:
        raise PayloadTooLarge(
            f"the context takes {copied_bytes} bytes in all {len(rows.example_list_with_context.examples)} examples, "
            f"expected at most {MOST_CONTEXT_BYTES}"
        )
    merged = []
    for example in rows.example_list_with_context.examples:
        whole = core_pb2.Example()
        whole.CopyFrom(rows.example_list_with_context.context)
        whole.MergeFrom(example)  # a feature of both is the example's
        merged.append(whole)
    return merged


def _measure_context(rows: serving_pb2.Input) -> int:
    """Bytes of the context, once for each example."""
    if rows.WhichOneof("kind") != "example_list_with_context":
        return 0
    listed = rows.example_list_with_context
    size: int = listed.context.ByteSize()
    return size * len(listed.examples)


def _gather(signature: ModelSignature, spec: TensorSpec, features: Sequence[Mapping[str, Any]]) -> Tensor:
    kinds: set[str] = set()
    rows: list[Sequence[Any]] = []
    for index, row in enumerate(features):
        kind = row[spec.name].WhichOneof("kind") if spec.name in row else None
        if kind is None:
            raise RequestError(
                f"Name: <unknown>, Key: {spec.name}, Index: {index}.  Feature {spec.name} (data type: "
                f"{spec.datatype.value}) is required but could not be found."
            )
        kinds.add(kind)
        rows.append(getattr(row[spec.name], kind).value)
    if kinds == {"float_list", "int64_list"} and spec.datatype in FLOATS:
        kinds = {"float_list"}  # JSON does not tell 5 and 5.0 apart
    if len(kinds) != 1:
        raise RequestError(f"Feature {spec.name} is of different types: {', '.join(sorted(kinds))}")
    return _stack(signature, spec, rows, _KINDS[kinds.pop()])


def _stack(signature: ModelSignature, spec: TensorSpec, rows: Sequence[Sequence[Any]], kind: str) -> Tensor:
    """``rows`` as the input ``spec``; ``kind`` is how TensorFlow calls the type of their elements."""
    lengths = set(map(len, rows))
    if len(lengths) != 1:
        raise RequestError(f"Feature {spec.name} has different numbers of values: {sorted(lengths)}")
    shape = _shape_rows(signature, spec, len(rows), lengths.pop())
    flat = chain.from_iterable(rows)
    owner = f"Feature {spec.name}"
    if spec.datatype is DataType.BYTES and kind == "bytes":
        data = join_elements(flat)
    elif spec.datatype is DataType.BYTES or kind == "bytes" or (kind == "float" and spec.datatype not in FLOATS):
        raise RequestError(
            f"Key: {spec.name}.  Data types don't match. Expected type: {spec.datatype.value} but the feature is {kind}"
        )
    elif spec.datatype in FLOATS:
        values: Array = _collect(flat, np.float64, prod(shape))
        data = pack_floats(values, spec.datatype, owner)
    else:
        data = pack_integers(_collect(flat, np.int64, prod(shape)), spec.datatype, owner)
    return Tensor(spec.name, spec.datatype.value, shape, data)


def _collect(values: Iterator[Any], dtype: type[np.generic], count: int) -> Array:
    array: Array = np.empty(count, dtype)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        array[start : start + size] = np.fromiter(islice(values, size), dtype, size)
    return array


def _shape_rows(signature: ModelSignature, spec: TensorSpec, count: int, length: int) -> tuple[int, ...]:
    """The shape of ``count`` rows of ``length`` values as the input ``spec`` has it."""
    row = spec.shape if signature.max_batch_size else spec.shape[1:]
    if not signature.max_batch_size and (not spec.shape or spec.shape[0] not in (-1, count)):
        raise RequestError(
            f"Feature {spec.name}: the input of shape {_shape(spec.shape)} does not take {count} examples"
        )
    fixed = prod(size for size in row if size >= 0)
    open_sizes = sum(size < 0 for size in row)
    if open_sizes == 1 and fixed and length % fixed == 0:
        row = tuple(length // fixed if size < 0 else size for size in row)
    elif open_sizes or fixed != length:
        raise RequestError(
            f"Key: {spec.name}.  Number of {spec.datatype.value} values != expected.  values size: {length} but output "
            f"shape: {_shape(row)}"
        )
    return (count, *row)


def _choose_floats(signature: ModelSignature, *ranks: int) -> TensorSpec | None:
    """The only output of numbers with as many dimensions, None if there is none or a choice."""
    extra = 1 if signature.max_batch_size else 0
    found = [spec for spec in signature.outputs if spec.datatype in FLOATS and len(spec.shape) + extra in ranks]
    return found[0] if len(found) == 1 else None


def _read_labels(output: Tensor, count: int) -> list[list[str]]:
    if output.datatype != DataType.BYTES.value:
        raise RequestError(f"Expected classes Tensor of DT_STRING. Got: {output.datatype}")
    _check_rows(output, count, "classes")
    try:
        texts = [element.decode("utf-8") for element in split_elements(output)]
    except UnicodeDecodeError:
        raise RequestError("Expected classes Tensor of text, but it holds bytes that are not UTF-8") from None
    width = output.shape[1]
    return [texts[start : start + width] for start in range(0, count * width, width)] if width else [[]] * count


def _read_scores(output: Tensor, count: int) -> Array:
    _check_rows(output, count, "scores")
    return _read_floats(output, "scores")


def _read_floats(output: Tensor, what: str) -> Array:
    if DataType(output.datatype) not in FLOATS:
        raise RequestError(f"Expected {what} Tensor of DT_FLOAT. Got: {output.datatype}")
    with np.errstate(over="ignore"):  # what is too large for a float is infinity, as the message would have it
        return read_elements(output).astype(np.float32)


def _check_rows(output: Tensor, count: int, what: str) -> None:
    if len(output.shape) != 2:
        raise RequestError(f"Expected Tensor shape: [batch_size num_classes] but got {_shape(output.shape)}")
    if output.shape[0] != count:
        raise RequestError(f"Expected {what} output batch size of {count}. Got: {output.shape[0]}")


def _describe(signature: ModelSignature) -> str:
    return ", ".join(f"{spec.name} {spec.datatype.value}{_shape(spec.shape)}" for spec in signature.outputs)


def _shape(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
