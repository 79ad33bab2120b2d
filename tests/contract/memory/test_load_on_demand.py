"""Models that the first request loads: failures, bounds and cancellation first."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

import grpc
import pytest
from demand_site import BallastBackend, DemandSite, configure, running, write_ensemble, write_model

from aiorch_server.lifecycle import demand
from aiorch_server.types import ModelState


def hold(model: str) -> threading.Event:
    """From now on loads of the model wait for this."""
    return BallastBackend.gates.setdefault(model, threading.Event())


def waiters(site: DemandSite, model: str) -> int:
    return site.manager._models[model].waiters


async def test_a_failing_load_answers_all_who_wait_and_is_not_tried_again_in_a_storm(tmp_path: Path) -> None:
    write_model(tmp_path, "m", fail="the file is broken")
    async with running(configure(tmp_path)) as site:
        gate = hold("m")
        calls = [asyncio.create_task(site.refuse("m")) for _ in range(20)]
        await site.until(lambda: waiters(site, "m") == 20)
        gate.set()
        for code, text in await asyncio.gather(*calls):
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "the file is broken" in text
            assert "tried again in" in text
        for _ in range(20):
            code, text = await site.refuse("m")
            assert "the file is broken" in text
        assert BallastBackend.loads["m"] == 1
        assert not site.manager.is_ready("m")
        assert site.application.controlplane.is_ready()  # the server is: nobody may need this model
        assert "the file is broken" in site.reason("m")


async def test_after_the_pause_a_request_tries_again_and_finds_what_was_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "FIRST_PAUSE_S", 0.05)
    write_model(tmp_path, "m", fail="the file is broken")
    async with running(configure(tmp_path)) as site:
        await site.refuse("m")
        (tmp_path / "m" / "1" / "ballast.json").write_text(json.dumps({"add": 3}))
        await site.until(lambda: site.manager.is_ready("m"))
        assert await site.infer("m") == 4.0
        assert BallastBackend.loads["m"] == 2


async def test_waiting_ends_with_the_deadline_and_the_load_goes_on(tmp_path: Path) -> None:
    write_model(tmp_path, "m", add=1)
    async with running(configure(tmp_path)) as site:
        gate = hold("m")
        code, _ = await site.refuse("m", timeout=0.1)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        await site.until(lambda: waiters(site, "m") == 0)
        gate.set()
        assert await site.infer("m") == 2.0
        assert BallastBackend.loads["m"] == 1


async def test_waiting_ends_with_the_time_for_a_load(tmp_path: Path) -> None:
    write_model(tmp_path, "m")
    async with running(configure(tmp_path, lifecycle={"load_timeout_secs": 0.2})) as site:
        hold("m")
        code, text = await site.refuse("m")
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "0.2 s" in text


async def test_one_who_gives_up_harms_nobody_else(tmp_path: Path) -> None:
    write_model(tmp_path, "m", add=1)
    async with running(configure(tmp_path)) as site:
        gate = hold("m")
        calls = [asyncio.create_task(site.infer("m", value)) for value in range(10)]
        await site.until(lambda: waiters(site, "m") == 10)
        for call in calls[::2]:
            call.cancel()
        await site.until(lambda: waiters(site, "m") == 5)
        gate.set()
        assert await asyncio.gather(*calls[1::2]) == [value + 1.0 for value in range(1, 10, 2)]


async def test_no_more_wait_than_a_queue_holds(tmp_path: Path) -> None:
    write_model(tmp_path, "m", add=1)
    async with running(configure(tmp_path, limits={"max_queue_size": 3})) as site:
        gate = hold("m")
        calls = [asyncio.create_task(site.infer("m")) for _ in range(3)]
        await site.until(lambda: waiters(site, "m") == 3)
        code, text = await site.refuse("m")
        assert (code, text.endswith("Exceeds maximum queue size")) == (grpc.StatusCode.UNAVAILABLE, True)
        gate.set()
        assert await asyncio.gather(*calls) == [2.0] * 3


async def test_a_stop_answers_those_who_wait(tmp_path: Path) -> None:
    write_model(tmp_path, "m")
    async with running(configure(tmp_path)) as site:
        hold("m")
        call = asyncio.create_task(site.refuse("m"))
        await site.until(lambda: waiters(site, "m") == 1)
        await site.application.stop(0.2)
        code, _ = await asyncio.wait_for(call, 5)
        assert code is grpc.StatusCode.UNAVAILABLE


async def test_nothing_is_loaded_before_the_first_request_and_once_for_many(tmp_path: Path) -> None:
    write_model(tmp_path, "m", add=1)
    write_model(tmp_path, "always")
    async with running(configure(tmp_path, on_demand=("m*",))) as site:
        assert site.ready() == ["always"]
        (entry,) = (each for each in site.manager.index() if each.name == "m")
        assert (entry.state, entry.reason) == (ModelState.UNAVAILABLE, "on demand: the first request loads it")
        assert site.manager.is_ready("m")
        assert site.manager.is_ready("m", "1")
        assert not site.manager.is_ready("m", "2")
        assert site.application.controlplane.is_ready()
        assert await asyncio.gather(*(site.infer("m", value) for value in range(50))) == [v + 1.0 for v in range(50)]
        assert BallastBackend.loads == {"m": 1, "always": 1}
        assert site.ready() == ["always", "m"]
        assert await site.infer("m", version="1") == 2.0
        code, text = await site.refuse("m", version="7")
        assert code is grpc.StatusCode.NOT_FOUND, text


async def test_a_version_or_a_name_that_is_not_there_loads_nothing(tmp_path: Path) -> None:
    write_model(tmp_path, "m")
    async with running(configure(tmp_path)) as site:
        assert (await site.refuse("m", version="7"))[0] is grpc.StatusCode.NOT_FOUND
        code, text = await site.refuse("nobody")
        assert (code, "unknown model: 'nobody'" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        assert not BallastBackend.loads
        assert [entry.name for entry in site.manager.index()] == ["m"]


async def test_what_was_unloaded_on_purpose_stays_away_until_it_is_loaded_on_purpose(tmp_path: Path) -> None:
    write_model(tmp_path, "m", add=1)
    async with running(configure(tmp_path, lifecycle={"control_mode": "explicit"})) as site:
        assert await site.infer("m") == 2.0
        await site.manager.unload("m")
        code, _ = await site.refuse("m")
        assert code is grpc.StatusCode.NOT_FOUND
        assert not site.manager.is_ready("m")
        await site.manager.load("m")
        assert await site.infer("m") == 2.0


async def test_a_model_that_comes_or_goes_while_the_server_polls(tmp_path: Path) -> None:
    write_model(tmp_path, "old", add=1)
    async with running(configure(tmp_path, lifecycle={"control_mode": "poll", "poll_secs": 0.02})) as site:
        write_model(tmp_path, "new", add=2)
        await site.until(lambda: site.manager.is_ready("new"))
        assert site.ready() == []
        assert await site.infer("new") == 3.0
        (tmp_path / "old").rename(tmp_path.parent / f"{tmp_path.name}-away")
        await site.until(lambda: "old" not in [entry.name for entry in site.manager.index()])
        assert (await site.refuse("old"))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_ensemble_brings_its_steps(tmp_path: Path) -> None:
    write_model(tmp_path, "one", add=1)
    write_model(tmp_path, "ten", add=10)
    write_ensemble(tmp_path, "both", "one", "ten")
    async with running(configure(tmp_path)) as site:
        assert await asyncio.gather(*(site.infer("both", value) for value in range(5))) == [11.0 + v for v in range(5)]
        assert site.ready() == ["both", "one", "ten"]
        assert BallastBackend.loads == {"one": 1, "ten": 1}


async def test_the_first_answer_is_not_held_up_by_another_models_load(tmp_path: Path) -> None:
    write_model(tmp_path, "slow")
    write_model(tmp_path, "quick", add=1)
    async with running(configure(tmp_path)) as site:
        gate = hold("slow")
        call = asyncio.create_task(site.infer("slow"))
        await site.until(lambda: waiters(site, "slow") == 1)
        began = time.monotonic()
        assert await site.infer("quick") == 2.0
        assert time.monotonic() - began < 5
        gate.set()
        assert await call == 1.0
