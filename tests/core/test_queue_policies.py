"""Priority levels with policies of their own against a plain model, and answers in the order of arrival."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
from hand_driven import HandDriven, make_spec, message, values_of
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorch_server._core import Batch, Mailbox, Scheduler
from aiorch_server.errors import CapacityError, DeadlineExpired, ModelExecutionError, QueueFull, ServerStopping

Policy = tuple[int, int, bool, bool]


async def reach(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


@dataclass
class Waiting:
    number: int
    level: int
    is_limited: bool
    future: asyncio.Future[memoryview]
    is_delayed: bool = False


def run_next(scheduler: Scheduler, batch: Batch) -> None:
    assert scheduler.take(batch)
    batch.settle({"Y": batch.gather()["X"] * 2})


def may_be_swept(waiting: Waiting, policies: list[Policy]) -> bool:
    return waiting.is_limited and not policies[waiting.level - 1][3]


@settings(max_examples=60, deadline=None)
@given(
    policies=st.lists(st.tuples(st.integers(0, 3), st.just(0), st.booleans(), st.booleans()), min_size=1, max_size=3),
    steps=st.lists(st.one_of(st.none(), st.tuples(st.integers(1, 3), st.booleans()), st.integers(0, 9)), max_size=40),
)
async def test_levels_are_as_their_policies_say(
    policies: list[Policy], steps: list[tuple[int, bool] | int | None]
) -> None:
    """None takes one, a pair submits to that level with a time of 1 us or none, a number cancels one that waits."""
    mailbox = Mailbox(asyncio.get_running_loop())
    scheduler = Scheduler(
        make_spec(1), priority_levels=len(policies), default_priority_level=1, level_policies=policies
    )
    batch = Batch(scheduler)
    waiting: list[Waiting] = []
    number = 0
    for step in steps:
        if isinstance(step, tuple):
            level, is_limited = min(step[0], len(policies)), step[1]
            bound, _, may_override, _ = policies[level - 1]
            # what is overdue may have been refused already, or not yet
            most = sum(each.level == level for each in waiting)
            least = sum(each.level == level and not may_be_swept(each, policies) for each in waiting)
            number += 1
            try:
                future = mailbox.submit(scheduler, message(number), priority=level, timeout_us=int(is_limited))
            except QueueFull:
                assert 0 < bound <= most
                continue
            assert bound == 0 or least < bound
            waiting.append(Waiting(number, level, is_limited and may_override, future))
        elif isinstance(step, int):
            if waiting:
                waiting.pop(step % len(waiting)).future.cancel()
                await asyncio.sleep(0)
        else:
            until = time.monotonic_ns() + 2000
            while time.monotonic_ns() < until:
                pass
            expired = [each for each in waiting if each.is_limited and not each.is_delayed]
            refused = [each for each in expired if not policies[each.level - 1][3]]
            for each in expired:
                each.is_delayed = True
            waiting = [each for each in waiting if each not in refused]
            if not waiting:
                if refused:
                    scheduler.close()
                    assert not scheduler.take(batch)
                for each in refused:
                    with pytest.raises(CapacityError, match="Request timeout expired"):
                        await asyncio.wait_for(each.future, 20)
                if refused:
                    break
                continue
            first = min(waiting, key=lambda each: (each.level, each.is_delayed, each.number))
            waiting.remove(first)
            run_next(scheduler, batch)
            assert values_of(await asyncio.wait_for(first.future, 20)) == [2.0 * first.number]
            for each in refused:
                with pytest.raises(CapacityError, match="Request timeout expired"):
                    await asyncio.wait_for(each.future, 20)
        assert sum(not may_be_swept(each, policies) for each in waiting) <= scheduler.pending <= len(waiting)
    scheduler.abandon(14, "over")
    for each in waiting:
        with pytest.raises(CapacityError, match=r"over|Request timeout expired"):
            await asyncio.wait_for(each.future, 20)
    assert scheduler.in_flight == 0
    mailbox.close()


async def test_delayed_without_levels(mailbox: Mailbox) -> None:
    """The time of the policy; who is delayed runs after whoever is not, and in the end."""
    scheduler = Scheduler(make_spec(1), default_timeout_us=1000, delay_expired=True)
    old = mailbox.submit(scheduler, message(1))
    time.sleep(0.002)
    new = mailbox.submit(scheduler, message(2))
    batch = Batch(scheduler)
    run_next(scheduler, batch)
    assert values_of(await asyncio.wait_for(new, 20)) == [4.0]
    assert not old.done()
    run_next(scheduler, batch)
    assert values_of(await asyncio.wait_for(old, 20)) == [2.0]
    assert scheduler.counters().fail.count == 0


async def test_a_delayed_request_still_has_its_deadline_and_can_be_cancelled(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(8), default_timeout_us=1, delay_expired=True, max_queue_delay_us=10**9)
    instance = HandDriven(scheduler)
    deadline_ns = time.monotonic_ns() + 50_000_000
    late = mailbox.submit(scheduler, message(1), deadline_ns=deadline_ns)
    given_up = mailbox.submit(scheduler, message(2, width=5))
    await asyncio.sleep(0.01)
    given_up.cancel()
    instance.go(3)
    with pytest.raises(DeadlineExpired):
        await asyncio.wait_for(late, 20)
    await reach(lambda: scheduler.in_flight == 0)
    assert scheduler.counters().failures["CANCELED"] == 1
    instance.stop()


async def test_the_wrong_policies_are_refused() -> None:
    for wrong in (
        {"level_policies": [(0, 0, False, False)]},
        {"priority_levels": 2, "default_priority_level": 1, "level_policies": [(0, 0, False, False)]},
        {"priority_levels": 1, "default_priority_level": 1, "level_policies": [(-1, 0, False, False)]},
        {"priority_levels": 1, "default_priority_level": 1, "level_policies": [(0, 2**62, False, False)]},
        {"preserve_ordering": True, "delay_expired": True},
        {"preserve_ordering": True, "priority_levels": 2, "default_priority_level": 1},
    ):
        with pytest.raises(ValueError):
            Scheduler(make_spec(), **wrong)  # type: ignore[arg-type]


# answers in the order of arrival


async def test_answers_wait_for_earlier_ones(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(1), preserve_ordering=True)
    futures = [mailbox.submit(scheduler, message(index)) for index in range(4)]
    batches = [Batch(scheduler) for _ in futures]
    for batch in batches:
        assert scheduler.take(batch)
    order: list[int] = []
    for index, future in enumerate(futures):
        future.add_done_callback(lambda _, index=index: order.append(index))  # type: ignore[misc]
    for index in (3, 1, 2):
        batches[index].settle({"Y": batches[index].gather()["X"] * 2})
    await asyncio.sleep(0.02)
    assert order == []
    assert scheduler.in_flight == 4
    batches[0].fail(13, "broken")
    await reach(lambda: len(order) == 4)
    assert order == [0, 1, 2, 3]
    with pytest.raises(ModelExecutionError, match="broken"):
        await futures[0]
    assert values_of(await futures[3]) == [6.0]
    await reach(lambda: scheduler.in_flight == 0)


async def test_who_is_cancelled_holds_up_nobody(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(1), preserve_ordering=True)
    first, queued, last = (mailbox.submit(scheduler, message(index, width=4 + index)) for index in range(3))
    batch, other = Batch(scheduler), Batch(scheduler)
    assert scheduler.take(batch)
    queued.cancel()
    await asyncio.sleep(0)
    assert scheduler.take(other)
    other.settle({"Y": other.gather()["X"] * 2})
    first.cancel()  # it runs already: its place is free when it has run
    await asyncio.sleep(0.01)
    assert not last.done()
    batch.settle({"Y": batch.gather()["X"] * 2})
    assert values_of(await asyncio.wait_for(last, 20)) == [4.0]
    await reach(lambda: scheduler.in_flight == 0)


async def test_a_queued_one_that_is_cancelled_lets_later_ones_out(mailbox: Mailbox) -> None:
    """Of two shapes, so that the later one runs first."""
    scheduler = Scheduler(make_spec(2), preserve_ordering=True, max_queue_delay_us=10**9)
    first = mailbox.submit(scheduler, message(1, width=5))
    later = mailbox.submit(scheduler, message(1, 2))
    batch = Batch(scheduler)
    assert scheduler.take(batch)
    batch.settle({"Y": batch.gather()["X"] * 2})
    await asyncio.sleep(0.01)
    assert not later.done()
    first.cancel()
    assert values_of(await asyncio.wait_for(later, 20)) == [2.0, 4.0]
    await reach(lambda: scheduler.in_flight == 0)


class OnRelease:
    """What Python keeps with a request; calls back when the request is freed."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback

    def __del__(self) -> None:
        self._callback()


