"""What a deployment says of itself after shares by hand, rollouts that were ended, and what did not load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiorch_proto.admin.v1 import deployments_pb2 as pb
from databases import migrated_database

from aiorch_server.deployments import service
from aiorch_server.deployments.rollout import Command, Observation, advance
from aiorch_server.deployments.writing import write_move
from aiorch_server.frontends.admin.convert_deployments import encode_deployment
from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.database import Database
from aiorch_server.registry.deployments import get_deployment
from aiorch_server.registry.events import read_events
from aiorch_server.registry.manifests import make_manifest
from aiorch_server.registry.records import (
    ArtefactFile,
    Deployment,
    Provenance,
    Rollout,
    RolloutPlan,
    RolloutState,
    ServerStatus,
    Strategy,
    TrafficTarget,
    VersionStatus,
)
from aiorch_server.registry.rollouts import find_open_rollout
from aiorch_server.registry.versions import add_version

NOW = datetime(2026, 1, 1, tzinfo=UTC)
STATE = pb.DeploymentState.Name


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(migrated_database("sqlite", tmp_path))
    manifest = make_manifest([ArtefactFile("model.txt", 1, "0" * 64)])
    for _ in range(3):
        made.run_blocking(lambda s: add_version(s, "m", manifest, Provenance(), actor="ada", create_model=True))
    yield made
    made.close()


def ask(database: Database, operation: Any, *arguments: Any, **options: Any) -> service.Outcome:
    outcome: service.Outcome = database.run_blocking(lambda s: operation(s, "m", *arguments, actor="ada", **options))
    return outcome


def drive(database: Database, seen: Observation | None = None) -> Deployment:
    """The rollout that is under way, to its end."""

    def work(session: Any) -> Deployment:
        while (found := find_open_rollout(session, "m")) is not None:
            move = advance(found, seen or Observation(n_servers=1), read_clock(session))
            write_move(session, found, move, get_deployment(session, "m"), actor="driver", is_driver=True)
        return get_deployment(session, "m")

    return database.run_blocking(work)


def share(database: Database, first: int, second: int) -> None:
    ask(database, service.set_traffic, [TrafficTarget(1, first), TrafficTarget(2, second)])


@pytest.mark.parametrize("verb", [Command.ABORT, Command.ROLLBACK])
def test_what_goes_on_serving_is_the_deployed_version(database: Database, verb: Command) -> None:
    """Versions 1 and 2 share by hand; a rollout back to 1 is taken back: now 2 alone serves."""
    ask(database, service.deploy, version=1)
    assert drive(database).version == 1
    share(database, 5000, 5000)
    ask(database, service.deploy, version=1)
    ask(database, service.direct, verb)
    after = drive(database)
    assert (after.loaded, after.version, after.previous_version) == ((2,), 2, 1)
    again = ask(database, service.direct, Command.ROLLBACK)
    assert again.rollout is not None and (again.rollout.from_version, again.rollout.to_version) == (2, 1)


def test_a_rollout_out_of_shares_by_hand_is_gone_back_from(database: Database) -> None:
    ask(database, service.deploy, version=1)
    drive(database)
    share(database, 5000, 5000)
    ask(database, service.deploy, version=1)
    after = drive(database)
    assert (after.loaded, after.version) == ((1,), 1)
    again = ask(database, service.direct, Command.ROLLBACK)
    assert again.rollout is not None and again.rollout.to_version == 2, "it served before, with half of the requests"


def tell(*versions: VersionStatus, generation: int = 7) -> list[ServerStatus]:
    return [ServerStatus("one", "m", generation, versions, NOW)]


def test_a_deployment_of_which_nothing_is_left_is_not_ready() -> None:
    empty = Deployment("m", 7, 0, NOW, "ada")
    failed = Rollout("r", "m", 0, 1, RolloutPlan(), RolloutState.FAILED, NOW, "ada", "no legs")
    found = encode_deployment(empty, tell(), failed)
    assert (STATE(found.state), found.reason) == ("DEPLOYMENT_STATE_DEGRADED", "no version is deployed: no legs")
    assert STATE(encode_deployment(empty, tell()).state) == "DEPLOYMENT_STATE_DEGRADED"


def test_what_serves_but_not_as_it_is_wanted_is_told() -> None:
    wanted = Deployment("m", 7, 1, NOW, "ada", loaded=(1,), instances=2)
    ready = VersionStatus(1, "READY")
    assert STATE(encode_deployment(wanted, tell(ready)).state) == "DEPLOYMENT_STATE_READY"
    reason = "still serving what was loaded before; the new one failed: no room"
    found = encode_deployment(wanted, tell(replace(ready, reason=reason)))
    assert STATE(found.state) == "DEPLOYMENT_STATE_DEGRADED" and "no room" in found.reason
    late = encode_deployment(wanted, tell(replace(ready, reason=reason), generation=6))
    assert STATE(late.state) == "DEPLOYMENT_STATE_PROGRESSING", "it may be of what was wanted before"


def test_a_deployment_names_who_asked_and_not_who_drove(database: Database) -> None:
    ask(database, service.deploy, version=1)
    drive(database)
    ask(database, service.deploy, version=2)
    promoted = drive(database)
    assert (promoted.version, promoted.updated_by) == (2, "ada")
    ask(database, service.deploy, version=3, plan=RolloutPlan(Strategy.CANARY))
    database.run_blocking(lambda s: service.direct(s, "m", Command.PROMOTE, actor="bob"))
    promoted = drive(database)
    assert (promoted.version, promoted.updated_by) == (3, "bob"), "who asked last"
    texts = database.run_blocking(read_events)
    assert {event.actor for event in texts} == {"ada", "bob", "driver"}, "events tell who did it"
