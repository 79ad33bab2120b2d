"""Ensembles as graphs, without a server: what is wrong with a configuration or with its models, all at once."""

from __future__ import annotations

from typing import Any

import pytest

from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import ModelLoadError
from aiorch_server.scheduling.ensemble_graph import EnsembleGraph, convert_shape
from aiorch_server.types import DataType, ModelSignature, TensorSpec


def step(model: str, inputs: dict[str, str], outputs: dict[str, str], version: int = -1) -> dict[str, Any]:
    return {"model_name": model, "model_version": version, "input_map": inputs, "output_map": outputs}


def tensor(name: str, data_type: str = "TYPE_FP32", dims: tuple[int, ...] = (4,), **more: Any) -> dict[str, Any]:
    return {"name": name, "data_type": data_type, "dims": dims, **more}


CHAIN = [step("a", {"X": "IN"}, {"Y": "t"}), step("b", {"X": "t"}, {"Y": "OUT"})]


def write(steps: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "platform": "ensemble",
        "max_batch_size": 4,
        "input": [tensor("IN")],
        "output": [tensor("OUT")],
        "ensemble_scheduling": {"step": steps},
    } | changes


def problems_of(data: dict[str, Any]) -> str:
    with pytest.raises(ModelLoadError) as caught:
        ModelConfig.from_dict(data, folder="e")
    return str(caught.value)


def test_a_step_without_a_version_tells_that_it_takes_the_latest() -> None:
    """perf_analyzer asks for the configuration of each step's version, and -1 is the only number that is none."""
    plain = {name: value for name, value in step("a", {"X": "IN"}, {"Y": "OUT"}).items() if name != "model_version"}
    config = ModelConfig.from_dict(write([plain]), folder="e")
    assert config.to_dict()["ensemble_scheduling"]["step"][0]["model_version"] == -1
    assert EnsembleGraph(config).models == (("a", ""),)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (write([]), "must specify 'step' for ensemble 'e'"),
        (write([step("", {"X": "IN"}, {"Y": "OUT"})]), "step[0].model_name: must specify 'model_name'"),
        (write([step("e", {"X": "IN"}, {"Y": "OUT"})]), "circular dependency between ensembles: e"),
        (write([step("a", {"X": "IN"}, {"Y": "OUT"}, -2)]), "step[0].model_version: found -2"),
        (write([{**CHAIN[0], "model_namespace": "n"}, CHAIN[1]]), "step[0].model_namespace: found one"),
        (write([step("a", {}, {"Y": "OUT"})]), "must set 'input_map' in step 0 of ensemble 'e'"),
        (write([step("a", {"X": "IN"}, {})]), "must set 'output_map' in step 0 of ensemble 'e'"),
        (
            write([step("a", {"X": "IN"}, {"Y": "OUT"}), step("b", {"X": "IN"}, {"Y": "OUT"})]),
            "ensemble tensor 'OUT' can appear in an output map only once for ensemble 'e'; step 0 writes it too",
        ),
        (write([step("a", {"X": "IN"}, {"Y": "OUT", "Z": "IN"})]), "ensemble tensor 'IN' is an input of ensemble 'e'"),
        (write([step("a", {"X": "IN", "Z": "lost"}, {"Y": "OUT"})]), "'lost' is neither an input nor written"),
        (write([step("a", {"X": "IN"}, {"Y": "OUT", "Z": "t"})]), "ensemble tensor 't' is unused in ensemble 'e'"),
        (
            write(CHAIN, input=[tensor("IN"), tensor("MORE")]),
            "input[1]: ensemble input 'MORE' for ensemble 'e' is not used",
        ),
        (write(CHAIN, output=[tensor("OUT"), tensor("W")]), "output[1]: output 'W' for ensemble 'e' is not written"),
        (
            write(
                [
                    step("a", {"X": "IN", "Z": "v"}, {"Y": "t"}),
                    step("b", {"X": "t"}, {"Y": "u"}),
                    step("c", {"X": "u"}, {"Y": "v", "W": "OUT"}),
                ]
            ),
            "wait for each other's tensors: step 0 ('a') -> step 1 ('b') -> step 2 ('c') -> step 0 ('a')",
        ),
        (write([step("a", {"X": "IN", "Z": "t"}, {"Y": "t", "W": "OUT"})]), "step 0 ('a') -> step 0 ('a')"),
        (write(CHAIN, platform="onnxruntime_onnx"), "platform: found 'onnxruntime_onnx'"),
        (write(CHAIN, backend="python"), "backend: found 'python'"),
        (write(CHAIN, input=[]), "input: is empty"),
        (write(CHAIN, instance_group=[{"count": 2}]), "instance_group: should not be specified for ensemble 'e'"),
        (write(CHAIN, optimization={"graph": {"level": 1}}), "optimization: should not be specified"),
        (write(CHAIN, dynamic_batching={}), "only one scheduler can be written"),
        ({"platform": "ensemble"}, "ensemble_scheduling: is missing; platform 'ensemble' needs it"),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, Any], expected: str) -> None:
    assert expected in problems_of(data)


