"""Requests out of a batch: settled once, by any thread, in any order; dropped ones fail."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import threading

import numpy as np
import pytest
from hand_driven import make_spec, message, values_of

from aiorch_server._core import Batch, Mailbox, Member, Scheduler, count_run, detach
from aiorch_server.errors import AiorchError, ModelExecutionError, UnsupportedRequest
from aiorch_server.types import NumpyArray

TIMEOUT_S = 20


class Notice:
    """Stands for what Python keeps with a request."""

    alive = 0

    def __init__(self) -> None:
        Notice.alive += 1

    def __del__(self) -> None:
        Notice.alive -= 1


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")
    ] + [("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


def allocated_bytes() -> int:
    """What malloc has given out and not got back, of its heap or mapped."""
    describe = ctypes.CDLL(None).mallinfo2
    describe.restype = MallocInfo
    info = describe()
    return int(info.uordblks + info.hblkhd)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(make_spec(), preferred_batch_sizes=[3], max_queue_delay_us=1_000_000)


async def take(scheduler: Scheduler, mailbox: Mailbox, n: int = 3) -> tuple[list[asyncio.Future[memoryview]], Batch]:
    futures = [mailbox.submit(scheduler, message(index), attachment=Notice()) for index in range(n)]
    batch = Batch(scheduler)
    assert await asyncio.to_thread(scheduler.take, batch)
    return futures, batch


def double(member: Member) -> None:
    member.settle({"Y": member.gather()["X"] * 2})


async def test_members_are_answered_in_any_order_by_any_thread(scheduler: Scheduler, mailbox: Mailbox) -> None:
    futures, batch = await take(scheduler, mailbox)
    members = detach(batch)
    assert [isinstance(member.attachment, Notice) for member in members] == [True] * 3
    assert detach(batch) == [] and scheduler.in_flight == 3
    for member in reversed(members):
        thread = threading.Thread(target=double, args=(member,))
        thread.start()
        await asyncio.to_thread(thread.join)
    count_run(batch, 3, 10, 20)
    answers = await asyncio.wait_for(asyncio.gather(*futures), TIMEOUT_S)
    assert [values_of(answer) for answer in answers] == [[0.0], [2.0], [4.0]]
    counters = scheduler.counters()
    assert (counters.rows, counters.executions, counters.success.count, counters.in_flight) == (3, 1, 3, 0)
    assert [(each.batch_size, each.compute_infer.ns) for each in counters.batch_sizes] == [(3, 20)]
    del members, member, futures, answers
    gc.collect()
    assert Notice.alive == 0


async def test_a_member_is_settled_once(scheduler: Scheduler, mailbox: Mailbox) -> None:
    futures, batch = await take(scheduler, mailbox)
    first, second, third = detach(batch)
    double(first)
    for again in (lambda: double(first), lambda: first.fail(3, "x"), first.finish):
        with pytest.raises(RuntimeError, match="settled already"):
            again()
    with pytest.raises(ModelExecutionError):
        second.settle({"Y": np.zeros((1, 1), np.complex64)})
    assert not second.is_settled  # a refused answer settles nothing
    second.fail(12, "not like this")
    third.finish()
    results = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), TIMEOUT_S)
    assert values_of(results[0]) == [0.0]
    assert isinstance(results[1], UnsupportedRequest) and str(results[1]) == "not like this"
    assert isinstance(results[2], memoryview)


def race(
    number: int, start: threading.Barrier, given: list[tuple[Member, dict[str, NumpyArray]]], wins: list[int]
) -> None:
    """Answers or fails every member, as far as nobody was sooner."""
    start.wait(TIMEOUT_S)
    for member, inputs in given:
        try:
            if number % 2:
                member.fail(13, f"by {number}")
            else:
                member.settle({"Y": inputs["X"]})
            wins.append(number)
        except RuntimeError:
            assert member.is_settled


async def test_many_threads_settle_one_member(scheduler: Scheduler, mailbox: Mailbox) -> None:
    for _ in range(50):
        futures, batch = await take(scheduler, mailbox)
        given = [(member, member.gather()) for member in detach(batch)]
        wins: list[int] = []
        start = threading.Barrier(4)
        threads = [threading.Thread(target=race, args=(number, start, given, wins)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert len(wins) == 3
        await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), TIMEOUT_S)


async def test_dropped_and_cancelled_members(scheduler: Scheduler, mailbox: Mailbox) -> None:
    futures, batch = await take(scheduler, mailbox)
    first, second, third = detach(batch)
    futures[1].cancel()
    await asyncio.sleep(0)
    assert (first.is_cancelled, second.is_cancelled) == (False, True)
    kept = third.gather()
    del first, third
    for dropped in (futures[0], futures[2]):
        with pytest.raises(AiorchError, match="left this request unanswered"):
            await asyncio.wait_for(dropped, TIMEOUT_S)
    double(second)
    assert second.is_cancelled and second.is_settled
    assert await asyncio.to_thread(scheduler.wait_idle, TIMEOUT_S)
    assert scheduler.counters().failures == {"REJECTED": 0, "CANCELED": 1, "BACKEND": 2, "OTHER": 0}
    assert [array.ravel().tolist() for array in kept.values()] == [[2.0] * 4]  # inputs outlive their request


async def test_a_member_is_as_small_as_one_request(mailbox: Mailbox) -> None:
    """However many the batch may hold that it came from."""
    n, largest = 50, 1_000_000
    scheduler = Scheduler(make_spec(largest), preferred_batch_sizes=[n], max_queue_delay_us=1_000_000)
    futures, batch = await take(scheduler, mailbox, n)
    before = allocated_bytes()
    members = detach(batch)
    assert len(members) == n
    assert allocated_bytes() - before < largest
    for member in members:
        double(member)
    await asyncio.wait_for(asyncio.gather(*futures), TIMEOUT_S)
