"""Models that do not fit together and are always in use take turns; what takes long is never cut off for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from pathlib import Path

import pytest
from demand_site import MIB, BallastBackend, DemandSite, configure, running, write_model

from aiorch_server.lifecycle import turns

SERVED_S = 2.5
TURN_S = 0.3


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SHORTEST_TURN_S", TURN_S)


async def keep_busy(site: DemandSite, model: str, add: float, until: float) -> list[float]:
    """Eight callers, so that there is always a request under way; how long each request took."""
    taken: list[float] = []

    async def call(value: float) -> None:
        while time.monotonic() < until:
            began = time.monotonic()
            assert await site.infer(model, value) == value + add
            taken.append(time.monotonic() - began)

    await asyncio.gather(*(call(float(value)) for value in range(8)))
    return taken


async def test_models_in_steady_use_take_turns_and_lose_no_request(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    for add, name in enumerate(names):
        write_model(tmp_path, name, mib=60, add=add, delay_ms=20)
    config = configure(tmp_path, budget_mib=100, lifecycle={"residence_secs": TURN_S, "room_timeout_secs": 10})
    async with running(config) as site:
        until = time.monotonic() + SERVED_S
        taken = await asyncio.gather(*(keep_busy(site, name, add, until) for add, name in enumerate(names)))
        assert all(len(each) > 8 for each in taken), [len(each) for each in taken]
        # a turn of each of the others, their loads and pauses, and some air
        assert max(map(max, taken)) < 2 * TURN_S + 1.5
        swaps = sum(BallastBackend.loads.values())
        assert len(names) <= swaps <= (SERVED_S + 2) / TURN_S, BallastBackend.loads
        assert sum(sum(charge.values()) for _, _, charge in site.manager.residents.ledger.list_charges()) <= 100 * MIB


async def test_one_that_is_used_now_and_then_goes_before_one_that_is_always_used(tmp_path: Path) -> None:
    for name in ("busy", "calm", "late"):
        write_model(tmp_path, name, mib=40, add=1, delay_ms=20)
    async with running(configure(tmp_path, budget_mib=100, lifecycle={"room_timeout_secs": 10})) as site:
        await site.infer("calm")
        load = asyncio.create_task(keep_busy(site, "busy", 1, time.monotonic() + 1.5))
        await site.until(lambda: "busy" in site.ready())
        await asyncio.sleep(2 * TURN_S)
        assert await site.infer("late") == 2.0
        await load
        assert BallastBackend.loads == Counter(busy=1, calm=1, late=1)


async def test_a_long_request_is_not_cut_off_and_the_others_go_on(tmp_path: Path) -> None:
    write_model(tmp_path, "a", mib=60, add=1)
    write_model(tmp_path, "b", mib=60, add=2)
    async with running(configure(tmp_path, budget_mib=100, lifecycle={"room_timeout_secs": 2.5})) as site:
        await site.infer("a")
        with site.manager.acquire("a"):
            refusal = asyncio.create_task(site.refuse("b"))
            taken = await keep_busy(site, "a", 1, time.monotonic() + 2.0)
            assert max(taken) < 1.0  # paused, but not for long
            _, text = await refusal
            assert "'a:1' 60 MiB" in text
            assert BallastBackend.loads == Counter(a=1)
        await site.until(lambda: site.manager.is_ready("b"))
        assert await site.infer("b") == 3.0


async def test_a_model_that_dies_while_it_is_paused_makes_room(tmp_path: Path) -> None:
    write_model(tmp_path, "a", mib=60, add=1)
    write_model(tmp_path, "b", mib=60, add=2)
    async with running(configure(tmp_path, budget_mib=100, lifecycle={"room_timeout_secs": 10})) as site:
        await site.infer("a")
        servable = site.manager.find("a")
        lease = site.manager.acquire("a")
        other = asyncio.create_task(site.infer("b"))
        await site.until(lambda: not site.ready())
        servable.abandon("it died")
        lease.release()
        assert await other == 3.0
        assert site.ready() == ["b"]


async def test_a_stop_in_the_middle_of_a_turn_ends(tmp_path: Path) -> None:
    write_model(tmp_path, "a", mib=60, add=1)
    write_model(tmp_path, "b", mib=60, add=2)
    async with running(configure(tmp_path, budget_mib=100, lifecycle={"room_timeout_secs": 10})) as site:
        await site.infer("a")
        lease = site.manager.acquire("a")
        other = asyncio.create_task(site.refuse("b"))
        await site.until(lambda: not site.ready())
        stop = asyncio.create_task(site.application.stop(0.3))
        await asyncio.wait_for(other, 5)
        lease.release()
        await asyncio.wait_for(stop, 5)


async def test_who_waits_for_room_waits_for_a_turn_that_lasts_longer_than_its_patience(tmp_path: Path) -> None:
    write_model(tmp_path, "a", mib=60, add=1, delay_ms=20)
    write_model(tmp_path, "b", mib=60, add=2)
    async with running(configure(tmp_path, budget_mib=100, lifecycle={"room_timeout_secs": 0.2})) as site:
        await site.infer("a")
        site.manager.find("a").load_seconds = 1.5
        load = asyncio.create_task(keep_busy(site, "a", 1, time.monotonic() + 2.5))
        await asyncio.sleep(0.1)
        assert await site.infer("b") == 3.0
        await load


async def test_who_waits_for_a_model_that_died_while_it_was_paused_gets_it_from_its_load(tmp_path: Path) -> None:
    write_model(tmp_path, "a", mib=60, add=1)
    write_model(tmp_path, "b", mib=60, add=2)
    async with running(configure(tmp_path, budget_mib=100, lifecycle={"room_timeout_secs": 10})) as site:
        await site.infer("a")
        servable = site.manager.find("a")
        lease = site.manager.acquire("a")
        other = asyncio.create_task(site.infer("b"))
        await site.until(lambda: not site.ready())
        waiting = [asyncio.create_task(site.infer("a")) for _ in range(3)]
        await site.until(lambda: site.manager._models["a"].waiters == 3)
        servable.abandon("it died")
        assert await other == 3.0
        lease.release()
        assert await asyncio.gather(*waiting) == [2.0] * 3
        assert BallastBackend.loads == Counter(a=2, b=1)


@pytest.mark.parametrize("state", ["changing", "waited for", "not on demand"])
async def test_nobodys_turn_ends_who_is_changed_waited_for_or_not_on_demand_any_more(
    tmp_path: Path, state: str
) -> None:
    """That may have come about since it was chosen, while the turn of another one ended."""
    write_model(tmp_path, "a", mib=1, add=1)
    async with running(configure(tmp_path)) as site, contextlib.AsyncExitStack() as stack:
        await site.infer("a")
        model = site.manager._models["a"]
        if state == "changing":
            await stack.enter_async_context(model.changing())
        elif state == "waited for":
            model.waiters += 1
        else:
            model.follow_demand(False, None)
        async with asyncio.timeout(5):
            assert not await turns.Turns(0).end(model, "for others")
        assert site.ready() == ["a"]
        assert await site.infer("a") == 2.0
