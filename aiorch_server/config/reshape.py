"""Rules for ``reshape``: both shapes must hold the same elements, whatever the variable sizes are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from aiorch_server.config.problems import Problem

if TYPE_CHECKING:
    from aiorch_server.config.model import ModelConfig
    from aiorch_server.config.tensors import ModelInput, ModelOutput


def find_reshape_problems(config: ModelConfig) -> Iterator[Problem]:
    """A problem for each tensor whose ``reshape`` cannot hold."""
    fields: tuple[tuple[str, Sequence[ModelInput | ModelOutput]], ...] = (
        ("input", config.input),
        ("output", config.output),
    )
    for field, tensors in fields:
        for index, tensor in enumerate(tensors):
            if tensor.reshape is None:
                continue
            location = (field, index, "reshape", "shape")
            shape = tensor.reshape.shape
            if config.ensemble_scheduling is not None:
                yield Problem(location, "found in an ensemble, which passes tensors as they are; remove it")
            elif config.max_batch_size == 0 and not shape:
                yield Problem(location, "found []; without a batch dimension a shape needs at least one number")
            elif _count_between(shape) != _count_between(tensor.dims):
                yield Problem(
                    location,
                    f"found {list(shape)}; it must have as many -1 as dims {list(tensor.dims)}, and the sizes before, "
                    "between and after them must multiply to the same",
                )


def _count_between(shape: Sequence[int]) -> list[int]:
    """The product of the sizes before, between and after the variable ones."""
    products, start = [], 0
    for end in [index for index, size in enumerate(shape) if size == -1] + [len(shape)]:
        products.append(math.prod(shape[start:end]))
        start = end + 1
    return products
