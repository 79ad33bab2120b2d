"""Deployments, rollouts and events, as the admin client gives and takes them.

The shapes of proto/aiorch/admin/v1/deployments.proto, which says what each field means. Times are aware, in UTC.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime


class Strategy(enum.StrEnum):
    """How one version takes the place of another; unspecified: as a server that is newer than this client says."""

    UNSPECIFIED = "unspecified"
    REPLACE = "replace"
    BLUE_GREEN = "blue-green"
    CANARY = "canary"
    SHADOW = "shadow"
    AB = "ab"


class RolloutState(enum.StrEnum):
    """Where a rollout stands; the last four are ends."""

    UNSPECIFIED = "unspecified"
    PENDING = "pending"
    LOADING = "loading"
    RUNNING = "running"
    PAUSED = "paused"
    PROMOTING = "promoting"
    ROLLING_BACK = "rolling-back"
    SUCCEEDED = "succeeded"
    ROLLED_BACK = "rolled-back"
    ABORTED = "aborted"
    FAILED = "failed"

    @property
    def is_end(self) -> bool:
        """Whether nothing more will happen."""
        return self in _ENDS


_ENDS = (RolloutState.SUCCEEDED, RolloutState.ROLLED_BACK, RolloutState.ABORTED, RolloutState.FAILED)


class DeploymentState(enum.StrEnum):
    """What the servers made of a deployment."""

    UNSPECIFIED = "unspecified"
    PROGRESSING = "progressing"
    READY = "ready"
    DEGRADED = "degraded"


@dataclass(frozen=True, slots=True)
class CanaryStep:
    """The candidate's share of the requests, and how long it must keep to the gates with it."""

    percent: float
    bake_s: float


@dataclass(frozen=True, slots=True)
class Gates:
    """What a candidate has to keep to; None: that gate is not used. ``min_samples`` 0: the server's default."""

    max_error_rate: float | None = None
    max_p99_ratio: float | None = None
    min_agreement: float | None = None
    agreement_atol: float = 0.0
    agreement_rtol: float = 0.0
    min_samples: int = 0
    max_wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """A strategy and its numbers; 0, None and empty leave them to the server."""

    strategy: Strategy = Strategy.REPLACE
    steps: tuple[CanaryStep, ...] = ()
    gates: Gates = Gates()
    bake_s: float = 0.0
    sample_percent: float = 0.0
    candidate_percent: float = 0.0
    is_rollback_manual: bool = False


@dataclass(frozen=True, slots=True)
class VersionReport:
    """What was measured of one version in the present step, on all servers together."""

    version: int
    requests: int
    errors: int
    p50_ms: float
    p99_ms: float
    compared: int
    agreed: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One way from a version to another; ``from_version`` 0: there was none. ``step`` counts from 0."""

    id: str
    model: str
    from_version: int
    to_version: int
    plan: RolloutPlan
    state: RolloutState
    reason: str
    step: int
    step_began_at: datetime | None
    reports: tuple[VersionReport, ...]
    began_at: datetime | None
    ended_at: datetime | None
    began_by: str
    disagreements: tuple[str, ...]

    @property
    def is_undecided(self) -> bool:
        """Whether only a person makes it go on: it is paused, or compares without an end."""
        if self.state is not RolloutState.RUNNING:
            return self.state is RolloutState.PAUSED
        plan = self.plan
        return plan.strategy is Strategy.AB or (plan.strategy is Strategy.SHADOW and not plan.bake_s)

    def report(self, version: int) -> VersionReport | None:
        """What was measured of ``version``, None where nothing was."""
        return next((each for each in self.reports if each.version == version), None)


@dataclass(frozen=True, slots=True)
class TrafficTarget:
    """A version's share of the requests that name no version; ``tag`` is stable, candidate or empty."""

    version: int
    percent: float
    tag: str = ""


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """A version on one server: ``state`` as in the repository index."""

    version: int
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What one server made of a deployment."""

    server: str
    observed_generation: int
    versions: tuple[VersionStatus, ...]
    seen_at: datetime | None


@dataclass(frozen=True, slots=True)
class Deployment:
    """What should run of a model, and what the servers made of it; ``rollout`` is the one under way, or the last."""

    model: str
    generation: int
    version: int
    traffic: tuple[TrafficTarget, ...]
    instances: int
    state: DeploymentState
    reason: str
    servers: tuple[ServerStatus, ...]
    rollout: Rollout | None
    updated_at: datetime | None
    updated_by: str
    previous_version: int
    is_on_demand: bool


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; ``number`` grows, with gaps."""

    number: int
    time: datetime | None
    kind: str
    model: str
    version: int
    rollout: str
    actor: str
    text: str