def test_all_problems_are_told_at_once() -> None:
    text = problems_of(write([step("", {"X": "lost"}, {"Y": "t"}), step("b", {}, {"Y": "t"})], platform="x"))
    for part in ("platform", "model_name", "'lost'", "'IN'", "'OUT'", "only once", "'input_map' in step 1", "unused"):
        assert part in text, part


def graph_of(data: dict[str, Any], *decoupled: str) -> EnsembleGraph:
    return EnsembleGraph(ModelConfig.from_dict(data, folder="e"), [(name, "") for name in decoupled])


def sign(
    inputs: tuple[TensorSpec, ...] = (TensorSpec("X", DataType.FP32, (4,)),),
    outputs: tuple[TensorSpec, ...] = (TensorSpec("Y", DataType.FP32, (4,)),),
    size: int = 4,
) -> ModelSignature:
    return ModelSignature(inputs, outputs, size)


ENSEMBLE = sign((TensorSpec("IN", DataType.FP32, (4,)),), (TensorSpec("OUT", DataType.FP32, (4,)),))


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (sign(), []),
        (sign(size=8), []),
        (sign(inputs=(TensorSpec("X", DataType.FP32, (-1,)), TensorSpec("Z", DataType.FP32, (1,), optional=True))), []),
        # a model that does not batch takes whole tensors
        (sign((TensorSpec("X", DataType.FP32, (-1, 4)),), (TensorSpec("Y", DataType.FP32, (-1, 4)),), 0), []),
        (
            sign(size=2),
            [
                "ensemble e allows maximum batch size 4, but it contains model b which only allows maximum batch size "
                "to be 2"
            ],
        ),
        (
            sign((TensorSpec("X", DataType.INT32, (4,)),)),
            [
                "in ensemble e, ensemble tensor t: inconsistent data type: TYPE_FP32 is inferred from model a while "
                "TYPE_INT32 is inferred from model b"
            ],
        ),
        (
            sign(outputs=(TensorSpec("Y", DataType.FP32, (5,)),)),
            [
                "in ensemble e, ensemble tensor OUT: inconsistent shape: [-1,4] is inferred from model e while [-1,5] "
                "is inferred from model b"
            ],
        ),
        (
            sign((TensorSpec("P", DataType.FP32, (4,)),), (TensorSpec("Q", DataType.FP32, (4,)),)),
            [
                "in ensemble e, input P in model b is not mapped to any ensemble tensors",
                "in ensemble e, ensemble tensor t is mapping to non-existing input X in model b",
                "in ensemble e, ensemble tensor OUT is mapped from non-existing output Y in model b",
            ],
        ),
    ],
)
def test_models_that_do_not_fit_are_named(second: ModelSignature, expected: list[str]) -> None:
    models = {("a", ""): sign(), ("b", ""): second}
    assert list(graph_of(write(CHAIN)).find_mismatches("e", ENSEMBLE, models)) == expected


def test_a_request_runs_the_steps_that_it_needs_in_an_order_that_works() -> None:
    steps = [
        step("last", {"P": "t", "Q": "u"}, {"Y": "OUT"}),
        step("one", {"X": "IN"}, {"Y": "t"}),
        step("two", {"X": "t"}, {"Y": "u"}),
        step("side", {"X": "t"}, {"Y": "SIDE"}),
    ]
    graph = graph_of(write(steps, output=[tensor("OUT"), tensor("SIDE")]))
    assert [each.model[0] for each in graph.plan([]).steps] in (
        ["one", "two", "side", "last"],
        ["one", "side", "two", "last"],
    )
    assert [each.model[0] for each in graph.plan(["SIDE"]).steps] == ["one", "side"]
    plan = graph.plan(["OUT"])
    assert [each.model[0] for each in plan.steps] == ["one", "two", "last"]
    assert plan.readers == {"OUT": 1, "IN": 1, "t": 2, "u": 1}
    assert graph.plan(["OUT"]) is plan


