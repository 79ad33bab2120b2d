"""Making way in a running scheduler: each request is answered once, whoever cancels, expires or closes meanwhile."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from functools import partial

import pytest
from hand_driven import make_spec, message, values_of

from aiorch_server._core import Batch, Mailbox, Scheduler
from aiorch_server.errors import AnswerTooLate, CapacityError, QueueFull

MS = 1_000_000
TIMEOUT_S = 20
MADE_WAY = r"made way in the queue for a tenant that has less in it; try again in \d+\.\d{3} s"


def serve_one(scheduler: Scheduler, batch: Batch) -> int:
    assert scheduler.take(batch)
    members = batch.members
    batch.settle({"Y": batch.gather()["X"] * 2})
    return members


async def test_the_newest_of_the_heaviest_makes_way_once(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(), max_queue_size=3)
    flood = [mailbox.submit(scheduler, message(each, id=f"a{each}"), tenant=1) for each in range(3)]
    with pytest.raises(QueueFull):
        mailbox.submit(scheduler, message(9), tenant=1)
    other = mailbox.submit(scheduler, message(7), tenant=2)
    with pytest.raises(CapacityError, match=r"^\[request id: a2\] " + MADE_WAY) as caught:
        await asyncio.wait_for(flood[2], TIMEOUT_S)
    assert caught.value.retry_after_ns == 10**9
    with pytest.raises(QueueFull):
        mailbox.submit(scheduler, message(8), tenant=2)
    assert serve_one(scheduler, Batch(scheduler)) == 3
    assert [values_of(await each) for each in (*flood[:2], other)] == [[0.0], [2.0], [14.0]]
    seen = scheduler.observe()
    assert (seen.arrivals, seen.answered, seen.refused_full, seen.waiting, seen.running) == (6, 3, 3, 0, 0)
    assert scheduler.counters().failures["REJECTED"] == 3 and scheduler.in_flight == 0


async def test_weights_hold(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(), max_queue_size=8)
    flood = [mailbox.submit(scheduler, message(each), tenant=1) for each in range(8)]
    others = []
    with pytest.raises(QueueFull):
        while True:
            others.append(mailbox.submit(scheduler, message(7), tenant=2, weight=3.0))
    assert len(others) == 6, "three of four"
    await asyncio.sleep(0)
    serve_one(scheduler, Batch(scheduler))
    found = await asyncio.wait_for(asyncio.gather(*flood, *others, return_exceptions=True), TIMEOUT_S)
    assert [isinstance(each, CapacityError) for each in found] == [False] * 2 + [True] * 6 + [False] * 6


async def test_a_level_that_is_full_is_for_its_own(mailbox: Mailbox) -> None:
    levels = [(2, 0, False, False), (2, 0, False, False)]
    scheduler = Scheduler(make_spec(), priority_levels=2, default_priority_level=2, level_policies=levels)
    urgent = [mailbox.submit(scheduler, message(each), tenant=1, priority=1) for each in range(2)]
    usual = [mailbox.submit(scheduler, message(each), tenant=1, priority=2) for each in range(2)]
    first = mailbox.submit(scheduler, message(5), tenant=2, priority=1)
    second = mailbox.submit(scheduler, message(6), tenant=2, priority=2)
    assert scheduler.pending == 4
    serve_one(scheduler, Batch(scheduler))
    found = await asyncio.wait_for(asyncio.gather(*urgent, *usual, return_exceptions=True), TIMEOUT_S)
    assert [isinstance(each, CapacityError) for each in found] == [False, True, False, True]
    assert values_of(await first) == [10.0] and values_of(await second) == [12.0]


async def test_bytes_are_a_bound_as_well(mailbox: Mailbox) -> None:
    large, small = message(*range(8), width=500), message(1, width=500)
    scheduler = Scheduler(make_spec(), max_queue_bytes=3 * len(large))
    flood = [mailbox.submit(scheduler, large, tenant=1) for _ in range(2)]
    flood += [mailbox.submit(scheduler, small, tenant=1) for _ in range(5)]
    with pytest.raises(QueueFull):
        mailbox.submit(scheduler, large, tenant=2)  # the newest is too small to make room, and would go in vain
    assert scheduler.pending == 7 and not any(each.done() for each in flood)
    scheduler.abandon(14, "over")
    await asyncio.gather(*flood, return_exceptions=True)


async def test_who_would_be_late_comes_in_for_who_has_more(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(1))
    scheduler.set_policy(target_us=9_990_000, is_shedding=True, instances=1, curve=[(1, 2_000 * MS)])
    flood = [mailbox.submit(scheduler, message(each), tenant=1) for each in range(4)]
    with pytest.raises(AnswerTooLate):
        mailbox.submit(scheduler, message(9), tenant=1)
    with pytest.raises(AnswerTooLate):
        mailbox.submit(scheduler, message(9))
    other = mailbox.submit(scheduler, message(7), tenant=2)
    with pytest.raises(CapacityError, match=MADE_WAY) as caught:
        await asyncio.wait_for(flood[3], TIMEOUT_S)
    assert 3 * 10**9 < caught.value.retry_after_ns <= 4 * 10**9, "half of what four runs take"
    batch = Batch(scheduler)
    scheduler.set_policy(is_shedding=False)
    for _ in range(4):
        serve_one(scheduler, batch)
    assert values_of(await other) == [14.0]
    await asyncio.gather(*flood[:3])
    seen = scheduler.observe()
    assert (seen.answered, seen.refused_late, seen.dropped_late, seen.arrivals) == (4, 2, 1, 7)


async def test_who_makes_way_leaves_in_the_order_of_arrival(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(1), max_queue_size=3, preserve_ordering=True)
    left: list[str] = []
    answers = {}

    def note(name: str, done: asyncio.Future[memoryview]) -> None:
        left.append(f"{name} {done.exception() is None}")

    for name, tenant in (("a1", 1), ("a2", 1), ("a3", 1), ("b1", 2), ("b2", 2)):
        try:
            answers[name] = mailbox.submit(scheduler, message(1), tenant=tenant)
        except QueueFull:
            left.append(f"{name} refused")
            continue
        answers[name].add_done_callback(partial(note, name))
    await asyncio.sleep(0.01)
    assert left == ["b2 refused"], "the third made way, and waits for the answers before its own"
    batch = Batch(scheduler)
    for _ in range(3):
        serve_one(scheduler, batch)
    await asyncio.wait_for(asyncio.gather(*answers.values(), return_exceptions=True), TIMEOUT_S)
    await asyncio.sleep(0)
    assert left == ["b2 refused", "a1 True", "a2 True", "a3 False", "b1 True"]
    assert scheduler.in_flight == 0


async def test_what_is_dropped_late_leaves_in_the_order_of_arrival(mailbox: Mailbox) -> None:
    """Early drops before they cost a run, between answers that are open and answers that come."""
    scheduler = Scheduler(make_spec(1), preserve_ordering=True)
    scheduler.set_policy(target_us=30_000, instances=1, curve=[(1, MS)])
    left: list[tuple[int, bool]] = []
    batch = Batch(scheduler)

    def submit(number: int) -> asyncio.Future[memoryview]:
        answer = mailbox.submit(scheduler, message(number))
        answer.add_done_callback(lambda done: left.append((number, done.exception() is None)))
        return answer

    answers = [submit(0)]
    assert scheduler.take(batch)
    answers += [submit(each) for each in range(1, 4)]
    await asyncio.sleep(0.035)
    answers.append(submit(4))
    scheduler.set_policy(is_shedding=True)
    second = Batch(scheduler)
    serve_one(scheduler, second)  # drops three, and answers the last; the first still runs
    await asyncio.sleep(0.01)
    assert not left
    batch.settle({"Y": batch.gather()["X"] * 2})
    await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), TIMEOUT_S)
    await asyncio.sleep(0)
    assert left == [(0, True), (1, False), (2, False), (3, False), (4, True)]
    assert scheduler.observe().dropped_late == 3 and scheduler.in_flight == 0


@pytest.mark.parametrize("keeps_order", [False, True])
@pytest.mark.parametrize("end", ["close", "abandon"])
async def test_a_storm_of_tenants_leaves_nobody_without_an_answer(keeps_order: bool, end: str) -> None:
    """Three threads with loops and mailboxes of their own submit and cancel, instances serve, policies change."""
    scheduler = Scheduler(make_spec(), max_queue_size=24, preserve_ordering=keeps_order)
    scheduler.set_policy(target_us=20_000, is_shedding=True, instances=2, curve=[(1, MS // 5), (8, MS)])
    is_over = threading.Event()
    ends: list[dict[str, int]] = []
    wrong: list[str] = []

    def serve() -> None:
        batch = Batch(scheduler)
        while scheduler.take(batch):
            time.sleep(0.0003)
            batch.settle({"Y": batch.gather()["X"] * 2})

    async def ask(seed: int) -> None:
        chance = random.Random(seed)
        box = Mailbox(asyncio.get_running_loop())
        count = dict.fromkeys(("refused", "answered", "failed", "cancelled"), 0)
        open_: list[tuple[float, asyncio.Future[memoryview]]] = []
        for number in range(900):
            value = float(1000 * seed + number)
            tenant = chance.choice([0, 1, 1, 1, 1, 1, 2, 3, 4 + chance.randrange(2000)])
            deadline_ns = chance.choice([0, 0, 0, 1, 2**62, time.monotonic_ns() + chance.randrange(30 * MS)])
            try:
                values = [value] * chance.choice([1, 1, 2, 8])
                weight = chance.choice([0.0, 1.0, 1.0, 3.0, 1e300])
                answer = box.submit(scheduler, message(*values), tenant=tenant, weight=weight, deadline_ns=deadline_ns)
                open_.append((value, answer))
            except (QueueFull, AnswerTooLate):
                count["refused"] += 1
            if chance.random() < 0.15 and open_:
                chance.choice(open_)[1].cancel()
            if number % 300 == 299:
                for _, answer in open_[-20:]:
                    answer.cancel()
            if number % 10 == 0:
                await asyncio.sleep(0.0005)
        found = await asyncio.wait_for(asyncio.gather(*(each for _, each in open_), return_exceptions=True), TIMEOUT_S)
        for (value, _), each in zip(open_, found, strict=True):
            if isinstance(each, asyncio.CancelledError):
                count["cancelled"] += 1
            elif isinstance(each, CapacityError):
                count["failed"] += 1
            elif isinstance(each, BaseException) or set(values_of(each)) != {2 * value}:
                wrong.append(repr(each))
            else:
                count["answered"] += 1
        assert sum(count.values()) == 900
        ends.append(count)
        box.close()

    def disturb() -> None:
        chance = random.Random(5)
        while not is_over.is_set():
            scheduler.set_policy(max_rows=chance.randint(1, 8), is_shedding=chance.random() < 0.7)
            time.sleep(0.001)

    instances = [threading.Thread(target=serve) for _ in range(2)] + [threading.Thread(target=disturb)]
    for thread in instances:
        thread.start()
    await asyncio.gather(*(asyncio.to_thread(asyncio.run, ask(seed)) for seed in range(3)))
    is_over.set()
    mailbox = Mailbox(asyncio.get_running_loop())
    last = []
    for number in range(20):
        try:
            last.append(mailbox.submit(scheduler, message(number), tenant=number % 3))
        except (QueueFull, AnswerTooLate):
            ends.append({"refused": 1})
    scheduler.abandon(14, "over") if end == "abandon" else scheduler.close()
    for thread in instances:
        thread.join(TIMEOUT_S)
    await asyncio.wait_for(asyncio.gather(*last, return_exceptions=True), TIMEOUT_S)
    assert not wrong
    seen = scheduler.observe()
    done = seen.answered + seen.failed + seen.refused_full + seen.refused_late + seen.dropped_late
    assert (seen.arrivals, done, seen.waiting, seen.running) == (2720, 2720, 0, 0)
    assert scheduler.wait_idle(TIMEOUT_S)
    assert sum(each.get("answered", 0) for each in ends) > 100
    mailbox.close()
