"""What this version does not do with a model configuration: one table, so that nothing is ignored in silence.

A field in ``REFUSED`` makes the load fail when it asks for something; a field in ``NO_EFFECT`` is accepted because it
describes or hints and cannot change an answer. When a feature comes, its line goes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from aiorch_server.config.placement import InstanceKind
from aiorch_server.config.problems import Location, Problem, format_path


@dataclass(frozen=True, slots=True)
class Restriction:
    """A field, written ``list[].field``, with the reason and what would be right instead.

    A field asks for something when it is present and neither empty, zero, false nor its enum's first value; with
    ``values``, when it is one of them.
    """

    path: str
    reason: str
    values: tuple[object, ...] = ()


REFUSED: tuple[Restriction, ...] = (
    Restriction("sequence_batching.iterative_sequence", "a request is run once; write false"),
    Restriction("model_repository_agents.agents", "repository agents are not supported; prepare the folder before"),
    Restriction("model_operations.op_library_filename", "custom operation libraries are not loaded; remove it"),
    Restriction("cc_model_filenames", "artefacts per compute capability are not supported; use default_model_filename"),
    Restriction("runtime", "the backend chooses its runtime; write 'backend' instead"),
    Restriction("input[].is_shape_tensor", "shape tensors are not supported; remove it"),
    Restriction("input[].is_non_linear_format_io", "only row-major tensors are supported; write false"),
    Restriction("output[].is_shape_tensor", "shape tensors are not supported; remove it"),
    Restriction("output[].is_non_linear_format_io", "only row-major tensors are supported; write false"),
    Restriction(
        "instance_group[].kind", "the server places instances; write KIND_CPU or KIND_GPU", (InstanceKind.KIND_MODEL,)
    ),
    Restriction("instance_group[].secondary_devices", "secondary devices are not supported; remove it"),
    Restriction("instance_group[].profile", "optimisation profiles are not supported; remove it"),
    Restriction("instance_group[].passive", "every instance takes requests; write false or remove the group"),
    Restriction("instance_group[].host_policy", "host policies are not supported; remove it"),
    Restriction("optimization.execution_accelerators", "accelerators are chosen by backend parameters; remove it"),
)

NO_EFFECT: tuple[Restriction, ...] = (
    Restriction("metric_tags", "metrics carry the model's name and version only"),
    Restriction("model_metrics", "histograms have fixed bounds so that they add up over machines"),
    Restriction("input[].format", "describes the layout; bytes are passed unchanged"),
    Restriction("optimization.priority", "models share the processors evenly"),
    Restriction("optimization.graph", "backends optimise graphs by their own parameters"),
    Restriction("optimization.cuda", "a hint for GPUs"),
    Restriction("optimization.input_pinned_memory", "a hint for GPUs"),
    Restriction("optimization.output_pinned_memory", "a hint for GPUs"),
    Restriction("optimization.gather_kernel_buffer_threshold", "a hint for GPUs"),
    Restriction(
        "sequence_batching.state[].use_same_buffer_for_input_output", "state is given and taken as separate tensors"
    ),
    Restriction("sequence_batching.state[].use_growable_memory", "a hint for GPUs"),
    Restriction("optimization.eager_batching", "a free instance always pulls its batch itself"),
)


def find_refused(config: BaseModel) -> Iterator[Problem]:
    """Yields a problem for each field that asks for what this version does not do."""
    for restriction in REFUSED:
        for location in _find_uses(config, restriction):
            yield Problem(location, f"not supported: {restriction.reason}")


def find_without_effect(config: BaseModel) -> Iterator[str]:
    """Yields one sentence for each field that is accepted but changes nothing."""
    for restriction in NO_EFFECT:
        for location in _find_uses(config, restriction):
            yield f"{format_path(location)} has no effect: {restriction.reason}"


def _find_uses(config: BaseModel, restriction: Restriction) -> Iterator[Location]:
    places: list[tuple[Location, object]] = [((), config)]
    for step in restriction.path.split("."):
        name = step.removesuffix("[]")
        places = [
            ((*location, name), value) for location, section in places if (value := getattr(section, name)) is not None
        ]
        if step.endswith("[]"):
            places = [
                ((*location, index), element)
                for location, elements in places
                if isinstance(elements, tuple)
                for index, element in enumerate(elements)
            ]
    for location, value in places:
        if value in restriction.values if restriction.values else _is_asking(value):
            yield location


def _is_asking(value: object) -> bool:
    if isinstance(value, enum.Enum):
        return value is not next(iter(type(value)))
    if isinstance(value, BaseModel):
        return True
    if isinstance(value, Mapping | tuple | str):
        return len(value) > 0
    return bool(value)
