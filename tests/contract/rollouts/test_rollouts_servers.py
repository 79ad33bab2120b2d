"""Several servers, restarts in the middle, and a database that goes away."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from databases import PostgresServer, migrated_database
from rollout_site import TIMEOUT_S, Fleet, PuppetBackend, poll, requests, until

from aiorch_server.app import Application
from aiorch_server.deployments import service
from aiorch_server.deployments.rollout import Command
from aiorch_server.errors import RegistryUnavailable
from aiorch_server.registry.deployments import get_deployment
from aiorch_server.registry.leases import find_lease
from aiorch_server.registry.records import CanaryStep, Gates, RolloutPlan, RolloutState, Strategy
from aiorch_server.registry.servers import read_servers

S = RolloutState
LONG = RolloutPlan(Strategy.CANARY, (CanaryStep(30.0, 600.0),))


@pytest.fixture(params=["sqlite", "postgresql"])
async def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Fleet]:
    made = Fleet(tmp_path, migrated_database(request.param, tmp_path))
    yield made
    PuppetBackend.on_load = None
    await made.close()


def versions(*servers: Application) -> list[list[int]]:
    return [server.manager.versions("m") for server in servers]


def wanted_generation(server: Application) -> int:
    """The last change of the deployment that a server has taken up."""
    reconciler = None if server.deployments is None else server.deployments._reconciler
    wanted = None if reconciler is None else reconciler._models["m"].wanted
    return 0 if wanted is None else wanted.deployment.generation


async def test_two_servers_converge(fleet: Fleet) -> None:
    one, two = await fleet.start("one"), await fleet.start("two")
    await fleet.serve_first()
    assert versions(one, two) == [[1], [1]]
    async with requests(one, callers=2) as first, requests(two, callers=2) as second:
        version = await fleet.push()
        plan = RolloutPlan(Strategy.CANARY, (CanaryStep(50.0, 0.5),), Gates(max_error_rate=0.1, min_samples=40))
        rollout = await fleet.wait((await fleet.deploy(version, plan)).id)
        assert rollout.state is S.SUCCEEDED
        await first.wait_for(2, 10)
        await second.wait_for(2, 10)
    assert not first.errors and not second.errors
    assert versions(one, two) == [[2], [2]]
    assert rollout.reports[1].requests >= 40, "counted on both"
    assert sum(each.deployments is not None and each.deployments.is_driving for each in (one, two)) == 1
    late = await fleet.start("late")
    assert late.controlplane.is_ready()
    assert versions(late) == [[2]], "ready means that it serves what is deployed"


async def test_one_server_that_cannot_load_it_is_enough_to_fail(fleet: Fleet) -> None:
    one, two = await fleet.start("one"), await fleet.start("two")
    await fleet.serve_first()
    version = await fleet.push()

    def refuse(context: object) -> None:
        if "/two/" in str(getattr(context, "artefact", "")):
            raise RuntimeError("no room here")

    PuppetBackend.on_load = refuse
    rollout = await fleet.wait((await fleet.deploy(version)).id)
    assert rollout.state is S.FAILED
    assert f"on {two.deployments.server}: " in rollout.reason and "no room here" in rollout.reason  # type: ignore[union-attr]
    await until(lambda: versions(one, two) == [[1], [1]])


async def test_the_other_server_goes_on_driving(fleet: Fleet) -> None:
    one, two = await fleet.start("one"), await fleet.start("two")
    await fleet.serve_first()
    parts = {each: each.deployments for each in (one, two)}
    driver = next(each for each, part in parts.items() if part is not None and part.is_driving)
    other = two if driver is one else one
    rollout = await fleet.deploy(await fleet.push(), RolloutPlan(Strategy.CANARY, (CanaryStep(30.0, 1.0),)))
    await fleet.wait(rollout.id, S.RUNNING)
    before = await fleet.database.read(lambda session: find_lease(session, "rollouts"))
    await fleet.stop(driver)
    assert (await fleet.wait(rollout.id)).state is S.SUCCEEDED
    after = await fleet.database.read(lambda session: find_lease(session, "rollouts"))
    assert before and after and after.epoch > before.epoch
    assert versions(other) == [[2]]
    assert len(await fleet.database.read(read_servers)) == 1, "who stops says so, and is not waited for"


async def test_a_restart_in_the_middle(fleet: Fleet) -> None:
    """At the step where it was, with the time that is left of it."""
    one = await fleet.start("one")
    await fleet.serve_first()
    rollout = await fleet.deploy(await fleet.push(), LONG)
    running = await fleet.wait(rollout.id, S.RUNNING)
    await fleet.stop(one)
    again = await fleet.start("one")
    assert versions(again) == [[1, 2]]
    async with requests(again) as traffic:
        await traffic.wait_for(2, 5)
        await traffic.wait_for(1, 5)
        found = await fleet.read(rollout.id)
        assert (found.state, found.step_began_at) == (S.RUNNING, running.step_began_at)
        await fleet.direct(Command.PROMOTE)
        assert (await fleet.wait(rollout.id)).state is S.SUCCEEDED
        await traffic.wait_for(2, 10)
    assert not traffic.errors


@pytest.fixture
async def sqlite_fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    made = Fleet(tmp_path, migrated_database("sqlite", tmp_path))
    yield made
    PuppetBackend.on_load = None
    await made.close()


async def test_promoted_and_taken_back_while_it_loads(sqlite_fleet: Fleet) -> None:
    fleet = sqlite_fleet
    server = await fleet.start()
    await fleet.serve_first()
    loading, gate = threading.Event(), threading.Event()

    def hold(context: object) -> None:
        loading.set()
        assert gate.wait(TIMEOUT_S)

    PuppetBackend.on_load = hold
    async with requests(server) as traffic:
        rollout = await fleet.deploy(await fleet.push())
        await until(loading.is_set)
        await traffic.wait_for(1, 10)
        assert (await fleet.direct(Command.PROMOTE)).rollout
        await traffic.wait_for(1, 10)
        assert (await fleet.direct(Command.ROLLBACK)).rollout
        taken_back = (await fleet.database.read(lambda session: get_deployment(session, "m"))).generation
        await until(lambda: wanted_generation(server) >= taken_back)  # each server follows in its own time
        gate.set()
        assert (await fleet.wait(rollout.id)).state is S.ROLLED_BACK
        await until(lambda: versions(server) == [[1]])
        await traffic.wait_for(1, 10)
    assert not traffic.errors and set(traffic.answers) == {"1"}


async def test_undeploy_in_the_middle_of_a_rollout(sqlite_fleet: Fleet) -> None:
    fleet = sqlite_fleet
    server = await fleet.start()
    await fleet.serve_first()
    rollout = await fleet.deploy(await fleet.push(), LONG)
    await fleet.wait(rollout.id, S.RUNNING)
    await fleet.ask(service.undeploy, "m")
    assert (await fleet.read(rollout.id)).state is S.ABORTED
    await until(lambda: not server.manager.is_known("m"))


async def test_what_serves_and_dies_is_loaded_again(sqlite_fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiorch_server.deployments.deployed.FIRST_RETRY_S", 0.1)
    fleet = sqlite_fleet
    server = await fleet.start()
    await fleet.serve_first(dies_after=20)
    async with requests(server, callers=1) as traffic:
        await until(lambda: PuppetBackend.loads["m", 1] > 2)
        await traffic.wait_for(1, 5)
    assert server.controlplane.is_ready()


async def test_the_database_goes_away_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "aiorch_server.deployments")
    # a server that stops meanwhile cannot say so
    monkeypatch.setattr("aiorch_server.deployments.driver.SILENT_S", 1.5)
    monkeypatch.setattr("aiorch_server.deployments.driver.LEASE_S", 1.5)
    monkeypatch.setattr("aiorch_server.deployments.reconciler.HEARTBEAT_S", 0.2)
    database = PostgresServer()
    fleet = Fleet(tmp_path, database.create())
    try:
        server = await fleet.start("one")
        await fleet.serve_first()
        rollout = await fleet.deploy(await fleet.push(), LONG)
        await fleet.wait(rollout.id, S.RUNNING)
        await fleet.stop(server)
        server = await fleet.start("one")
        async with requests(server) as traffic:
            database.stop(signal.SIGKILL)
            with pytest.raises(RegistryUnavailable):
                await fleet.direct(Command.ABORT)
            await until(lambda: "what was deployed last goes on being served" in caplog.text)
            await traffic.wait_for(1, 20)
            await traffic.wait_for(2, 20)
            # a server that starts meanwhile serves what was deployed when it was here last
            await fleet.stop(server)
            await traffic.stop()
        server = await fleet.start("one")
        assert "serving what was deployed when the registry was last seen" in caplog.text
        assert server.controlplane.is_ready() and versions(server) == [[1, 2]]
        stranger = await fleet.start("stranger")
        assert not stranger.controlplane.is_ready(), "it does not know yet what it should serve"
        async with requests(server) as traffic:
            await traffic.wait_for(2, 5)
            database.start()  # on the thread that stays: the server ends with it

            async def promote() -> bool:
                try:
                    return bool(await fleet.direct(Command.PROMOTE))
                except RegistryUnavailable:
                    return False

            await poll(promote)
            assert (await fleet.wait(rollout.id)).state is S.SUCCEEDED
            await until(stranger.controlplane.is_ready)
            assert versions(server, stranger) == [[2], [2]]
        assert not traffic.errors
        assert "the registry is back" in caplog.text
    finally:
        await fleet.close()
        database.close()


async def test_a_server_that_is_silent_is_not_waited_for(sqlite_fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed where it stood: nobody says that it is gone."""
    monkeypatch.setattr("aiorch_server.deployments.driver.SILENT_S", 1.5)
    monkeypatch.setattr("aiorch_server.deployments.reconciler.HEARTBEAT_S", 0.2)
    fleet = sqlite_fleet
    await fleet.start("one")
    await fleet.serve_first()
    code = (
        "import asyncio, json, sys; from aiorch_server.app import Application; "
        "from aiorch_server.config.server import ServerConfig\n"
        "async def run():\n"
        "    async with Application(ServerConfig.model_validate(json.loads(sys.argv[1]))):\n"
        "        print('ready', flush=True); await asyncio.sleep(600)\n"
        "asyncio.run(run())"
    )
    config = fleet.config("killed").model_dump(mode="json")
    config["registry"]["url"] = fleet.url
    config["execution"]["backends"] = []
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, json.dumps(config), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        assert await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S) == b"ready\n"
    finally:
        process.kill()
        await process.wait()
    rollout = await fleet.wait((await fleet.deploy(await fleet.push())).id)
    assert rollout.state is S.SUCCEEDED
    assert "not waited for, because not heard of: " in rollout.reason
