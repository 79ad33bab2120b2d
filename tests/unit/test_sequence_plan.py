"""What a `sequence_batching` section may say, and what it means for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import ModelLoadError
from aiorch_server.scheduling.sequence_plan import encode_correlation, read_plan
from aiorch_server.types import DataType, ModelSignature, TensorSpec

OLDEST = {"oldest": {"max_candidate_sequences": 2}}
STATE = {"input_name": "in", "output_name": "out", "data_type": "TYPE_FP32", "dims": [2]}
START = {"name": "start", "control": [{"kind": "CONTROL_SEQUENCE_START", "int32_false_true": [0, 1]}]}
INITIAL = {"data_type": "TYPE_FP32", "dims": [2], "name": "i"}


def configure(section: dict[str, Any], **others: Any) -> ModelConfig:
    return ModelConfig.from_dict({"sequence_batching": section, **others}, folder="m")


def control(**signal: Any) -> dict[str, Any]:
    return {"control_input": [{"name": "c", "control": [signal]}]}


def state(**changes: Any) -> dict[str, Any]:
    return {"state": [STATE | changes]}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"direct": {}, **OLDEST}, "oldest: found beside direct; only one strategy can be written"),
        ({"oldest": {}}, "oldest.max_candidate_sequences: found 0; an instance needs at least 1"),
        ({"oldest": {"max_candidate_sequences": 1, "preferred_batch_size": [0]}}, "preferred_batch_size[0]: found 0"),
        ({"direct": {"minimum_slot_utilization": 1.5}}, "direct.minimum_slot_utilization: found 1.5"),
        ({"control_input": [START, START]}, "control_input[1].name: found 'start' for the second time"),
        ({"control_input": [START, START | {"name": "b"}]}, "found CONTROL_SEQUENCE_START for the second time"),
        ({"control_input": [{"name": "c"}]}, "control: found 0; a control tensor carries exactly one signal"),
        ({"control_input": [{"name": "", "control": START["control"]}]}, "control_input[0].name: found ''"),
        (control(kind="CONTROL_SEQUENCE_END"), "control[0]: found none; exactly one of int32_false_true"),
        (control(int32_false_true=[0, 1], fp32_false_true=[0, 1]), "found int32_false_true and fp32_false_true"),
        (control(int32_false_true=[0]), "int32_false_true: found 1 values; two are right, for false and for true"),
        (control(bool_false_true=[False, True], data_type="TYPE_INT32"), "is only for CONTROL_SEQUENCE_CORRID"),
        (control(kind="CONTROL_SEQUENCE_CORRID"), "data_type: found nothing; a correlation id is one of TYPE_UINT64"),
        (control(kind="CONTROL_SEQUENCE_CORRID", data_type="TYPE_FP32"), "data_type: found TYPE_FP32; a correlation"),
        (
            control(kind="CONTROL_SEQUENCE_CORRID", data_type="TYPE_UINT64", int32_false_true=[0, 1]),
            "int32_false_true: is not for CONTROL_SEQUENCE_CORRID; remove it",
        ),
        (state(input_name=""), "state[0].input_name: found ''"),
        ({"state": [STATE, STATE]}, "state[1].input_name: found 'in' for the second time"),
        ({"state": [STATE], "control_input": [START | {"name": "in"}]}, "state[0].input_name: found 'in' for"),
        (state(initial_state=[INITIAL]), "initial_state[0]: found none; exactly one of zero_data, data_file"),
        (state(initial_state=[INITIAL | {"zero_data": True, "data_file": "f"}]), "found zero_data and data_file"),
        (state(initial_state=[INITIAL | {"data_file": "../f"}]), "initial_state[0].data_file: found '../f'"),
        (state(initial_state=[INITIAL | {"zero_data": True}] * 2), "initial_state: found 2; a state begins with one"),
        (
            state(initial_state=[INITIAL | {"zero_data": True, "data_type": "TYPE_INT32"}]),
            "initial_state[0].data_type: found TYPE_INT32; the state is TYPE_FP32",
        ),
        (
            state(initial_state=[INITIAL | {"zero_data": True, "dims": [3]}]),
            "initial_state[0].dims: found [3]; the state has dims [2]",
        ),
        (state(initial_state=[INITIAL | {"zero_data": True, "dims": [-1]}]), "dims: found [-1]; data has definite"),
        ({"iterative_sequence": True}, "iterative_sequence: not supported: a request is run once"),
        ({"max_sequence_idle_microseconds": -1}, "max_sequence_idle_microseconds: found -1"),
    ],
)
def test_a_problem_is_named(section: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        configure(section)
    assert "sequence_batching." in str(caught.value)
    assert expected in str(caught.value)


def test_beside_other_fields() -> None:
    given = {"name": "start", "data_type": "TYPE_INT32", "dims": [1]}
    with pytest.raises(ModelLoadError, match=r"control_input\[0\].name: found 'start', which is an input too"):
        configure({"control_input": [START]}, input=[given])
    oldest = {"oldest": {"max_candidate_sequences": 1, "preferred_batch_size": [8]}}
    with pytest.raises(ModelLoadError, match=r"preferred_batch_size\[0\]: found 8; it must be at most max_batch_size"):
        configure(oldest, max_batch_size=4)


def test_initial_data(tmp_path: Path) -> None:
    folder = tmp_path / "initial_state"
    folder.mkdir()
    config = configure(state(initial_state=[INITIAL | {"data_file": "f"}]))
    with pytest.raises(ModelLoadError, match="initial_state/f' cannot be read: No such file"):
        read_plan(config, tmp_path)
    (folder / "f").write_bytes(bytes(9))
    with pytest.raises(ModelLoadError, match="has 9 bytes, 8 are needed"):
        read_plan(config, tmp_path)
    (folder / "f").write_bytes(b"\x01" * 8)
    plan = read_plan(config, tmp_path)
    assert plan is not None and (plan.states[0].shape, plan.states[0].data) == ((2,), b"\x01" * 8)
    text = configure(
        state(data_type="TYPE_STRING", initial_state=[INITIAL | {"data_type": "TYPE_STRING", "data_file": "f"}])
    )
    (folder / "f").write_bytes(b"\x01\0\0\0a")
    with pytest.raises(ModelLoadError, match="does not hold exactly 2 strings"):
        read_plan(text, tmp_path)
    (folder / "f").write_bytes(b"\x01\0\0\0a\0\0\0\0")
    assert read_plan(text, tmp_path) is not None


def test_sizes_that_nobody_wrote_begin_with_one(tmp_path: Path) -> None:
    plan = read_plan(configure(state(dims=[-1, 3])), tmp_path)
    assert plan is not None and (plan.states[0].shape, plan.states[0].data) == ((1, 3), bytes(12))
    with pytest.raises(ModelLoadError, match="is more than 268435456 bytes"):
        read_plan(configure(state(dims=[1 << 40])), tmp_path)


WHOLE = ModelSignature(
    (
        TensorSpec("x", DataType.FP32, (4,)),
        TensorSpec("start", DataType.INT32, (1,)),
        TensorSpec("in", DataType.FP32, (2,)),
    ),
    (TensorSpec("y", DataType.FP32, (4,)), TensorSpec("out", DataType.FP32, (2,))),
    8,
)  # fmt: skip


def test_what_clients_see(tmp_path: Path) -> None:
    config = configure({"control_input": [START], "state": [STATE]})
    plan = read_plan(config, tmp_path)
    assert plan is not None
    public = plan.separate(WHOLE, config.declare_signature())
    assert [spec.name for spec in public.inputs] == ["x"]
    assert [spec.name for spec in public.outputs] == ["y"]
    # a state that its owner writes as an output is one as well
    shown = configure({"state": [STATE]}, output=[{"name": "out", "data_type": "TYPE_FP32", "dims": [2]}])
    assert [spec.name for spec in plan.separate(WHOLE, shown.declare_signature()).outputs] == ["y", "out"]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (state(input_name="other"), "the model has no input 'other', it has x, start, in"),
        (state(output_name="other"), "the model has no output 'other', it has y, out"),
        (state(dims=[3]), r"input 'in' is FP32 \[3\] there, but the model has FP32 \[2\]"),
        (state(data_type="TYPE_FP16"), "input 'in' is FP16"),
        (
            {"state": [STATE | {"input_name": "x", "dims": [4], "output_name": "y"}, STATE]},
            "leaves no output for clients",
        ),
    ],
)
def test_what_the_model_has_not(tmp_path: Path, section: dict[str, Any], expected: str) -> None:
    config = configure(section)
    plan = read_plan(config, tmp_path)
    assert plan is not None
    with pytest.raises(ModelLoadError, match=expected):
        plan.separate(WHOLE, config.declare_signature())


@pytest.mark.parametrize(
    ("id", "datatype", "expected"),
    [
        (5, DataType.UINT64, b"\5" + bytes(7)),
        ((1 << 64) - 1, DataType.INT64, b"\xff" * 8),
        ((1 << 32) - 1, DataType.UINT32, b"\xff" * 4),
        ((1 << 31) - 1, DataType.INT32, b"\xff\xff\xff\x7f"),
        ("é", DataType.BYTES, b"\2\0\0\0\xc3\xa9"),
        (12, DataType.BYTES, b"\2\0\0\x0012"),
    ],
)
def test_correlation_ids(id: int | str, datatype: DataType, expected: bytes) -> None:
    assert encode_correlation(id, datatype) == expected


@pytest.mark.parametrize(
    ("id", "datatype"), [(1 << 31, DataType.INT32), (1 << 32, DataType.UINT32), ("5", DataType.UINT64)]
)
def test_correlation_ids_that_do_not_fit(id: int | str, datatype: DataType) -> None:
    with pytest.raises(ValueError, match="the model takes correlation IDs as"):
        encode_correlation(id, datatype)
