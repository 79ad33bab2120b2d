"""What models say of themselves reaches people, whatever it is: no text keeps a server or a rollout from going on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from databases import KINDS, migrated_database
from rollout_site import Fleet, PuppetBackend

from aiorch_server.deployments.rollout import Observation, advance
from aiorch_server.deployments.sampler import Sampler
from aiorch_server.registry.records import Rollout, RolloutPlan, RolloutState
from aiorch_server.registry.servers import read_servers

S = RolloutState
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(params=KINDS)
async def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Fleet]:
    made = Fleet(tmp_path, migrated_database(request.param, tmp_path))
    PuppetBackend.loads.clear()
    yield made
    await made.close()


async def test_reasons_that_no_database_holds(fleet: Fleet) -> None:
    await fleet.start()
    await fleet.serve_first()
    for reason in ("no \0 legs", "no \ud800 legs", "no legs " + "x" * 5_000_000):
        rollout = await fleet.wait((await fleet.deploy(await fleet.push(refuses=reason))).id)
        assert rollout.state is S.FAILED
        assert "does not serve on " in rollout.reason and "no " in rollout.reason
        assert len(rollout.reason) < 10_000
        assert rollout.reason in (await fleet.events())[-1].text
    before = await fleet.database.read(read_servers)
    assert before, "the server goes on telling that it is there"


def test_differences_that_no_database_holds() -> None:
    sampler = Sampler()
    sampler.begin("a step", {2: cast(Any, Idle())})
    sampler.note(2, "request '\ud800\0': a difference")
    (told,) = sampler.read({}).disagreements
    assert told == "request '\\ud800\\0': a difference"


class Idle:
    """A servable that has answered nothing."""

    signature = SimpleNamespace(is_decoupled=False)
    scheduler = SimpleNamespace(counters=lambda: SimpleNamespace(failures={}), durations=dict, in_flight=0)


def test_reasons_of_many_servers_are_not_all_told() -> None:
    failures = {f"server-{number}": "x" * 2000 for number in range(1000)}
    loading = Rollout("r", "m", 1, 2, RolloutPlan(), S.LOADING, NOW, "ada")
    move = advance(loading, Observation(n_servers=1000, failures=failures), NOW)
    assert move.rollout.state is S.FAILED and move.rollout.reason.endswith("; and on 997 more")
