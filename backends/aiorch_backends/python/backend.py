"""The python backend: signatures from class attributes, outputs checked before the server trusts them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from aiorch_backends.common import FoundTensor, OpenedArtefacts, complete_signature, encode_text, refuse
from aiorch_server.backend import Backend, LoadContext, ModelInstance
from aiorch_server.errors import AiorchError, ModelExecutionError
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec

if TYPE_CHECKING:
    from aiorch_backends.python.modules import UserModule

logger = logging.getLogger(__name__)


class PythonBackend(Backend):
    """Serves ``model.py``; see the package's docstring for the interface of ``Model``.

    What opens files and speaks Triton's interface is imported with the first model: every server knows this class.
    """

    name = "python"
    platforms = ("python",)
    artefacts = ("model.py",)

    def __init__(self) -> None:
        self._modules: OpenedArtefacts[UserModule] = OpenedArtefacts(lambda module: module.close())

    def inspect(self, context: LoadContext) -> ModelSignature:
        """What ``Model`` declares, completed and narrowed by the configuration; ModelLoadError."""
        from aiorch_backends.python.modules import UserModule

        module = UserModule.open(context)
        try:
            if module.is_triton:
                return self._inspect_triton(context, module)
            signature = _complete(context, _read_declaration(context, module.model))
        except BaseException:
            module.close()
            raise
        self._modules.put(context, module)
        return signature

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        """Makes a ``Model`` and calls its ``load``."""
        from aiorch_backends.python.modules import UserModule, explain

        module = self._modules.take(context) or UserModule.open(context)
        try:
            if module.is_triton:
                from aiorch_backends.python.triton.instance import TritonInstance

                return TritonInstance(module, context, signature)
            if hasattr(module.model, "load"):
                module.model.load(context)
        except BaseException as error:
            module.close()
            if not isinstance(error, (Exception, SystemExit)):
                raise
            raise explain(context, error) from error
        return PythonInstance(module, signature, context.model_name)

    def _inspect_triton(self, context: LoadContext, module: UserModule) -> ModelSignature:
        from aiorch_backends.python.modules import explain
        from aiorch_backends.python.triton.model_config import read_signature

        try:
            signature = read_signature(context, module.model_class)
        except (Exception, SystemExit) as error:
            raise explain(context, error) from error
        self._modules.put(context, module)
        return signature


class PythonInstance(ModelInstance):
    """Calls the user's ``execute`` and checks what it gives against the signature."""

    def __init__(self, module: UserModule, signature: ModelSignature, model_name: str) -> None:
        self._module: UserModule | None = module
        self._signature = signature
        self._model_name = model_name
        self._failures = 0

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        """ModelExecutionError with type and text of the user's error, or naming the output that is wrong."""
        if self._module is None:
            raise ModelExecutionError("the instance is closed")
        try:
            outputs = self._module.model.execute(inputs)
        except AiorchError:
            raise
        except (Exception, SystemExit) as error:
            from aiorch_backends.python.modules import summarize

            self._log(error)
            raise ModelExecutionError(summarize(error)) from error
        if not isinstance(outputs, Mapping):
            raise ModelExecutionError(f"execute returned a {type(outputs).__name__}, not a mapping of names to arrays")
        rows = next((len(array) for array in inputs.values()), None) if self._signature.max_batch_size else None
        return {spec.name: _check_output(spec, outputs, rows) for spec in self._signature.outputs}

    def close(self) -> None:
        """Calls the user's ``close`` once and forgets the module; what it raises is logged."""
        module, self._module = self._module, None
        if module is None:
            return
        try:
            if hasattr(module.model, "close"):
                module.model.close()
        except (Exception, SystemExit):
            logger.exception("model '%s': its close() failed", self._model_name)
        finally:
            module.close()

    def _log(self, error: BaseException) -> None:
        # Every power of two: the first failures are seen at once, and a model that always fails cannot flood the log.
        self._failures += 1
        if self._failures & (self._failures - 1) == 0:
            logger.error("model '%s': execute failed (failure %d)", self._model_name, self._failures, exc_info=error)


