"""What the registry knows, as values; times are aware datetimes in UTC.

The shapes of proto/aiorch/admin/v1, which says what each field means.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class TensorSignature:
    """A tensor of a version's signature; ``shape`` as in the V2 protocol's metadata."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a version comes from; what its author says."""

    framework: str = ""
    framework_version: str = ""
    inputs: tuple[TensorSignature, ...] = ()
    outputs: tuple[TensorSignature, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    data_hash: str = ""
    git_commit: str = ""
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ArtefactFile:
    """One file of a version: its path with slashes, relative to the artefact, and its content's SHA-256 in hex."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of an artefact by path; ``digest`` is the SHA-256 of their canonical list."""

    digest: str
    files: tuple[ArtefactFile, ...]

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(each.size_bytes for each in self.files)


@dataclass(frozen=True, slots=True)
class Model:
    """A registered model; ``aliases`` maps names such as prod to versions."""

    name: str
    created_at: datetime
    created_by: str
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, int] = field(default_factory=dict)
    latest_version: int = 0
    etag: str = ""


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version, immutable but for the aliases that point to it."""

    model: str
    version: int
    manifest: Manifest
    provenance: Provenance
    created_at: datetime
    created_by: str
    has_code: bool = False
    aliases: tuple[str, ...] = ()


class Strategy(enum.StrEnum):
    """How one version takes the place of another."""

    REPLACE = "replace"
    BLUE_GREEN = "blue-green"
    CANARY = "canary"
    SHADOW = "shadow"
    AB = "ab"


class RolloutState(enum.StrEnum):
    """Where a rollout stands; the last four are ends."""

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
        return self in (RolloutState.SUCCEEDED, RolloutState.ROLLED_BACK, RolloutState.ABORTED, RolloutState.FAILED)


@dataclass(frozen=True, slots=True)
class CanaryStep:
    """The candidate's share of the requests, and how long it must keep to the gates with it."""

    percent: float
    bake_s: float


@dataclass(frozen=True, slots=True)
class Gates:
    """What a candidate has to keep to; None: that gate is not used."""

    max_error_rate: float | None = None
    max_p99_ratio: float | None = None
    min_agreement: float | None = None
    agreement_atol: float = 0.0
    agreement_rtol: float = 0.0
    min_samples: int = 200
    max_wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """A strategy and its numbers; see deployments.proto."""

    strategy: Strategy = Strategy.REPLACE
    steps: tuple[CanaryStep, ...] = ()
    gates: Gates = Gates()
    bake_s: float = 0.0
    sample_percent: float = 10.0
    candidate_percent: float = 50.0
    is_rollback_manual: bool = False


@dataclass(frozen=True, slots=True)
class VersionReport:
    """What was measured of one version in the present step, on all servers together."""

    version: int
    requests: int = 0
    errors: int = 0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    compared: int = 0
    agreed: int = 0


@dataclass(frozen=True, slots=True)
class Rollout:
    """One way from a version to another; ``from_version`` 0: there was none."""

    id: str
    model: str
    from_version: int
    to_version: int
    plan: RolloutPlan
    state: RolloutState
    began_at: datetime
    began_by: str
    reason: str = ""
    step: int = 0
    step_began_at: datetime | None = None
    ended_at: datetime | None = None
    reports: tuple[VersionReport, ...] = ()
    disagreements: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrafficTarget:
    """A version's share of the requests that name no version, in hundredths of a percent."""

    version: int
    share: int
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What should run of a model, on every server.

    ``loaded`` are the versions that shall be ready, ``traffic`` adds up to 10,000. ``sampled`` is the share (in
    hundredths of a percent) of requests that the control plane carries, to compare with ``shadow`` (a version, or 0)
    or to record. ``is_sticky``: the shares are of the requests' keys. ``generation`` counts the changes.
    """

    model: str
    generation: int
    version: int
    updated_at: datetime
    updated_by: str
    loaded: tuple[int, ...] = ()
    traffic: tuple[TrafficTarget, ...] = ()
    is_sticky: bool = False
    shadow: int = 0
    sampled: int = 0
    instances: int = 0
    previous_version: int = 0
    is_on_demand: bool = False
    rollout: str = ""


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """A version on one server: ``state`` as in the repository index."""

    version: int
    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What one server made of a deployment, and what it measured in the present step of a rollout.

    ``samples`` is opaque here: what deployments.samples wrote, for deployments.samples to merge.
    """

    server: str
    model: str
    observed_generation: int
    versions: tuple[VersionStatus, ...]
    seen_at: datetime
    samples: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; ``number`` grows, with gaps."""

    number: int
    time: datetime
    kind: str
    actor: str
    text: str
    model: str = ""
    version: int = 0
    rollout: str = ""


@dataclass(frozen=True)
class Page(Generic[Item]):
    """Some of a list; ``token`` asks for what follows, "" where nothing does.

    ``token_after`` gives the token for what follows the first so many items, for whoever takes only these.
    """

    items: tuple[Item, ...]
    token: str = ""
    token_after: Callable[[int], str] = field(default=lambda count: "", repr=False, compare=False)
