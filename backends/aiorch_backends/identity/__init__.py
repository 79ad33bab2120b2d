"""Echoes each input to the output at the same place: for tests, benchmarks and wiring checks.

Needs no artefact. The configuration gives inputs and outputs; without one there are ``INPUT0`` and ``OUTPUT0``,
FP32 ``[-1]``. Parameter ``execute_delay_us`` makes each batch take that long.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from aiorch_backends.common import refuse
from aiorch_server.backend import Backend, LoadContext, ModelInstance
from aiorch_server.errors import ModelExecutionError
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec

try:
    from aiorch_backends.identity.echo import Echo
except ImportError:  # not compiled here: batches go through Python
    Echo = None  # type: ignore[assignment, misc]

_LONGEST_DELAY_US = 60_000_000


class IdentityBackend(Backend):
    """Gives back what it gets; outputs alias inputs."""

    name = "identity"
    platforms = ("identity",)
    runs_code = False
    parameters = ("execute_delay_us",)

    def inspect(self, context: LoadContext) -> ModelSignature:
        """The declared signature, missing outputs named after their inputs; batching unless declared otherwise."""
        inputs = context.declared.inputs or (TensorSpec("INPUT0", DataType.FP32, (-1,)),)
        outputs = context.declared.outputs or tuple(
            TensorSpec(_name_output(spec.name, index), spec.datatype, spec.shape) for index, spec in enumerate(inputs)
        )
        if len(inputs) != len(outputs):
            raise refuse(context, f"identity needs as many outputs as inputs, not {len(inputs)} and {len(outputs)}")
        for given, taken in zip(inputs, outputs, strict=True):
            if (given.datatype, given.shape) != (taken.datatype, taken.shape):
                raise refuse(
                    context,
                    f"output '{taken.name}' ({taken.datatype.config_name} {list(taken.shape)}) must have the type and "
                    f"dims of input '{given.name}' ({given.datatype.config_name} {list(given.shape)}) that it echoes",
                )
            if given.optional:
                raise refuse(context, f"input '{given.name}' cannot be optional: an output echoes it")
        _read_delay_us(context)
        declared = context.declared.max_batch_size
        return ModelSignature(inputs, outputs, context.default_max_batch_size if declared is None else declared)

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        """One instance; nothing is opened."""
        return IdentityInstance(signature, _read_delay_us(context))


class IdentityInstance(ModelInstance):
    """Hands the arrays of its inputs through, without a copy."""

    def __init__(self, signature: ModelSignature, delay_us: int) -> None:
        names = zip(signature.inputs, signature.outputs, strict=True)
        self._pairs = [(given.name, taken.name) for given, taken in names]
        self._delay_s = delay_us / 1e6
        is_plain = all(spec.datatype is not DataType.BYTES for spec in signature.inputs)
        self._echo = Echo(len(self._pairs), delay_us) if Echo is not None and is_plain else None

    @property
    def compiled(self) -> object | None:
        """The same without the interpreter, unless there are BYTES."""
        return None if self._echo is None else self._echo.capsule

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        """Outputs are the input arrays themselves; ModelExecutionError when one is missing."""
        if self._delay_s:
            time.sleep(self._delay_s)
        try:
            return {output: inputs[name] for name, output in self._pairs}
        except KeyError as error:
            raise ModelExecutionError(f"input {error} is missing") from None


def _name_output(name: str, index: int) -> str:
    return name.replace("INPUT", "OUTPUT", 1) if "INPUT" in name else f"OUTPUT{index}"


def _read_delay_us(context: LoadContext) -> int:
    text = context.parameters.get("execute_delay_us", "0")
    if not text.isdecimal() or int(text) > _LONGEST_DELAY_US:
        raise refuse(
            context,
            f"parameter 'execute_delay_us' must be a whole number from 0 to {_LONGEST_DELAY_US}, not \"{text}\"",
        )
    return int(text)


__all__ = ["IdentityBackend", "IdentityInstance"]