def _read_declaration(context: LoadContext, model: Any) -> ModelSignature:
    """The signature as the user's class declares it; max_batch_size -1 where it does not say."""
    from aiorch_backends.python.modules import explain

    try:
        if hasattr(model, "signature"):
            signature = model.signature()
            if not isinstance(signature, ModelSignature):
                raise refuse(context, f"signature() must give a ModelSignature, not a {type(signature).__name__}")
            return signature
        size = getattr(model, "max_batch_size", -1)
        if not isinstance(size, int) or size < -1:
            raise refuse(context, f"max_batch_size must be 0 or more, not {size!r}")
        return ModelSignature(
            tuple(_read_spec(context, "inputs", entry) for entry in getattr(model, "inputs", ())),
            tuple(_read_spec(context, "outputs", entry) for entry in getattr(model, "outputs", ())),
            size,
        )
    except (Exception, SystemExit) as error:
        raise explain(context, error) from error


def _read_spec(context: LoadContext, where: str, entry: Any) -> TensorSpec:
    if isinstance(entry, TensorSpec):
        return entry
    try:
        name, datatype, shape = entry
        sizes = tuple(int(size) for size in shape)
        if not isinstance(name, str) or not name or any(size < -1 for size in sizes):
            raise ValueError
        return TensorSpec(name, datatype if isinstance(datatype, DataType) else DataType(datatype), sizes)
    except (TypeError, ValueError):
        raise refuse(
            context,
            f'Model.{where}: {entry!r} must be (name, datatype, shape) such as ("x", "FP32", [-1]); datatypes are '
            f"{', '.join(member.value for member in DataType)}",
        ) from None


def _complete(context: LoadContext, own: ModelSignature) -> ModelSignature:
    declared = context.declared
    inputs, outputs = own.inputs or declared.inputs, own.outputs or declared.outputs
    if not inputs or not outputs:
        missing = "inputs" if not inputs else "outputs"
        raise refuse(
            context, f"neither class 'Model' nor the configuration declares {missing}; write Model.{missing} = [...]"
        )
    size = (declared.max_batch_size or 0) if own.max_batch_size < 0 else own.max_batch_size
    # The server's default is for models that do not say; one whose code says must not be narrowed by it.
    context = dataclasses.replace(context, default_max_batch_size=size)
    # The batch dimension, which declarations leave out, is put in front where there is one.
    front = (-1,) if size else ()
    signature = complete_signature(
        context,
        [FoundTensor(spec.name, spec.datatype, front + spec.shape, is_optional=spec.optional) for spec in inputs],
        [FoundTensor(spec.name, spec.datatype, front + spec.shape) for spec in outputs],
        batch_limit=size,
    )
    if declared.inputs:
        return signature
    return ModelSignature(inputs, signature.outputs, signature.max_batch_size)


def _check_output(spec: TensorSpec, outputs: Mapping[str, Any], rows: int | None) -> NumpyArray:
    if spec.name not in outputs:
        given = ", ".join(map(str, outputs)) or "nothing"
        raise ModelExecutionError(f"execute gave no output '{spec.name}', only {given}")
    try:
        array = np.asarray(outputs[spec.name])
        if spec.datatype is DataType.BYTES:
            array = encode_text(array)
    except (TypeError, ValueError) as error:
        raise ModelExecutionError(f"output '{spec.name}': {error}") from error
    if array.dtype != spec.datatype.numpy:
        raise ModelExecutionError(
            f"output '{spec.name}' is {array.dtype}, but {spec.datatype.value} ({spec.datatype.numpy}) is declared"
        )
    if rows is not None and (not array.shape or array.shape[0] != rows):
        raise ModelExecutionError(f"output '{spec.name}' has shape {list(array.shape)}, but the batch has {rows} rows")
    shape = array.shape if rows is None else array.shape[1:]
    is_served = len(shape) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, shape, strict=True)
    )
    if not is_served:
        raise ModelExecutionError(f"output '{spec.name}' has shape {list(shape)}, but {list(spec.shape)} is declared")
    return np.ascontiguousarray(array).reshape(array.shape)