async def test_who_settles_while_another_hands_over_neither_waits_nor_overtakes(mailbox: Mailbox) -> None:
    """Freeing the first request, whose mailbox is gone, runs Python in the middle of handing over the first two."""
    scheduler = Scheduler(make_spec(1), preserve_ordering=True)
    batches = [Batch(scheduler) for _ in range(3)]
    done: list[bool] = []

    def settle_the_third() -> None:
        thread = threading.Thread(target=lambda: batches[2].settle({"Y": batches[2].gather()["X"] * 2}))
        thread.start()
        thread.join(5)
        done.append(not thread.is_alive())

    gone = Mailbox(asyncio.get_running_loop())
    lost = gone.submit(scheduler, message(0), attachment=OnRelease(settle_the_third))
    order: list[int] = []
    futures = [mailbox.submit(scheduler, message(index)) for index in (1, 2)]
    for index, future in enumerate(futures, start=1):
        future.add_done_callback(lambda _, index=index: order.append(index))  # type: ignore[misc]
    for batch in batches:
        assert scheduler.take(batch)
    gone.close()
    assert isinstance(lost.exception(), ServerStopping)
    batches[1].settle({"Y": batches[1].gather()["X"] * 2})
    assert not done
    batches[0].settle({"Y": batches[0].gather()["X"] * 2})
    assert done == [True], "a thread that settled waited for the one that handed over"
    await reach(lambda: len(order) == 2)
    assert order == [1, 2]
    await reach(lambda: scheduler.in_flight == 0)


