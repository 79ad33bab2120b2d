"""What a model should keep to, and why its knobs stand where they stand, as the admin client gives them.

The shapes of proto/aiorch/admin/v1/tuning.proto, which says what each field means. Times are aware, in UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Objective:
    """So many percent of a model's requests within ``latency_us``, and what that may take; 0: not said.

    ``error_budget`` is the part of the requests, 0 to 1, that may miss it.
    """

    model: str
    percentile: float = 0.0
    latency_us: int = 0
    error_budget: float = 0.0
    min_instances: int = 0
    max_instances: int = 0
    max_batch_size: int = 0
    priority: int = 0
    instance_cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """A knob that was moved, why, and what came of it."""

    time: datetime | None
    knob: str
    before: float
    after: float
    reason: str
    effect: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where a model's knobs stand, and the decisions that led there; ``objective`` None: it has none."""

    model: str
    objective: Objective | None
    knobs: Mapping[str, float]
    decisions: tuple[Decision, ...]


@dataclass(frozen=True, slots=True)
class RecordedTraffic:
    """Requests of a version as they came: ``times_ns`` since the recording began, ascending, and ``rows`` of each.

    ``lost``: how many more found no room in the server, because nobody read on.
    """

    version: int
    times_ns: Sequence[int] = ()
    rows: Sequence[int] = ()
    lost: int = 0
