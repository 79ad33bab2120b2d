"""What should run, as one server sees it: deployments with their rollouts and the files of their versions."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from aiorch_server.errors import NotFoundError
from aiorch_server.registry.deployments import read_deployments
from aiorch_server.registry.records import (
    ArtefactFile,
    Deployment,
    Manifest,
    Rollout,
    TrafficTarget,
)
from aiorch_server.registry.rollouts import read_open_rollouts
from aiorch_server.registry.session import Session
from aiorch_server.registry.versions import get_version

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A deployment, the rollout of it that is under way, and the manifests of its versions."""

    deployment: Deployment
    rollout: Rollout | None = None
    manifests: Mapping[int, Manifest] = field(default_factory=dict)

    @property
    def mark(self) -> tuple[object, ...]:
        """What is to be done again where it is another one."""
        began = None if self.rollout is None else (self.rollout.id, self.rollout.step, self.rollout.step_began_at)
        return self.deployment.generation, began


def read_wanted(session: Session, known: Mapping[str, Mapping[int, Manifest]]) -> dict[str, Wanted]:
    """All deployments by model. ``known`` manifests, which never change, are not read again."""
    open_rollouts = {rollout.model: rollout for rollout in read_open_rollouts(session)}
    found = {}
    for deployment in read_deployments(session):
        here = known.get(deployment.model, {})
        manifests = {}
        for version in deployment.loaded:
            with contextlib.suppress(NotFoundError):  # the reconciler tells that it is not there
                manifests[version] = here.get(version) or get_version(session, deployment.model, version).manifest
        found[deployment.model] = Wanted(deployment, open_rollouts.get(deployment.model), manifests)
    return found


def write_last_known(path: Path, wanted: Collection[Wanted]) -> None:
    """Keeps what is wanted for a start without the database; whoever reads it finds all of it, or the former."""
    document = {
        "format": 1,
        "deployments": [
            {
                **asdict(each.deployment),
                "updated_at": each.deployment.updated_at.isoformat(),
                "manifests": {str(version): asdict(manifest) for version, manifest in each.manifests.items()},
            }
            for each in wanted
        ],
    }
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_last_known(path: Path) -> dict[str, Wanted] | None:
    """What ``write_last_known`` kept; None if there is nothing that can be read. Blocks."""
    try:
        document = json.loads(path.read_text())
        if document["format"] != 1:
            return None
        return {each.deployment.model: each for each in map(_read_wanted, document["deployments"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be used: %s", path, error)
        return None


def _read_wanted(document: dict[str, Any]) -> Wanted:
    manifests = {
        int(version): Manifest(each["digest"], tuple(ArtefactFile(**file) for file in each["files"]))
        for version, each in document.pop("manifests").items()
    }
    parts = {
        "updated_at": datetime.fromisoformat(document["updated_at"]),
        "loaded": tuple(document["loaded"]),
        "traffic": tuple(TrafficTarget(**each) for each in document["traffic"]),
        # nobody drives a rollout meanwhile, and nothing is measured for it
        "shadow": 0,
        "sampled": 0,
    }
    return Wanted(Deployment(**{**document, **parts}), None, manifests)
