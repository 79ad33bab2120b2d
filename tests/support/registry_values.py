"""Values of the registry, and rows that many tests begin with."""

from __future__ import annotations

import hashlib
import uuid
from datetime import UTC, datetime

from aiorch_server.registry import versions
from aiorch_server.registry.database import Database
from aiorch_server.registry.records import (
    ArtefactFile,
    Deployment,
    Manifest,
    ModelVersion,
    Provenance,
    Rollout,
    RolloutPlan,
    RolloutState,
    TrafficTarget,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def make_manifest(n_files: int = 1) -> Manifest:
    """A manifest; the same number gives the same."""
    files = [ArtefactFile(f"{n}/m.onnx", n, hashlib.sha256(f"{n}".encode()).hexdigest()) for n in range(n_files)]
    return Manifest(hashlib.sha256(f"{n_files} files".encode()).hexdigest(), tuple(files))


def add_version(database: Database, model: str, manifest: Manifest | None = None) -> ModelVersion:
    """A further version, of a new model too."""
    made = manifest or make_manifest()
    return database.run_blocking(
        lambda session: versions.add_version(session, model, made, Provenance(), actor="al", create_model=True)
    )


def make_deployment(model: str, version: int) -> Deployment:
    """All traffic to one version."""
    return Deployment(model, 0, version, NOW, "", loaded=(version,), traffic=(TrafficTarget(version, 10_000),))


def make_rollout(model: str, to_version: int = 2, plan: RolloutPlan | None = None) -> Rollout:
    """One that begins."""
    return Rollout(
        id=str(uuid.uuid4()),
        model=model,
        from_version=1,
        to_version=to_version,
        plan=plan or RolloutPlan(),
        state=RolloutState.PENDING,
        began_at=NOW,
        began_by="al",
    )