EVENTS = ("submit", "take", "settle", "fail", "cancel")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 9)), max_size=50))
async def test_every_order_of_events_keeps_the_order(steps: list[tuple[str, int]]) -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    scheduler = Scheduler(make_spec(1), preserve_ordering=True)
    futures: list[asyncio.Future[memoryview]] = []
    order: list[int] = []
    running: list[Batch] = []

    def note(index: int, future: asyncio.Future[memoryview]) -> None:
        if not future.cancelled():
            order.append(index)

    for what, which in steps:
        if what == "submit":
            futures.append(mailbox.submit(scheduler, message(len(futures))))
            futures[-1].add_done_callback(partial(note, len(futures) - 1))
        elif what == "take" and scheduler.pending:
            running.append(Batch(scheduler))
            assert scheduler.take(running[-1])
        elif what == "settle" and running:
            batch = running.pop(which % len(running))
            batch.settle({"Y": batch.gather()["X"] * 2})
        elif what == "fail" and running:
            running.pop(which % len(running)).fail(13, "broken")
        elif what == "cancel" and futures:
            futures[which % len(futures)].cancel()
        await asyncio.sleep(0)
    scheduler.abandon(14, "over")
    for batch in running:
        batch.fail(13, "broken")
    found = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 20)
    for index, answer in enumerate(found):
        assert isinstance(answer, BaseException) or values_of(answer) == [2.0 * index]
    assert order == sorted(order)
    assert len(order) == sum(not future.cancelled() for future in futures)
    await reach(lambda: scheduler.in_flight == 0)
    mailbox.close()
