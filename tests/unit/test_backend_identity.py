from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from aiorch_backends.identity import IdentityBackend

from aiorch_server.backend import Backend, DeclaredSignature, LoadContext
from aiorch_server.errors import ModelExecutionError, ModelLoadError
from aiorch_server.testing import BackendConformance
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec


class IdentityConformance(BackendConformance):
    needs_artefact = False

    def make_backend(self) -> Backend:
        return IdentityBackend()

    def write_artefact(self, folder: Path) -> Path:
        return folder

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return {name.replace("IN", "OUT"): array for name, array in inputs.items()}

    def test_wrong_declaration_is_refused(self, backend: Backend, context: LoadContext) -> None:
        # Any declaration is the truth here, but for one that an echo cannot fulfil.
        for wrong in (
            TensorSpec("OUTPUT0", DataType.FP64, (4,)),
            TensorSpec("OUTPUT0", DataType.FP32, (5,)),
        ):
            given = TensorSpec("INPUT0", DataType.FP32, (4,))
            with pytest.raises(ModelLoadError, match="OUTPUT0"):
                backend.inspect(_context(inputs=(given,), outputs=(wrong,)))


class TestWithoutConfiguration(IdentityConformance):
    pass


class TestTextsAndBools(IdentityConformance):
    declared = DeclaredSignature(
        (
            TensorSpec("IN_text", DataType.BYTES, (2,)),
            TensorSpec("IN_flag", DataType.BOOL, (1,)),
            TensorSpec("IN_half", DataType.BF16, (-1, 2)),
        ),
        (
            TensorSpec("OUT_text", DataType.BYTES, (2,)),
            TensorSpec("OUT_flag", DataType.BOOL, (1,)),
            TensorSpec("OUT_half", DataType.BF16, (-1, 2)),
        ),
        8,
    )

    def test_one_output_may_be_declared_alone(self, backend: Backend, context: LoadContext) -> None:
        # An echo has an output for each input; leaving one out is an error, not a narrower model.
        declared = DeclaredSignature(self.declared.inputs, self.declared.outputs[:1], 8)
        with pytest.raises(ModelLoadError, match="as many outputs as inputs"):
            backend.inspect(_context(declared.inputs, declared.outputs))


class TestWithoutBatching(IdentityConformance):
    is_batching = False
    declared = DeclaredSignature((TensorSpec("INPUT0", DataType.FP32, (4,)),), (), 0)


def _context(
    inputs: tuple[TensorSpec, ...] = (), outputs: tuple[TensorSpec, ...] = (), **parameters: str
) -> LoadContext:
    return LoadContext(
        "echo", 1, Path("echo"), Path("echo/1"), DeclaredSignature(inputs, outputs), parameters=parameters
    )


def test_default_signature() -> None:
    signature = IdentityBackend().inspect(_context())
    assert signature == ModelSignature(
        (TensorSpec("INPUT0", DataType.FP32, (-1,)),), (TensorSpec("OUTPUT0", DataType.FP32, (-1,)),), 32
    )


def test_echo_copies_nothing() -> None:
    backend, context = IdentityBackend(), _context()
    array = np.ones((2, 3), np.float32)
    assert backend.load(context, backend.inspect(context)).execute({"INPUT0": array})["OUTPUT0"] is array


def test_delay_is_kept() -> None:
    backend, context = IdentityBackend(), _context(execute_delay_us="20000")
    instance = backend.load(context, backend.inspect(context))
    begin = time.monotonic()
    instance.execute({"INPUT0": np.ones((1, 1), np.float32)})
    assert time.monotonic() - begin >= 0.02


@pytest.mark.parametrize("text", ["-1", "soon", "1.5", "", "60000001"])
def test_bad_delay_is_refused(text: str) -> None:
    with pytest.raises(ModelLoadError, match="execute_delay_us"):
        IdentityBackend().inspect(_context(execute_delay_us=text))


def test_optional_input_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="optional"):
        IdentityBackend().inspect(_context((TensorSpec("INPUT0", DataType.FP32, (1,), optional=True),)))


def test_missing_input_is_named() -> None:
    backend, context = IdentityBackend(), _context()
    with pytest.raises(ModelExecutionError, match="INPUT0"):
        backend.load(context, backend.inspect(context)).execute({})
