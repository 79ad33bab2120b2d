"""Rules for ragged inputs, and for the tensors that follow from how a batch is composed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from aiorch_server.config.problems import Location, Problem
from aiorch_server.types import DataType

if TYPE_CHECKING:
    from aiorch_server.config.model import ModelConfig
    from aiorch_server.config.tensors import BatchInput, BatchOutput, ModelInput, ModelOutput

#: What a batch input can hold; the protocol's model_config.proto names these two.
BATCH_INPUT_TYPES = (DataType.INT32, DataType.FP32)


def find_ragged_problems(config: ModelConfig, unknown: Collection[str] = ()) -> Iterator[Problem]:
    """A problem for each of ``allow_ragged_batch``, ``batch_input`` and ``batch_output`` that cannot hold.

    Nothing follows from sections that are ``unknown`` because what was written is wrong.
    """
    if not {"input", "output", "max_batch_size"}.isdisjoint(unknown):
        return
    uses: list[Location] = [
        ("input", index, "allow_ragged_batch") for index, each in enumerate(config.input) if each.allow_ragged_batch
    ]
    uses += [("batch_input", index) for index in range(len(config.batch_input))]
    uses += [("batch_output", index) for index in range(len(config.batch_output))]
    obstacle = _find_obstacle(config)
    if obstacle:
        yield from (Problem(use, obstacle) for use in uses)
    inputs = {each.name: each for each in config.input}
    yield from _find_input_problems(config.batch_input, inputs)
    yield from _find_output_problems(config.batch_output, inputs, {each.name: each for each in config.output})


def _find_obstacle(config: ModelConfig) -> str:
    """Why this model cannot have such tensors, "" if it can."""
    policy = config.model_transaction_policy
    if not config.max_batch_size:
        found = "nothing" if config.max_batch_size is None else "0"
        return f"needs max_batch_size above 0, found {found}"
    if config.ensemble_scheduling is not None:
        return "found in an ensemble, which runs no batches; write it in the configuration of the step's model"
    if config.sequence_batching is not None:
        return "found beside sequence_batching, which does not merge requests of different shapes; remove one of them"
    if policy is not None and policy.decoupled:
        return "found with model_transaction_policy.decoupled; such a model takes its requests one by one"
    tensors: tuple[ModelInput | ModelOutput, ...] = (*config.input, *config.output)
    if any(each.reshape is not None for each in tensors):
        return "found beside reshape; write the shapes that clients send in 'dims', without reshape"
    return ""


def _find_input_problems(batch_inputs: tuple[BatchInput, ...], inputs: dict[str, ModelInput]) -> Iterator[Problem]:
    targets: set[str] = set()
    for index, each in enumerate(batch_inputs):
        where: Location = ("batch_input", index)
        yield from _find_count_problems(where, each)
        if each.data_type not in BATCH_INPUT_TYPES:
            known = " or ".join(datatype.config_name for datatype in BATCH_INPUT_TYPES)
            yield Problem((*where, "data_type"), f"found {each.data_type.config_name}; it must be {known}")
        for name in each.target_name:
            if name in inputs:
                text = f"found '{name}', which is an input too; the server gives it, leave it out of 'input'"
                yield Problem((*where, "target_name"), text)
            if name in targets:
                yield Problem((*where, "target_name"), f"found '{name}' for the second time; names must differ")
            targets.add(name)
        yield from _find_source_problems(where, each, inputs)


def _find_output_problems(
    batch_outputs: tuple[BatchOutput, ...], inputs: dict[str, ModelInput], outputs: dict[str, ModelOutput]
) -> Iterator[Problem]:
    targets: set[str] = set()
    for index, each in enumerate(batch_outputs):
        where: Location = ("batch_output", index)
        yield from _find_count_problems(where, each)
        for name in each.target_name:
            if name not in outputs:
                known = ", ".join(outputs) or "none"
                yield Problem((*where, "target_name"), f"found '{name}', which is no output; the outputs are {known}")
            if name in targets:
                yield Problem((*where, "target_name"), f"found '{name}' for the second time; an output is cut once")
            targets.add(name)
        yield from _find_source_problems(where, each, inputs)
        for target, source in zip(each.target_name, each.source_input, strict=False):
            if target in outputs and source in inputs:
                given, sizes = outputs[target].dims, inputs[source].dims
                if any(size == -1 and place >= len(sizes) for place, size in enumerate(given)):
                    text = (
                        f"found '{source}' with {len(sizes)} dims; it gives the sizes that are -1 in dims "
                        f"{list(given)} of '{target}', so it must have as many"
                    )
                    yield Problem((*where, "source_input"), text)


def _find_count_problems(where: Location, each: BatchInput | BatchOutput) -> Iterator[Problem]:
    for field, names in (("target_name", each.target_name), ("source_input", each.source_input)):
        if len(names) != 1:
            yield Problem((*where, field), f"found {len(names)} names; exactly one is right")


def _find_source_problems(
    where: Location, each: BatchInput | BatchOutput, inputs: dict[str, ModelInput]
) -> Iterator[Problem]:
    for name in each.source_input:
        if name not in inputs:
            known = ", ".join(inputs) or "none"
            yield Problem((*where, "source_input"), f"found '{name}', which is no input; the inputs are {known}")
        elif inputs[name].optional:
            text = f"found '{name}', which is optional; every request must bring it"
            yield Problem((*where, "source_input"), text)
