"""Sections of a model configuration that choose a scheduler: dynamic and ensemble; `sequence.py` has the third."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping

from pydantic import Field, model_validator

from aiorch_server.config.problems import Problem, raise_problems
from aiorch_server.config.section import Flag, Int32, Int64, Microseconds, Section, UInt32, UInt64


class TimeoutAction(enum.StrEnum):
    """What becomes of a request that waited too long: refused, or served after all others."""

    REJECT = "REJECT"
    DELAY = "DELAY"


class QueuePolicy(Section):
    """Bounds of the queue of one priority level: 0 stands for no time-out and for no bound of its own."""

    timeout_action: TimeoutAction = TimeoutAction.REJECT
    default_timeout_microseconds: Microseconds = 0
    allow_timeout_override: Flag = False
    max_queue_size: UInt32 = 0


class DynamicBatching(Section):
    """Batches are formed from requests that wait at the same time; sizes count rows.

    With ``priority_levels`` above 0, level 1 goes first and ``default_priority_level`` is for requests that name none;
    ``default_queue_policy`` holds for each level that has no entry in ``priority_queue_policy``.
    """

    preferred_batch_size: tuple[Int32, ...] = ()
    max_queue_delay_microseconds: Microseconds = 0
    preserve_ordering: Flag = False
    priority_levels: UInt64 = Field(default=0, le=1024)
    default_priority_level: UInt64 = 0
    default_queue_policy: QueuePolicy | None = None
    priority_queue_policy: Mapping[UInt64, QueuePolicy] = {}

    @model_validator(mode="after")
    def _check(self) -> DynamicBatching:
        raise_problems(self._find_problems())
        return self

    def _find_problems(self) -> Iterator[Problem]:
        for index, size in enumerate(self.preferred_batch_size):
            if size < 1:
                yield Problem(("preferred_batch_size", index), f"found {size}; a batch size must be at least 1")
        levels, default = self.priority_levels, self.default_priority_level
        if levels and not 1 <= default <= levels:
            yield Problem(
                ("default_priority_level",),
                f"found {default}; with priority_levels {levels} it must be between 1 and {levels}",
            )
        if not levels and default:
            yield Problem(("default_priority_level",), f"found {default}; it needs priority_levels above 0")
        if self.preserve_ordering and levels > 1:
            text = f"found true with {levels} priority_levels; requests that overtake each other keep no order"
            yield Problem(("preserve_ordering",), text)
        policies = (self.default_queue_policy, *self.priority_queue_policy.values())
        if self.preserve_ordering and any(each and each.timeout_action is TimeoutAction.DELAY for each in policies):
            yield Problem(("preserve_ordering",), "found true with timeout_action DELAY; what is delayed is overtaken")
        for level in self.priority_queue_policy:
            if not 1 <= level <= levels:
                yield Problem(("priority_queue_policy", level), f"found level {level}; priority_levels is {levels}")


class EnsembleStep(Section):
    """One model in an ensemble and how its tensors are wired."""

    model_name: str = ""
    model_version: Int64 = -1
    input_map: Mapping[str, str] = {}
    output_map: Mapping[str, str] = {}
    model_namespace: str = ""


class EnsembleScheduling(Section):
    """A model made of other models."""

    step: tuple[EnsembleStep, ...] = ()
    max_inflight_requests: UInt32 = 0
