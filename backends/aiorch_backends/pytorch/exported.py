"""torch.export programs (``model.pt2``): names, datatypes, shapes and dynamic dimensions are all in the file.

The format (https://docs.pytorch.org/docs/stable/export/pt2_archive.html) stores plain tensors without pickle, but may
hold pickled members, which torch opens unchecked; those are refused unless pickles are allowed. Symbolic expressions in
the file are still evaluated by torch, so serve only programs from people you trust.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

from aiorch_backends.common import FoundTensor, complete_signature, refuse, require_artefact
from aiorch_backends.pytorch.tensors import TorchCall, find_datatype, find_place, import_torch, rename
from aiorch_server.backend import LoadContext
from aiorch_server.types import ModelSignature


class ExportedProgram:
    """An ``ExportedProgram`` with the names that its inputs and outputs go by."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._nodes = {node.name: node for node in program.graph.nodes}

    @classmethod
    def open(cls, context: LoadContext) -> ExportedProgram:
        """Loads the file; ModelLoadError when it is no program or holds pickles that are not allowed."""
        path = require_artefact(context)
        torch = import_torch()
        if not context.allow_code:
            _refuse_pickles(context, torch)
        try:
            return cls(torch.export.load(str(path)))
        except Exception as error:
            raise refuse(context, f"not a torch.export program: {error}") from error

    def inspect(self, context: LoadContext) -> ModelSignature:
        """Inputs by argument name, outputs by key or ``OUTPUT__<i>``; one symbol first in all of them: batching."""
        declared = context.declared
        inputs = rename(self._input_names(context), declared.inputs)
        outputs = rename(self._output_names(context), declared.outputs)
        values = [self._value(context, spec.arg) for spec in (*self._input_specs(), *self._output_specs())]
        found = [self._describe(context, name, value) for name, value in zip([*inputs, *outputs], values, strict=True)]
        return complete_signature(
            context, found[: len(inputs)], found[len(inputs) :], batch_limit=self._batch_limit(values)
        )

    def bind(self, signature: ModelSignature, device: str) -> TorchCall:
        """Calls the program's module with the structure of arguments that it was exported with."""
        program = self._program
        if device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        module = program.module()
        pytree = import_torch().utils._pytree
        structure = program.call_spec.in_spec
        names = [spec.arg.name for spec in self._input_specs()]
        order = {find_place(spec.name, names): spec.name for spec in signature.inputs}
        feeds = [order[place] for place in range(len(names))]
        keys = self._keys()
        picked = [find_place(spec.name, keys) or 0 for spec in signature.outputs]

        def call(tensors: Mapping[str, Any]) -> Sequence[Any]:
            arguments, keywords = pytree.tree_unflatten([tensors[name] for name in feeds], structure)
            results = pytree.tree_leaves(module(*arguments, **keywords))
            return [results[place] for place in picked]

        return call

    def _input_specs(self) -> list[Any]:
        return [spec for spec in self._program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]

    def _output_specs(self) -> list[Any]:
        return [spec for spec in self._program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]

    def _input_names(self, context: LoadContext) -> list[str]:
        for spec in self._input_specs():
            if type(spec.arg).__name__ != "TensorArgument":
                raise refuse(context, f"argument '{getattr(spec.arg, 'name', spec.arg)}' is not a tensor")
        return [spec.arg.name for spec in self._input_specs()]

    def _output_names(self, context: LoadContext) -> list[str]:
        for place, spec in enumerate(self._output_specs()):
            if type(spec.arg).__name__ != "TensorArgument":
                raise refuse(context, f"result {place} of the program is not a tensor")
        return self._keys()

    def _keys(self) -> list[str]:
        """The keys of the dictionary that the program returns; else OUTPUT__0 and on, as nodes have no steady names."""
        structure = self._program.call_spec.out_spec
        count = len(self._output_specs())
        if structure.type is dict and structure.num_children == count:
            return [str(key) for key in structure.context]
        return [f"OUTPUT__{place}" for place in range(count)]

    def _value(self, context: LoadContext, argument: Any) -> Any:
        node = self._nodes.get(argument.name)
        if node is None or "val" not in node.meta:
            raise refuse(context, f"the program does not describe '{argument.name}'; export it again")
        return node.meta["val"]

    @staticmethod
    def _describe(context: LoadContext, name: str, value: Any) -> FoundTensor:
        datatype = find_datatype(value.dtype)
        if datatype is None:
            raise refuse(context, f"'{name}' is {value.dtype}, which the V2 protocol cannot carry")
        return FoundTensor(name, datatype, tuple(size if isinstance(size, int) else -1 for size in value.shape))

    def _batch_limit(self, values: Sequence[Any]) -> int | None:
        """The upper bound of the symbol that stands first everywhere; None: unbounded, 0: no such symbol."""
        firsts = [value.shape[0] if value.ndim else 1 for value in values] or [1]
        symbols = {None if isinstance(size, int) else size.node.expr for size in firsts}
        symbol = symbols.pop()
        if symbols or symbol is None or not symbol.is_Symbol:
            return 0
        bounds = self._program.range_constraints.get(symbol)
        if bounds is None or not getattr(bounds.upper, "is_Integer", isinstance(bounds.upper, int)):
            return None
        return int(bounds.upper)


def _refuse_pickles(context: LoadContext, torch: Any) -> None:
    """Lets pass what torch's weights-only reader opens; ModelLoadError for any other pickle in the archive."""
    try:
        with zipfile.ZipFile(context.artefact) as archive:
            for name in _list_pickles(archive):
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    except Exception as error:
        if isinstance(error, (zipfile.BadZipFile, json.JSONDecodeError, OSError)):
            raise refuse(context, f"not a torch.export program: {error}") from error
        first = str(error).strip().split("\n", 1)[0]
        raise refuse(
            context, f"the archive holds pickled objects, which are not allowed here (allow_code is off): {first}"
        ) from error


def _list_pickles(archive: zipfile.ZipFile) -> list[str]:
    """Members that torch.export.load would unpickle: marked so, or neither a plain weight nor a plain constant."""
    pickled = [name for name in archive.namelist() if name.endswith(".pt")]
    for name in archive.namelist():
        if name.endswith(("_weights_config.json", "_constants_config.json")):
            folder = name.rsplit("/", 1)[0]
            for payload in json.loads(archive.read(name))["config"].values():
                if payload["use_pickle"] or not payload["path_name"].startswith(("weight_", "tensor_")):
                    pickled.append(f"{folder}/{payload['path_name']}")
    return pickled
