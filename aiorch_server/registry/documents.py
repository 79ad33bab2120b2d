"""Records as JSON, as they lie in document columns, and back. What is written here is read by later versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from aiorch_server.registry.records import (
    CanaryStep,
    Gates,
    Provenance,
    RolloutPlan,
    Strategy,
    TensorSignature,
    TrafficTarget,
    VersionReport,
    VersionStatus,
)

Json = dict[str, Any]


def write_record(record: Any) -> Json:
    """A record of records.py by its fields."""
    return asdict(record)


def read_provenance(document: Mapping[str, Any]) -> Provenance:
    """What ``write_record`` made of a Provenance."""
    tensors = {
        name: tuple(
            TensorSignature(each["name"], each["datatype"], tuple(each["shape"])) for each in document.get(name, ())
        )
        for name in ("inputs", "outputs")
    }
    return Provenance(**{**document, **tensors})


def read_plan(document: Mapping[str, Any]) -> RolloutPlan:
    """What ``write_record`` made of a RolloutPlan."""
    parts = {
        "strategy": Strategy(document["strategy"]),
        "steps": tuple(CanaryStep(**each) for each in document.get("steps", ())),
        "gates": Gates(**document.get("gates", {})),
    }
    return RolloutPlan(**{**document, **parts})


def read_traffic(document: list[Json]) -> tuple[TrafficTarget, ...]:
    """The targets of a deployment."""
    return tuple(TrafficTarget(**each) for each in document)


def read_reports(document: list[Json]) -> tuple[VersionReport, ...]:
    """The reports of a rollout."""
    return tuple(VersionReport(**each) for each in document)


def read_statuses(document: list[Json]) -> tuple[VersionStatus, ...]:
    """The versions of a server's status."""
    return tuple(VersionStatus(**each) for each in document)
