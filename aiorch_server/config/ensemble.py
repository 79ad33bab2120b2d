"""What an ensemble's configuration must be by itself: a graph of tensors in which everything is written and read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from aiorch_server.config.batching import EnsembleStep
from aiorch_server.config.labels import PREFIX as LABEL_PREFIX
from aiorch_server.config.problems import Problem

if TYPE_CHECKING:
    from aiorch_server.config.model import ModelConfig

PLATFORM = "ensemble"
_LATEST = -1


def find_ensemble_problems(config: ModelConfig, unknown: Collection[str] = ()) -> Iterator[Problem]:
    """Yields what is wrong with the ensemble ``config``, whatever its models are; texts as Triton has them.

    ``unknown`` names sections that were written and taken out because they are wrong by themselves.
    """
    scheduling = config.ensemble_scheduling
    if scheduling is None:
        if config.platform == PLATFORM and "ensemble_scheduling" not in unknown:
            yield Problem(("ensemble_scheduling",), f"is missing; platform '{PLATFORM}' needs it")
        return
    for field in ("platform", "backend"):
        if getattr(config, field) not in ("", PLATFORM):
            yield Problem((field,), f"found '{getattr(config, field)}'; an ensemble has platform '{PLATFORM}' only")
    for field in ("instance_group", "optimization", "model_warmup", "default_model_filename"):
        if getattr(config, field):
            yield Problem((field,), f"should not be specified for ensemble '{config.name}': its models have their own")
    for name in config.parameters:
        if not name.startswith(LABEL_PREFIX):
            yield Problem(("parameters", name), f"an ensemble reads none but {LABEL_PREFIX}<label>; write it at a step")
    for field in ("input", "output"):
        if not getattr(config, field) and field not in unknown:
            yield Problem((field,), f"is empty; ensemble '{config.name}' must list its {field}s")
    if not scheduling.step:
        yield Problem(("ensemble_scheduling", "step"), f"must specify 'step' for ensemble '{config.name}'")
        return
    for index, step in enumerate(scheduling.step):
        yield from _find_step_problems(config.name, index, step)
    if not {"input", "output"} & set(unknown):
        yield from _find_graph_problems(config, scheduling.step)


def _find_step_problems(ensemble: str, index: int, step: EnsembleStep) -> Iterator[Problem]:
    place = ("ensemble_scheduling", "step", index)
    if not step.model_name:
        yield Problem((*place, "model_name"), f"must specify 'model_name' in step {index} of ensemble '{ensemble}'")
    elif step.model_name == ensemble:
        yield Problem((*place, "model_name"), f"circular dependency between ensembles: {ensemble} -> ... -> {ensemble}")
    if step.model_version < _LATEST:
        yield Problem((*place, "model_version"), f"found {step.model_version}; a version, or -1 for the latest")
    if step.model_namespace:
        yield Problem((*place, "model_namespace"), "found one; models have no namespaces here, remove it")
    for field, mapping in (("input_map", step.input_map), ("output_map", step.output_map)):
        if not mapping:
            yield Problem((*place, field), f"must set '{field}' in step {index} of ensemble '{ensemble}'")


def _find_graph_problems(config: ModelConfig, steps: tuple[EnsembleStep, ...]) -> Iterator[Problem]:
    inputs = {each.name for each in config.input}
    outputs = {each.name for each in config.output}
    writers: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name, tensor in step.output_map.items():
            place = ("ensemble_scheduling", "step", index, "output_map", name)
            if tensor in writers:
                text = f"ensemble tensor '{tensor}' can appear in an output map only once for ensemble '{config.name}'"
                yield Problem(place, f"{text}; step {writers[tensor]} writes it too")
            elif tensor in inputs:
                yield Problem(place, f"ensemble tensor '{tensor}' is an input of ensemble '{config.name}' already")
            writers.setdefault(tensor, index)
    read = {tensor for step in steps for tensor in step.input_map.values()}
    for index, step in enumerate(steps):
        for name, tensor in step.input_map.items():
            if tensor not in inputs and tensor not in writers:
                place = ("ensemble_scheduling", "step", index, "input_map", name)
                yield Problem(place, f"ensemble tensor '{tensor}' is neither an input nor written by any step")
        for name, tensor in step.output_map.items():
            if tensor not in read and tensor not in outputs:
                place = ("ensemble_scheduling", "step", index, "output_map", name)
                yield Problem(place, f"ensemble tensor '{tensor}' is unused in ensemble '{config.name}'")
    for place_index, each in enumerate(config.input):
        if each.name not in read:
            text = f"ensemble input '{each.name}' for ensemble '{config.name}' is not used"
            yield Problem(("input", place_index), text)
    for place_index, output in enumerate(config.output):
        if output.name not in writers:
            text = f"output '{output.name}' for ensemble '{config.name}' is not written"
            yield Problem(("output", place_index), text)
    cycle = _find_cycle(steps, writers)
    if cycle:
        names = " -> ".join(f"step {index} ('{steps[index].model_name}')" for index in cycle)
        yield Problem(("ensemble_scheduling", "step"), f"these steps wait for each other's tensors: {names}")


def _find_cycle(steps: tuple[EnsembleStep, ...], writers: Mapping[str, int]) -> list[int]:
    """Steps of a cycle, the first again at the end; empty if there is none."""
    before = [{writers[tensor] for tensor in step.input_map.values() if tensor in writers} for step in steps]
    open_steps = set(range(len(steps)))
    while ready := {index for index in open_steps if not before[index] & open_steps}:
        open_steps -= ready
    if not open_steps:
        return []
    # Whoever is left waits for another one that is left: following that, some step comes twice.
    path = [min(open_steps)]
    while path.count(path[-1]) == 1:
        path.append(min(before[path[-1]] & open_steps))
    return path[path.index(path[-1]) :][::-1]
