"""What counts as agreement of two versions: answers that differ, or one that answers what the other refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from aiorch_server.deployments.shadow import Comparer
from aiorch_server.errors import (
    AiorchError,
    DeadlineExpired,
    ModelExecutionError,
    ModelNotReady,
    QueueFull,
    RequestCancelled,
    RequestError,
    UnknownVersion,
)
from aiorch_server.registry.records import Gates
from aiorch_server.routing import Sample
from aiorch_server.types import InferenceResponse, Tensor

Outcome = float | AiorchError
BAD, BROKEN = RequestError("input 'X' has shape [3]"), ModelExecutionError("no legs")
REQUEST: Any = SimpleNamespace(id="7")


def answer(value: float) -> InferenceResponse:
    return InferenceResponse("m", "1", (Tensor("OUT", "FP32", (1,), np.array([value], np.float32).tobytes()),))


async def compared(stable: Outcome, candidate: Outcome, *, answers: int) -> list[str]:
    """What is noted of a request that version ``answers`` got, and the other one a copy of; 1 is the stable one."""
    notes: list[str] = []
    outcomes = {1: stable, 2: candidate}

    async def replay(request: Any, version: int, *, deadline_ns: int = 0) -> InferenceResponse:
        assert version != answers
        outcome = outcomes[version]
        if isinstance(outcome, AiorchError):
            raise outcome
        return answer(outcome)

    first = outcomes[answers]
    given = (None, first) if isinstance(first, AiorchError) else (answer(first), None)
    sample = Sample(cast(Any, SimpleNamespace(version=answers)), REQUEST, given[0], given[1], 0)
    await Comparer(1, 2, Gates(), notes.append).observe(sample, replay)
    return notes


@pytest.mark.parametrize("answers", [1, 2])
@pytest.mark.parametrize(
    ("stable", "candidate", "noted"),
    [
        (1.0, 1.0, [""]),
        (1.0, 2.0, ["request '7': output 'OUT'"]),
        (BAD, BAD, []),
        (BROKEN, BROKEN, []),
        (BAD, BROKEN, []),
        (1.0, BAD, ["request '7': version 2 failed: input 'X' has shape [3]"]),
        (1.0, BROKEN, ["request '7': version 2 failed: no legs"]),
        (BAD, 1.0, ["request '7': version 1 failed: input 'X' has shape [3]"]),
        (BROKEN, 1.0, ["request '7': version 1 failed: no legs"]),
        *((1.0, error, []) for error in (QueueFull(""), DeadlineExpired(""), ModelNotReady(""), UnknownVersion(""))),
        *((error, 1.0, []) for error in (QueueFull(""), DeadlineExpired(""), ModelNotReady(""), RequestCancelled(""))),
        (BROKEN, QueueFull(""), []),
        (RequestCancelled(""), BROKEN, []),
    ],
)
async def test_what_is_noted(stable: Outcome, candidate: Outcome, noted: list[str], answers: int) -> None:
    found = await compared(stable, candidate, answers=answers)
    assert len(found) == len(noted)
    for text, begin in zip(found, noted, strict=True):
        assert text.startswith(begin) and bool(text) is bool(begin)


async def test_other_versions_are_not_compared() -> None:
    notes: list[str] = []

    async def replay(request: Any, version: int, *, deadline_ns: int = 0) -> InferenceResponse:
        raise AssertionError("nobody asked")

    sample = Sample(cast(Any, SimpleNamespace(version=3)), REQUEST, answer(1.0), None, 0)
    await Comparer(1, 2, Gates(), notes.append).observe(sample, replay)
    assert not notes
