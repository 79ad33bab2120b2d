"""Rollouts that begin where shares were set by hand: what is called the deployed version, and what they go back to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from databases import migrated_database

from aiorch_server.deployments import service
from aiorch_server.deployments.rollout import Command
from aiorch_server.registry.database import Database
from aiorch_server.registry.manifests import make_manifest
from aiorch_server.registry.records import ArtefactFile, Provenance, RolloutState, TrafficTarget
from aiorch_server.registry.versions import add_version


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """Three versions of a model; 1 has 60 % of the requests, 2 has the others."""
    database = Database(migrated_database("sqlite", tmp_path))

    def prepare(session: Any) -> None:
        for number in range(3):
            manifest = make_manifest([ArtefactFile("model.onnx", 1, f"{number:064x}")])
            add_version(session, "m", manifest, Provenance(), actor="ada", create_model=True)
        service.deploy(session, "m", version=1, actor="ada")
        service.direct(session, "m", Command.ABORT, actor="ada")
        service.set_traffic(session, "m", [TrafficTarget(1, 6000), TrafficTarget(2, 4000)], actor="ada")

    database.run_blocking(prepare)
    yield database
    database.close()


def test_what_an_aborted_rollout_leaves_is_the_deployed_version(database: Database) -> None:
    def work(session: Any) -> Any:
        service.deploy(session, "m", version=1, actor="ada")
        service.direct(session, "m", Command.ABORT, actor="ada")
        return service.deploy(session, "m", version=2, actor="ada")

    outcome = database.run_blocking(work)
    assert outcome.deployment.version == 2 and outcome.deployment.loaded == (2,)
    assert not outcome.has_changed, outcome.text
    assert outcome.rollout.state is RolloutState.ABORTED


def test_a_rollout_goes_from_what_serves_whatever_was_deployed_before(database: Database) -> None:
    def work(session: Any) -> Any:
        service.deploy(session, "m", version=1, actor="ada")
        service.direct(session, "m", Command.ABORT, actor="ada")
        outcome = service.deploy(session, "m", version=3, actor="ada")
        return outcome.rollout, service.direct(session, "m", Command.ROLLBACK, actor="ada").deployment

    rollout, deployment = database.run_blocking(work)
    assert (rollout.from_version, rollout.to_version) == (2, 3)
    assert deployment.loaded == (2,) and deployment.version == 2