def test_what_is_behind_a_decoupled_step_is_a_stage_of_its_own() -> None:
    steps = [
        step("last", {"P": "before", "Q": "u"}, {"Y": "OUT"}),
        step("two", {"X": "s"}, {"Y": "u"}),
        step("one", {"X": "IN"}, {"Y": "t"}),
        step("middle", {"X": "t"}, {"Y": "s"}),
        step("early", {"X": "IN"}, {"Y": "before"}),
    ]
    graph = graph_of(write(steps, output=[tensor("OUT"), tensor("before")]), "one", "two")
    plan = graph.plan([])
    stages = [(each.opener and each.opener.model[0], [step.model[0] for step in each.steps]) for each in plan.stages]
    assert stages == [(None, ["early"]), ("one", ["middle"]), ("two", ["last"])]
    assert plan.shared == {"IN", "before"}  # read twice, and read once for every answer
    assert [[step.model[0] for step in each.steps] for each in graph.plan(["before"]).stages] == [["early"]]
    assert list(graph.find_joins("e")) == []


def test_answers_that_do_not_belong_together_are_named() -> None:
    steps = [
        step("one", {"X": "IN"}, {"Y": "t"}),
        step("two", {"X": "t"}, {"Y": "u"}),
        step("three", {"X": "t"}, {"Y": "v"}),
        step("join", {"P": "IN", "Q": "u"}, {"Y": "OUT"}),
        step("bad", {"P": "u", "Q": "v"}, {"Y": "w"}),
    ]
    data = write(steps, output=[tensor("OUT"), tensor("w"), tensor("v")])
    assert list(graph_of(data).find_joins("e")) == list(graph_of(data, "one", "two").find_joins("e")) == []
    found = list(graph_of(data, "one", "two", "three").find_joins("e"))
    assert len(found) == 2 and "step of model 'bad'" in found[0] and "the outputs originate from" in found[1]
    assert all("(step 1, model 'two' and step 2, model 'three')" in text for text in found)


@pytest.mark.parametrize(
    ("dims", "is_batching", "rows", "shape", "expected"),
    [
        ((4,), True, 2, (2, 4), (2, 4)),
        ((4,), True, 0, (4,), (1, 4)),
        ((4,), True, 0, (3, 4), (3, 4)),
        ((4,), False, 1, (1, 4), (4,)),
        ((1, 4), False, 1, (1, 4), (1, 4)),
        ((-1, 4), False, 2, (2, 4), (2, 4)),
        ((4,), False, 2, (2, 4), (2, 4)),
        ((4,), False, 0, (4,), (4,)),
    ],
)
def test_shapes_between_models_that_batch_and_others(
    dims: tuple[int, ...], is_batching: bool, rows: int, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert convert_shape(dims, is_batching, rows, shape) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (write(CHAIN[:1]), "'t' is unused in ensemble 'e'"),
        (write([{**CHAIN[0], "wrong": 1}, CHAIN[1]]), "ensemble_scheduling.step[0].wrong: unknown key"),
        (write([{**CHAIN[0], "model_version": "x"}]), "ensemble_scheduling.step[0].model_version: found 'x'"),
        (write([{**CHAIN[0], "input_map": ["X"]}, CHAIN[1]]), "ensemble_scheduling.step[0].input_map: found ['X']"),
        (write(CHAIN, input=[tensor("IN", "TYPE_FLOAT")]), "input[0].data_type: found 'TYPE_FLOAT'"),
        (write(CHAIN, output=[tensor("OUT", wrong=1)]), "output[0].wrong: unknown key"),
    ],
)
def test_a_section_that_is_wrong_by_itself_is_not_called_missing(data: dict[str, Any], expected: str) -> None:
    text = problems_of(data)
    assert expected in text
    for untrue in ("is missing", "is empty", "is neither"):
        assert untrue not in text
