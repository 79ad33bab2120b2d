"""Opening SavedModels and Keras files as functions from named tensors to named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiorch_backends.common import FoundTensor, import_framework, refuse, require_artefact
from aiorch_server.backend import LoadContext
from aiorch_server.types import DataType

_DATATYPES = {
    "bool": DataType.BOOL,
    "uint8": DataType.UINT8,
    "uint16": DataType.UINT16,
    "uint32": DataType.UINT32,
    "uint64": DataType.UINT64,
    "int8": DataType.INT8,
    "int16": DataType.INT16,
    "int32": DataType.INT32,
    "int64": DataType.INT64,
    "float16": DataType.FP16,
    "float32": DataType.FP32,
    "float64": DataType.FP64,
    "string": DataType.BYTES,
    "bfloat16": DataType.BF16,
}


@dataclass(frozen=True, slots=True)
class OpenedProgram:
    """``call`` takes tensors by input name and gives tensors by output name; ``owner`` keeps the variables alive."""

    owner: Any
    call: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    inputs: tuple[FoundTensor, ...]
    outputs: tuple[FoundTensor, ...]


def open_saved_model(context: LoadContext, tf: Any) -> OpenedProgram:
    """A SavedModel's signature, ``serving_default`` unless the parameter ``signature_name`` says otherwise."""
    path = require_artefact(context, is_folder=True)
    try:
        model = tf.saved_model.load(str(path))
    except Exception as error:
        raise refuse(context, error) from error
    name = context.parameters.get("signature_name", "serving_default")
    signatures = getattr(model, "signatures", {})
    if name not in signatures:
        known = ", ".join(f"'{key}'" for key in signatures) or "none"
        raise refuse(context, f"there is no signature '{name}', only {known}; save the model with signatures={{...}}")
    function = signatures[name]
    positional, keywords = function.structured_input_signature
    if positional:
        raise refuse(context, f"signature '{name}' takes positional arguments, only named ones can be served")
    return OpenedProgram(
        model,
        lambda tensors: dict(function(**tensors)),
        tuple(_describe(context, key, spec.dtype.name, spec.shape) for key, spec in sorted(keywords.items())),
        tuple(
            _describe(context, key, spec.dtype.name, spec.shape)
            for key, spec in sorted(function.structured_outputs.items())
        ),
    )


def open_keras(context: LoadContext, tf: Any) -> OpenedProgram:
    """A ``.keras`` file as one compiled function; code inside it (lambdas) is refused unless pickles are allowed."""
    path = require_artefact(context)
    keras = import_framework("keras", extra="tensorflow")
    if keras.backend.backend() != "tensorflow":
        raise refuse(context, f"Keras runs on {keras.backend.backend()} here; KERAS_BACKEND must be tensorflow")
    try:
        model = keras.saving.load_model(str(path), compile=False, safe_mode=not context.allow_code)
    except Exception as error:
        raise refuse(context, error) from error
    if not getattr(model, "inputs", None):
        raise refuse(context, "the model was saved before it knew its inputs; build it, or export it as a SavedModel")
    input_names = _name_inputs(model)
    output_names = _name_outputs(model)

    def forward(*tensors: Any) -> list[Any]:
        result = model(_arrange(model, tensors), training=False)
        return [result[key] for key in result] if isinstance(result, dict) else tf.nest.flatten(result)

    specs = [
        tf.TensorSpec(tensor.shape, tensor.dtype, name=f"input_{place}") for place, tensor in enumerate(model.inputs)
    ]
    function = tf.function(forward, input_signature=specs)
    try:
        traced = function.get_concrete_function().structured_outputs
    except Exception as error:
        raise refuse(context, error) from error

    def call(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        results = function(*[tensors[name] for name in input_names])
        return dict(zip(output_names, results, strict=True))

    return OpenedProgram(
        model,
        call,
        tuple(
            _describe(context, name, str(tensor.dtype), tensor.shape)
            for name, tensor in zip(input_names, model.inputs, strict=True)
        ),
        tuple(
            _describe(context, name, spec.dtype.name, spec.shape)
            for name, spec in zip(output_names, traced, strict=True)
        ),
    )


def _name_inputs(model: Any) -> list[str]:
    """The keys of a model that takes a dictionary, else the names of its Input layers."""
    structure = getattr(model, "input", None)  # a Sequential that was loaded, but never called, has none
    if isinstance(structure, dict):
        by_tensor = {id(tensor): key for key, tensor in structure.items()}
        return [by_tensor[id(tensor)] for tensor in model.inputs]
    return [str(tensor.name) for tensor in model.inputs]


def _name_outputs(model: Any) -> list[str]:
    """The keys of a model that gives a dictionary, else the names of the layers that give the outputs."""
    structure = getattr(model, "output", None)
    if isinstance(structure, dict):
        return list(structure)
    names = getattr(model, "output_names", None)
    if names is None:
        return [model.layers[-1].name]
    names = [str(name) for name in names]
    return names if len(set(names)) == len(names) else [f"{name}_{place}" for place, name in enumerate(names)]


def _arrange(model: Any, tensors: Sequence[Any]) -> Any:
    structure = getattr(model, "input", None)
    if isinstance(structure, dict):
        return dict(zip(_name_inputs(model), tensors, strict=True))
    return tensors[0] if len(tensors) == 1 else list(tensors)


def _describe(context: LoadContext, name: str, dtype: str, shape: Any) -> FoundTensor:
    datatype = _DATATYPES.get(dtype)
    if datatype is None:
        raise refuse(context, f"'{name}' is {dtype}, which the V2 protocol cannot carry")
    if getattr(shape, "rank", 0) is None:
        return FoundTensor(name, datatype, None)
    return FoundTensor(name, datatype, tuple(-1 if size is None else int(size) for size in shape))
