"""TorchScript (``model.pt``): knows the arguments of ``forward``, but neither datatypes nor shapes nor output names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiorch_backends.common import refuse, require_artefact
from aiorch_backends.pytorch.tensors import TorchCall, find_place, import_torch
from aiorch_server.backend import LoadContext
from aiorch_server.errors import ModelExecutionError
from aiorch_server.types import DataType, ModelSignature, TensorSpec

_TENSOR_KINDS = ("TensorType", "OptionalType")


class ScriptedProgram:
    """A ScriptModule with the names of its arguments."""

    def __init__(self, module: Any) -> None:
        self._module = module
        schema = module.forward.schema
        self._arguments = list(schema.arguments)[1:]
        self._names = [argument.name for argument in self._arguments]
        self._returned = schema.returns[0].type

    @classmethod
    def open(cls, context: LoadContext) -> ScriptedProgram:
        """Loads the file on the CPU; ModelLoadError when it is not TorchScript."""
        path = require_artefact(context)
        try:
            module = import_torch().jit.load(str(path), map_location="cpu")
            return cls(module.eval())
        except Exception as error:
            first = str(error).strip().split("\n", 1)[0]
            raise refuse(
                context,
                f"not a TorchScript file ({first}); a state_dict or a pickled module cannot be served, save "
                "torch.jit.script(model) or, better, torch.export.save(program, 'model.pt2')",
            ) from error

    def inspect(self, context: LoadContext) -> ModelSignature:
        """The declared signature, checked against ``forward``; ModelLoadError says what the configuration lacks."""
        declared = context.declared
        if not declared.inputs or not declared.outputs:
            raise refuse(context, self._describe_missing())
        for argument in self._arguments:
            if argument.type.kind() not in _TENSOR_KINDS:
                raise refuse(context, f"argument '{argument.name}' of forward is {argument.type}, not a tensor")
        self._check_inputs(context)
        self._check_outputs(context)
        for spec in (*declared.inputs, *declared.outputs):
            if spec.datatype is DataType.BYTES:
                raise refuse(context, f"'{spec.name}' is declared TYPE_STRING, but torch has no string tensors")
        return ModelSignature(declared.inputs, declared.outputs, declared.max_batch_size or 0)

    def bind(self, signature: ModelSignature, device: str) -> TorchCall:
        """Calls ``forward`` by argument name."""
        module = self._module.to(device)
        arguments = {spec.name: self._names[find_place(spec.name, self._names) or 0] for spec in signature.inputs}
        names = [spec.name for spec in signature.outputs]

        def call(tensors: Mapping[str, Any]) -> Sequence[Any]:
            result = module(**{arguments[name]: tensor for name, tensor in tensors.items()})
            return _pick_outputs(result, names)

        return call

    def _describe_missing(self) -> str:
        inputs = ", ".join(f'{{ name: "{name}" data_type: TYPE_FP32 dims: [ ... ] }}' for name in self._names)
        return (
            "TorchScript holds no datatypes, shapes or output names; write them in config.pbtxt, for example "
            f'input [ {inputs} ] output [ {{ name: "OUTPUT__0" data_type: TYPE_FP32 dims: [ ... ] }} ]'
        )

    def _check_inputs(self, context: LoadContext) -> None:
        takes = f"forward takes {', '.join(self._names) or 'no arguments'}"
        places: dict[int, TensorSpec] = {}
        for spec in context.declared.inputs:
            place = find_place(spec.name, self._names)
            if place is None:
                raise refuse(context, f"input '{spec.name}' is declared, but {takes} (or INPUT__<i>)")
            if place in places:
                raise refuse(context, f"inputs '{places[place].name}' and '{spec.name}' are the same argument; {takes}")
            if spec.optional and not self._arguments[place].has_default_value():
                raise refuse(context, f"input '{spec.name}' is declared optional, but forward requires it")
            places[place] = spec
        for place, argument in enumerate(self._arguments):
            if place not in places and not argument.has_default_value():
                raise refuse(context, f"forward's argument '{argument.name}' is not declared as an input")

    def _check_outputs(self, context: LoadContext) -> None:
        declared = context.declared.outputs
        kind = self._returned.kind()
        if kind in ("DictType", "ListType"):
            return  # what is in them only a run tells
        count = len(self._returned.elements()) if kind == "TupleType" else 1
        if kind not in ("TensorType", "TupleType"):
            raise refuse(context, f"forward returns {self._returned}, only tensors can be served")
        indexed = [find_place(spec.name, [""] * count) for spec in declared]
        is_indexed = all(spec.name.startswith("OUTPUT__") for spec in declared)
        if (is_indexed and None in indexed) or (not is_indexed and len(declared) > count):
            names = ", ".join(f"'{spec.name}'" for spec in declared)
            raise refuse(context, f"outputs {names} are declared, but forward returns {count} tensor(s)")


def _pick_outputs(result: Any, names: Sequence[str]) -> list[Any]:
    """The tensors named, by key, by the index in ``OUTPUT__<i>``, or in order."""
    if isinstance(result, dict):
        missing = [name for name in names if name not in result]
        if missing:
            raise ModelExecutionError(f"forward returned no '{missing[0]}', only {', '.join(map(str, result))}")
        return [result[name] for name in names]
    returned = list(result) if isinstance(result, (tuple, list)) else [result]
    places = [find_place(name, [""] * len(returned)) for name in names]
    if all(name.startswith("OUTPUT__") for name in names):
        if None in places:
            raise ModelExecutionError(f"forward returned {len(returned)} tensors, too few for {', '.join(names)}")
        return [returned[place] for place in places if place is not None]
    if len(returned) < len(names):
        raise ModelExecutionError(f"forward returned {len(returned)} tensors, too few for {', '.join(names)}")
    return returned[: len(names)]
