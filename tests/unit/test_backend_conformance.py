"""The conformance suite itself: a backend that breaks one rule must fail the test of that rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from aiorch_backends.identity import IdentityBackend

from aiorch_server.backend import Backend, DeclaredSignature, LoadContext, ModelInstance
from aiorch_server.errors import ModelLoadError
from aiorch_server.testing import BackendConformance, contradict, make_inputs
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec

Execute = Callable[[Mapping[str, NumpyArray]], Mapping[str, NumpyArray]]


class BrokenInstance(ModelInstance):
    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._is_closed = False

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return self._execute(inputs)

    def close(self) -> None:
        if self._is_closed:
            raise RuntimeError("closed twice")
        self._is_closed = True


class Suite(BackendConformance):
    """As a backend's author writes it, for an echo."""

    needs_artefact = False

    def make_backend(self) -> Backend:
        return IdentityBackend()

    def write_artefact(self, folder: Path) -> Path:
        return folder

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return {"OUTPUT0": inputs["INPUT0"]}


SIGNATURE = ModelSignature(
    (TensorSpec("INPUT0", DataType.FP32, (3,)),), (TensorSpec("OUTPUT0", DataType.FP32, (3,)),), 8
)
CONTEXT = LoadContext("conformance", 3, Path("m"), Path("m/3/model"), DeclaredSignature())


def reuse_a_buffer() -> Execute:
    buffer = np.zeros((8, 3), np.float32)

    def execute(inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        rows = inputs["INPUT0"]
        buffer[: len(rows)] = rows
        return {"OUTPUT0": buffer[: len(rows)]}

    return execute


def write_to_inputs(inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
    np.negative(np.asarray(inputs["INPUT0"], np.float32), out=inputs["INPUT0"])
    return {"OUTPUT0": inputs["INPUT0"]}


def mix_rows(inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
    rows = np.asarray(inputs["INPUT0"], np.float32)
    return {"OUTPUT0": rows + rows.mean(axis=0) - rows[:1]}


def widen(inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
    return {"OUTPUT0": inputs["INPUT0"].astype(np.float64)}


def drop_a_row(inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
    return {"OUTPUT0": inputs["INPUT0"][1:]}


def swallow_everything(inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
    return {"OUTPUT0": inputs.get("INPUT0", np.zeros((1, 3), np.float32))}


def test_buffer_that_is_used_again() -> None:
    with pytest.raises(AssertionError):
        Suite().test_outputs_outlive_the_next_call(BrokenInstance(reuse_a_buffer()), SIGNATURE)


def test_inputs_that_are_written_to() -> None:
    with pytest.raises(AssertionError):
        Suite().test_inputs_are_left_alone(BrokenInstance(write_to_inputs), SIGNATURE)
    with pytest.raises(ValueError, match="read-only"):
        Suite().test_read_only_inputs_are_taken(BrokenInstance(write_to_inputs), SIGNATURE)


def test_rows_that_see_their_neighbours() -> None:
    with pytest.raises(AssertionError):
        Suite().test_batch_equals_single_rows(BrokenInstance(mix_rows), SIGNATURE)


@pytest.mark.parametrize("execute", [widen, drop_a_row])
def test_outputs_unlike_the_signature(execute: Execute) -> None:
    with pytest.raises(AssertionError):
        Suite().test_outputs_match_signature(BrokenInstance(execute), SIGNATURE, 5)


def test_errors_that_are_swallowed() -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        Suite().test_serves_after_an_error(BrokenInstance(swallow_everything), SIGNATURE)


def test_close_that_counts() -> None:
    with pytest.raises(RuntimeError, match="closed twice"):
        Suite().test_close_twice(BrokenInstance(swallow_everything))


class Crossed(IdentityBackend):
    """Two instances that share what they answer with."""

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        stale = np.zeros((2, 3), np.float32)
        return BrokenInstance(lambda inputs: {"OUTPUT0": stale if context.instance_index else inputs["INPUT0"]})


def test_wrong_answers_in_a_thread_are_raised() -> None:
    with pytest.raises(AssertionError):
        Suite().test_two_instances_in_two_threads(Crossed(), CONTEXT, SIGNATURE)


class Careless(IdentityBackend):
    """Serves what the artefact holds, whatever is declared, and tells the server's folders."""

    def inspect(self, context: LoadContext) -> ModelSignature:
        if not context.artefact.exists():
            raise ModelLoadError(f"cannot open {context.artefact.absolute()}")
        return SIGNATURE


def test_declarations_that_are_not_read(tmp_path: Path) -> None:
    context = LoadContext("m", 3, tmp_path / "m", tmp_path, DeclaredSignature())
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        Suite().test_wrong_declaration_is_refused(Careless(), context)


def test_paths_that_are_told(tmp_path: Path) -> None:
    context = LoadContext("m", 3, tmp_path / "m", tmp_path / "m" / "3" / "model.x", DeclaredSignature())
    with pytest.raises(AssertionError):
        Suite().check_refused(Careless(), context)


def test_contradictions_differ_in_one_point_each() -> None:
    declarations = [declared for _, declared in contradict(SIGNATURE)]
    assert len(declarations) == 6
    for declared in declarations:
        changed = (declared.inputs != SIGNATURE.inputs) + (declared.outputs != SIGNATURE.outputs)
        assert changed == 1
        assert declared.max_batch_size == 8


@pytest.mark.parametrize("datatype", list(DataType), ids=str)
def test_made_up_inputs_have_the_signatures_types(datatype: DataType) -> None:
    signature = ModelSignature((TensorSpec("x", datatype, (-1, 2)),), (), 4)
    array = make_inputs(signature, 5)["x"]
    assert array.dtype == datatype.numpy
    assert array.shape == (5, 3, 2)
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, make_inputs(signature, 5)["x"])
