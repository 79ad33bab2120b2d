"""Ragged requests between queue and model: what is joined, given and cut; and configurations that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.backend import Backend, LoadContext, ModelInstance, ModelRequest, RequestInstance
from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import ModelExecutionError, ModelLoadError
from aiorch_server.execution.ragged import RaggedBackend
from aiorch_server.execution.ragged_tensors import RaggedTensors
from aiorch_server.execution.rehearsal import RehearsedRequest
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec

INPUT = {"name": "X", "data_type": "TYPE_FP32", "dims": [-1, -1], "allow_ragged_batch": True}
PLAIN = {"name": "P", "data_type": "TYPE_FP32", "dims": [2]}
OUTPUT = {"name": "Y", "data_type": "TYPE_FP32", "dims": [-1, -1]}
ROWS = {"name": "Z", "data_type": "TYPE_INT32", "dims": [1]}
CUT = {"kind": "BATCH_SCATTER_WITH_INPUT_SHAPE", "target_name": ["Y"], "source_input": ["X"]}


def count(kind: str = "BATCH_ELEMENT_COUNT", **changes: Any) -> dict[str, Any]:
    return {"kind": kind, "target_name": ["N"], "data_type": "TYPE_INT32", "source_input": ["X"], **changes}


def configure(**fields: Any) -> ModelConfig:
    whole = {"max_batch_size": 8, "input": [INPUT, PLAIN], "output": [OUTPUT, ROWS], "batch_output": [CUT], **fields}
    return ModelConfig.from_dict(whole, folder="m")


def read(**fields: Any) -> RaggedTensors:
    tensors = RaggedTensors.of(configure(**fields))
    assert tensors is not None
    return tensors


def member(*shape: int, start: float = 0) -> dict[str, NumpyArray]:
    values = np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)
    return {"X": values, "P": np.full((shape[0], 2), start, np.float32)}


@pytest.mark.parametrize("datatype", ["TYPE_INT32", "TYPE_FP32"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("BATCH_ELEMENT_COUNT", [4, 0, 12]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT", [4, 4, 16]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO", [0, 4, 4, 16]),
        ("BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", [0] * 12),
        ("BATCH_ITEM_SHAPE", [[4, 1], [0, 5], [3, 2], [3, 2]]),
        ("BATCH_ITEM_SHAPE_FLATTEN", [4, 1, 0, 5, 3, 2, 3, 2]),
    ],
)
def test_what_each_kind_tells_of_a_batch(kind: str, expected: list[Any], datatype: str) -> None:
    tensors = read(batch_input=[count(kind, data_type=datatype)])
    inputs = tensors.gather([member(1, 4, 1), member(1, 0, 5), member(2, 3, 2)])
    assert inputs["N"].tolist() == expected
    assert inputs["N"].dtype == (np.int32 if datatype == "TYPE_INT32" else np.float32)
    assert inputs["X"].shape == (16,)
    assert inputs["P"].shape == (4, 2)


SHAPES = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5)


@given(SHAPES)
def test_what_is_joined_comes_apart_again(shapes: list[tuple[int, ...]]) -> None:
    tensors = read()
    members = [member(*shape, start=100 * place) for place, shape in enumerate(shapes)]
    inputs = tensors.gather(members)
    rows = np.arange(sum(shape[0] for shape in shapes), dtype=np.int32)[:, None]
    answers = tensors.cut({"Y": inputs["X"], "Z": rows}, members)
    for answer, given_inputs in zip(answers, members, strict=True):
        assert np.array_equal(answer["Y"], given_inputs["X"])
    assert np.array_equal(np.concatenate([answer["Z"] for answer in answers]), rows)


def test_a_cut_keeps_the_fixed_sizes_of_its_output() -> None:
    output = {"name": "Y", "data_type": "TYPE_FP32", "dims": [-1, 3]}
    flat = {**INPUT, "dims": [-1]}
    tensors = read(input=[flat], output=[output])
    declared = tensors.declare(configure(input=[flat], output=[output]).declare_signature())
    assert ([each.shape for each in declared.outputs], declared.max_batch_size) == ([(-1, 3)], 0)
    members = [{"X": np.zeros((1, 2), np.float32)}, {"X": np.zeros((2, 1), np.float32)}]
    first, second = tensors.cut({"Y": np.arange(12).reshape(4, 3)}, members)
    assert first["Y"].tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert second["Y"].tolist() == [[[6, 7, 8]], [[9, 10, 11]]]


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ({"Y": np.zeros(5)}, r"output 'Y' has 5 elements \(shape \[5\]\); the shapes of input 'X' .* ask for 6"),
        ({"Z": np.zeros((1, 1))}, r"output 'Z' has shape \[1, 1\] for a batch of 2 rows"),
        ({"Z": np.zeros(())}, r"output 'Z' has shape \[\] for a batch of 2 rows"),
    ],
)
def test_outputs_of_another_length_are_nobodys(outputs: Mapping[str, NumpyArray], text: str) -> None:
    with pytest.raises(ModelExecutionError, match=text):
        read().cut(outputs, [member(1, 2, 2), member(1, 1, 2)])


@pytest.mark.parametrize(("datatype", "largest"), [("TYPE_FP32", 2**24), ("TYPE_INT32", 2**31 - 1)])
def test_a_count_that_its_type_cannot_hold_is_not_rounded(datatype: str, largest: int) -> None:
    tensors = read(batch_input=[count("BATCH_ACCUMULATED_ELEMENT_COUNT", data_type=datatype)])

    def gather(*sizes: int) -> Any:
        members = [{"X": np.broadcast_to(np.float32(0), (1, size, 1))} for size in sizes]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RaggedTensors, "_join", lambda *_: None)  # gigabytes
            return tensors.gather(members)["N"].tolist()

    assert gather(largest - 7, 7) == [largest - 7, largest]
    with pytest.raises(ModelExecutionError, match=f"batch input 'N' has to tell of {largest + 1} elements"):
        gather(largest - 7, 8)


class Instance(ModelInstance):
    """Runs what it is given, and remembers what it was asked."""

    def __init__(self, run: Callable[[Mapping[str, NumpyArray]], Mapping[str, NumpyArray]]) -> None:
        self._run = run
        self.seen: list[dict[str, NumpyArray]] = []
        self.is_closed = False

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        self.seen.append(dict(inputs))
        return self._run(inputs)

    def close(self) -> None:
        self.is_closed = True


class Requests(RequestInstance):
    is_closed = False

    def execute_requests(self, requests: Any) -> None:
        raise AssertionError

    def close(self) -> None:
        self.is_closed = True


class OneInstance(Backend):
    name = "one"

    def __init__(self, instance: ModelInstance) -> None:
        self.instance = instance

    def inspect(self, context: LoadContext) -> ModelSignature:
        raise AssertionError

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        return self.instance


INNER = ModelSignature(
    (TensorSpec("X", DataType.FP32, (-1,)), TensorSpec("N", DataType.INT32, (-1,))),
    (TensorSpec("Y", DataType.FP32, (-1,)), TensorSpec("Z", DataType.INT32, (-1, 1))),
)


class Asked(RehearsedRequest):
    """A request that keeps its answer and may be cancelled."""

    def __init__(self, signature: ModelSignature, shape: tuple[int, ...], *, is_cancelled: bool = False) -> None:
        super().__init__(signature, {"X": np.full(shape, shape[1], np.float32)})
        self.answer: Mapping[str, NumpyArray] = {}
        self._is_cancelled = is_cancelled

    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def send(self, outputs: Mapping[str, NumpyArray], *rest: Any, **options: Any) -> None:
        self.answer = {name: array.copy() for name, array in outputs.items()}
        super().send(outputs, *rest, **options)


def load(instance: ModelInstance, inner: ModelSignature = INNER, **fields: Any) -> tuple[RequestInstance, Any]:
    tensors = read(input=[INPUT], batch_input=[count()], **fields)
    backend = RaggedBackend(OneInstance(instance), tensors, inner)
    context = LoadContext("m", 1, Path(), Path(), configure().declare_signature())
    loaded = backend.load(context, tensors.show(inner))
    assert isinstance(loaded, RequestInstance)
    return loaded, tensors.show(inner)


def test_the_signature_for_clients_has_their_shapes_and_no_given_tensors() -> None:
    shown = read(input=[INPUT], batch_input=[count()]).show(INNER)
    assert shown.inputs == (TensorSpec("X", DataType.FP32, (-1, -1), is_ragged=True),)
    assert [each.shape for each in shown.outputs] == [(-1, -1), (1,)]
    assert shown.max_batch_size == 8


def test_a_cancelled_request_is_not_run_and_shifts_nobodys_rows() -> None:
    instance = Instance(lambda inputs: {"Y": inputs["X"], "Z": np.arange(len(inputs["N"]), dtype=np.int32)[:, None]})
    ragged, signature = load(instance)
    requests = [Asked(signature, (1, n, 2), is_cancelled=n == 2) for n in (1, 2, 3)]
    ragged.execute_requests(requests)
    assert instance.seen[0]["N"].tolist() == [2, 6]
    assert [each.answer["Y"].tolist() for each in (requests[0], requests[2])] == [[[[1, 1]]], [[[3, 3]] * 3]]
    assert [each.answer["Z"].tolist() for each in (requests[0], requests[2])] == [[[0]], [[1]]]
    assert (requests[1].answer, str(requests[1].error)) == ({}, "cancelled")
    ragged.execute_requests([Asked(signature, (1, 1, 1), is_cancelled=True)])
    assert len(instance.seen) == 1  # nobody waits, so nothing is run
    ragged.close()
    assert instance.is_closed


def test_a_failed_run_leaves_every_request_open_to_be_run_again() -> None:
    def fail(inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        raise ValueError("no")

    ragged, signature = load(Instance(fail))
    requests: list[ModelRequest] = [Asked(signature, (1, 1, 1)), Asked(signature, (1, 2, 2), is_cancelled=True)]
    with pytest.raises(ValueError, match="no"):
        ragged.execute_requests(requests)
    assert [each.is_ended for each in requests] == [False, False]


def test_a_missing_output_is_no_answer_and_another_one_is_not_looked_at() -> None:
    whole = {"Y": np.zeros(1, np.float32), "Z": np.zeros((1, 1), np.int32), "OTHER": np.zeros(0)}
    given = [whole, {"Y": whole["Y"]}]
    ragged, signature = load(Instance(lambda _: given.pop(0)))
    asked = Asked(signature, (1, 1, 1))
    ragged.execute_requests([asked])
    assert sorted(asked.answer) == ["Y", "Z"]
    with pytest.raises(ModelExecutionError, match=r"the model gave no output 'Z'; it gave \['Y'\]"):
        ragged.execute_requests([Asked(signature, (1, 1, 1))])


def test_a_model_that_takes_requests_gets_no_batch_inputs() -> None:
    instance = Requests()
    with pytest.raises(ModelLoadError, match="batch_input, batch_output: a model that takes its requests one by one"):
        load(instance)
    assert instance.is_closed


def test_a_model_that_keeps_its_batch_dimension_is_refused() -> None:
    instance = Instance(lambda inputs: inputs)
    with pytest.raises(ModelLoadError, match="it must take ragged inputs as one dimension"):
        load(instance, ModelSignature(INNER.inputs, INNER.outputs, 8))
    assert instance.is_closed


def test_an_output_without_room_for_the_rows_is_refused() -> None:
    fixed = ModelSignature(INNER.inputs, (INNER.outputs[0], TensorSpec("Z", DataType.INT32, (4, 1))))
    with pytest.raises(ModelLoadError, match=r"output 'Z' has shape \[4, 1\]; the first dimension must be variable"):
        load(Instance(lambda inputs: inputs), fixed)


OPTIONAL = {**INPUT, "optional": True}
START = {"name": "S", "control": [{"kind": "CONTROL_SEQUENCE_START", "int32_false_true": [0, 1]}]}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"max_batch_size": 0}, r"input\[0\].allow_ragged_batch: needs max_batch_size above 0, found 0"),
        ({"max_batch_size": None}, r"input\[0\].allow_ragged_batch: needs max_batch_size above 0, found nothing"),
        (
            {"max_batch_size": 0, "input": [PLAIN], "batch_output": [], "batch_input": [count(source_input=["P"])]},
            r"batch_input\[0\]: needs max_batch_size above 0",
        ),
        (
            {"max_batch_size": 0, "input": [PLAIN], "batch_output": [{**CUT, "source_input": ["P"]}]},
            r"batch_output\[0\]: needs max_batch_size above 0",
        ),
        ({"batch_input": [count(source_input=["A"])]}, r"source_input: found 'A', which is no input; .* are X, P"),
        ({"batch_input": [count(source_input=[])]}, r"source_input: found 0 names; exactly one is right"),
        ({"batch_input": [count(source_input=["X", "P"])]}, r"source_input: found 2 names"),
        ({"batch_input": [count(target_name=[])]}, r"target_name: found 0 names; exactly one is right"),
        ({"batch_input": [count(target_name=["P"])]}, r"target_name: found 'P', which is an input too"),
        ({"batch_input": [count(), count()]}, r"batch_input\[1\].target_name: found 'N' for the second time"),
        ({"batch_input": [count(data_type="TYPE_INT64")]}, "found TYPE_INT64; it must be TYPE_INT32 or TYPE_FP32"),
        ({"batch_input": [count("BATCH_OTHER")]}, r"batch_input\[0\].kind: found 'BATCH_OTHER'"),
        ({"input": [OPTIONAL], "batch_input": [count()]}, "source_input: found 'X', which is optional"),
        ({"batch_output": [{**CUT, "target_name": ["A"]}]}, "found 'A', which is no output; the outputs are Y, Z"),
        ({"batch_output": [CUT, CUT]}, r"batch_output\[1\].target_name: found 'Y' for the second time"),
        ({"batch_output": [{**CUT, "source_input": ["P"]}]}, r"found 'P' with 1 dims; it gives the sizes that are -1"),
        ({"batch_output": [{**CUT, "kind": "BATCH_OTHER"}]}, r"batch_output\[0\].kind: found 'BATCH_OTHER'"),
        ({"sequence_batching": {"control_input": [START]}}, "allow_ragged_batch: found beside sequence_batching"),
        ({"model_transaction_policy": {"decoupled": True}}, "found with model_transaction_policy.decoupled"),
        ({"input": [INPUT, {**PLAIN, "reshape": {"shape": [1, 2]}}]}, "allow_ragged_batch: found beside reshape"),
        (
            {"ensemble_scheduling": {"step": [{"model_name": "a", "input_map": {"X": "X"}, "output_map": {"Y": "Y"}}]}},
            "found in an ensemble, which runs no batches",
        ),
    ],
)
def test_configurations_that_cannot_be_are_refused_in_words(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelLoadError, match=text):
        configure(**fields)


def test_nothing_is_said_of_tensors_whose_own_section_is_wrong() -> None:
    with pytest.raises(ModelLoadError) as raised:
        configure(input=[{**INPUT, "data_type": "TYPE_NONE"}], batch_input=[count()])
    assert "batch_input" not in str(raised.value)
    with pytest.raises(ModelLoadError) as raised:
        configure(max_batch_size=-1)
    assert "allow_ragged_batch" not in str(raised.value)


def test_a_plain_model_has_nothing_ragged() -> None:
    assert RaggedTensors.of(configure(input=[PLAIN], batch_output=[])) is None
