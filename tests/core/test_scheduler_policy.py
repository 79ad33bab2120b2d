"""Policies changed while requests wait, refusals of what would be too late, and counters that add up."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest
from hand_driven import HandDriven, make_spec, message, values_of
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorch_server._core import Batch, Mailbox, Scheduler
from aiorch_server.errors import AnswerTooLate, CapacityError, DeadlineExpired, QueueFull, ServerStopping
from aiorch_server.types import SchedulerObservation

MS = 1_000_000


def ended(seen: SchedulerObservation) -> int:
    return seen.answered + seen.failed + seen.refused_full + seen.refused_late + seen.dropped_late


def check_sum(scheduler: Scheduler) -> SchedulerObservation:
    seen = scheduler.observe()
    assert seen.arrivals == ended(seen) + seen.waiting + seen.running, seen
    return seen


def take_and_answer(scheduler: Scheduler, batch: Batch) -> int:
    assert scheduler.take(batch)
    members = batch.members
    batch.settle({"Y": batch.gather()["X"] * 2})
    return members


async def test_a_policy_is_read_as_it_was_set(scheduler: Scheduler) -> None:
    scheduler.set_policy(max_rows=3, delay_us=7, target_us=50, margin_us=2, is_deferring=True, is_shedding=True)
    scheduler.set_policy(instances=2, curve=[(1, 10), (8, 40)])
    now = scheduler.policy()
    assert (now.max_rows, now.delay_us, now.target_us, now.margin_us, now.instances) == (3, 7, 50, 2, 2)
    assert (now.is_deferring, now.is_shedding, now.curve) == (True, True, ((1, 10), (8, 40)))
    scheduler.set_policy(curve=(), is_shedding=False)
    assert (scheduler.policy().curve, scheduler.policy().is_shedding, scheduler.policy().max_rows) == ((), False, 3)
    for wrong in ({"max_rows": 9}, {"max_rows": 0}, {"delay_us": -1}, {"target_us": 2**70}, {"curve": [(1, 2, 3)]}):
        with pytest.raises(ValueError):
            scheduler.set_policy(is_shedding=True, **wrong)  # type: ignore[arg-type]
    assert not scheduler.policy().is_shedding


async def test_the_cap_moves_under_waiting_requests(scheduler: Scheduler, mailbox: Mailbox) -> None:
    batch = Batch(scheduler)
    large = mailbox.submit(scheduler, message(*range(8)))
    small = [mailbox.submit(scheduler, message(each)) for each in range(10)]
    scheduler.set_policy(max_rows=2)
    assert [take_and_answer(scheduler, batch) for _ in range(3)] == [1, 2, 2]
    scheduler.set_policy(max_rows=8)
    assert take_and_answer(scheduler, batch) == 6, "there is room for more members than when the batch was made"
    assert values_of(await large) == [2.0 * each for each in range(8)]
    assert [values_of(await each) for each in small] == [[2.0 * each] for each in range(10)]
    assert [run.rows for run in scheduler.observe().runs] == [2, 8]


async def test_a_shorter_delay_wakes_who_waits(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(), max_queue_delay_us=10**9)
    instance = HandDriven(scheduler)
    answer = mailbox.submit(scheduler, message(1))
    await asyncio.sleep(0.02)
    assert not instance.sizes
    scheduler.set_policy(delay_us=0)
    instance.go()
    assert values_of(await asyncio.wait_for(answer, 20)) == [2.0]
    instance.stop()


async def test_a_closed_scheduler_does_not_wait_again(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec())
    answer = mailbox.submit(scheduler, message(1))
    scheduler.close()
    scheduler.set_policy(delay_us=10**9)
    batch = Batch(scheduler)
    assert take_and_answer(scheduler, batch) == 1
    assert values_of(await answer) == [2.0]
    assert not scheduler.take(batch)


async def test_instances_retire_and_the_others_serve(scheduler: Scheduler, mailbox: Mailbox) -> None:
    left = threading.Semaphore(0)

    def serve() -> None:
        batch = Batch(scheduler)
        while scheduler.take(batch):
            batch.settle({"Y": batch.gather()["X"] * 2})
        left.release()

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    while scheduler.observe().instances < 4:
        await asyncio.sleep(0.001)
    for count in (3, 2, 1):
        answers = [mailbox.submit(scheduler, message(each)) for each in range(40)]
        scheduler.retire(1)
        assert await asyncio.to_thread(left.acquire, True, 20)
        assert [values_of(each) for each in await asyncio.gather(*answers)] == [[2.0 * each] for each in range(40)]
        while scheduler.observe().busy_instances:
            await asyncio.sleep(0.001)
        assert scheduler.observe().instances == count
    scheduler.close()
    scheduler.retire(5)
    for thread in threads:
        thread.join(20)
    for wrong in (-1, 10**6):
        with pytest.raises(ValueError):
            scheduler.retire(wrong)


async def test_who_is_asked_to_leave_a_closed_scheduler_serves_first(scheduler: Scheduler, mailbox: Mailbox) -> None:
    answer = mailbox.submit(scheduler, message(1))
    scheduler.retire(1)
    scheduler.close()
    assert take_and_answer(scheduler, Batch(scheduler)) == 1
    assert values_of(await answer) == [2.0]


# what would be too late


async def test_refused_at_the_door(scheduler: Scheduler, mailbox: Mailbox) -> None:
    scheduler.set_policy(max_rows=1, target_us=50_000, is_shedding=True, instances=1, curve=[(1, 20 * MS)])
    waiting = [mailbox.submit(scheduler, message(each)) for each in range(2)]
    with pytest.raises(AnswerTooLate) as caught:
        mailbox.submit(scheduler, message(7, id="seven"))
    text = str(caught.value)
    assert text.startswith("[request id: seven] cannot be answered in time: it would take 60.0 ms, and the model's")
    assert "objective is 50.0 ms; try again in 0.0" in text
    assert 9 * MS < caught.value.retry_after_ns <= 10 * MS
    waiting.append(mailbox.submit(scheduler, message(7), deadline_ns=time.monotonic_ns() + 25 * MS))
    with pytest.raises(AnswerTooLate, match=r"and the caller waits \d+\.\d ms"):
        mailbox.submit(scheduler, message(7), deadline_ns=time.monotonic_ns() + 30 * MS)
    seen = check_sum(scheduler)
    assert (seen.arrivals, seen.refused_late, seen.waiting, seen.waiting_rows) == (5, 2, 3, 3)
    assert scheduler.counters().failures["REJECTED"] == scheduler.counters().refused_late == 2
    scheduler.set_policy(is_shedding=False)
    batch = Batch(scheduler)
    for _ in waiting:
        take_and_answer(scheduler, batch)
    await asyncio.gather(*waiting)


async def test_dropped_before_it_costs(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(1))
    scheduler.set_policy(target_us=20_000, instances=1, curve=[(1, MS)])
    late = [mailbox.submit(scheduler, message(each)) for each in range(3)]
    await asyncio.sleep(0.025)
    fresh = mailbox.submit(scheduler, message(9))
    scheduler.set_policy(is_shedding=True)
    take_and_answer(scheduler, Batch(scheduler))
    assert values_of(await asyncio.wait_for(fresh, 20)) == [18.0]
    for each in late:
        with pytest.raises(CapacityError, match=r"cannot be answered in time: it would take 2\d") as caught:
            await asyncio.wait_for(each, 20)
        assert caught.value.retry_after_ns >= 6 * MS
        assert not isinstance(caught.value, AnswerTooLate), "it was queued: its quota is spent"
    seen = check_sum(scheduler)
    assert (seen.answered, seen.dropped_late, seen.in_time, seen.late) == (1, 3, 1, 0)


async def test_answered_in_time_though_the_instance_is_stuck(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(1), default_timeout_us=30_000)
    stuck = mailbox.submit(scheduler, message(0))
    batch = Batch(scheduler)
    assert scheduler.take(batch)
    with pytest.raises(CapacityError, match="Request timeout expired"):
        await asyncio.wait_for(mailbox.submit(scheduler, message(1)), 5)
    began = time.monotonic()
    deadline_ns = time.monotonic_ns() + 20 * MS
    with pytest.raises(DeadlineExpired):
        await asyncio.wait_for(mailbox.submit(scheduler, message(2), deadline_ns=deadline_ns), 5)
    assert 0.015 < time.monotonic() - began < 2
    batch.settle({"Y": batch.gather()["X"] * 2})
    assert values_of(await stuck) == [0.0]
    assert check_sum(scheduler).failed == 2


async def test_dropped_in_time_though_the_instance_is_stuck(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(1))
    scheduler.set_policy(target_us=50_000, is_shedding=True, instances=1, curve=[(1, MS)])
    stuck = mailbox.submit(scheduler, message(0))
    batch = Batch(scheduler)
    assert scheduler.take(batch)
    late = [mailbox.submit(scheduler, message(each)) for each in range(1, 4)]
    await asyncio.wait(late[:2], timeout=5)
    for each in late[:2]:
        with pytest.raises(CapacityError, match="cannot be answered in time"):
            await asyncio.wait_for(each, 0)
    assert scheduler.pending == 1, "were the curve wrong, nobody would find out if the last one were dropped, too"
    batch.settle({"Y": batch.gather()["X"] * 2})
    take_and_answer(scheduler, batch)
    assert [values_of(await each) for each in (stuck, late[2])] == [[0.0], [6.0]]
    assert check_sum(scheduler).dropped_late == 2


async def test_who_is_delayed_when_its_time_is_over_is_served_though_the_instance_was_stuck(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(1), default_timeout_us=20_000, delay_expired=True)
    batch = Batch(scheduler)
    answers = [mailbox.submit(scheduler, message(each)) for each in range(3)]
    await asyncio.sleep(0.1)
    fresh = mailbox.submit(scheduler, message(9))
    assert scheduler.take(batch)
    batch.settle({"Y": batch.gather()["X"] * 2})
    assert values_of(await asyncio.wait_for(fresh, 5)) == [18.0]
    for _ in answers:
        take_and_answer(scheduler, batch)
    assert [values_of(each) for each in await asyncio.gather(*answers)] == [[0.0], [2.0], [4.0]]


async def test_without_a_curve_nobody_is_too_late(scheduler: Scheduler, mailbox: Mailbox) -> None:
    scheduler.set_policy(target_us=1, is_shedding=True, instances=1)
    answers = [mailbox.submit(scheduler, message(each)) for each in range(20)]
    batch = Batch(scheduler)
    while scheduler.pending:
        take_and_answer(scheduler, batch)
    await asyncio.gather(*answers)
    assert check_sum(scheduler).late == 20


async def test_a_wrong_curve_is_found_out(scheduler: Scheduler, mailbox: Mailbox) -> None:
    """However slow the model is said to be, who finds it idle is served."""
    scheduler.set_policy(target_us=1000, is_shedding=True, instances=1, curve=[(1, 10**12)])
    batch = Batch(scheduler)
    for value in range(5):
        answer = mailbox.submit(scheduler, message(value))
        with pytest.raises(AnswerTooLate):
            mailbox.submit(scheduler, message(value))
        take_and_answer(scheduler, batch)
        assert values_of(await answer) == [2.0 * value]
        scheduler.retire(1)
        assert not scheduler.take(batch), "only now the instance is free again, as far as anybody knows"
    assert scheduler.observe().runs[0].executions == 5


async def test_a_run_that_takes_too_long_counts_as_long_again(scheduler: Scheduler, mailbox: Mailbox) -> None:
    scheduler.set_policy(target_us=100_000, is_shedding=True, instances=1, curve=[(1, MS)])
    stuck = mailbox.submit(scheduler, message(0))
    batch = Batch(scheduler)
    assert scheduler.take(batch)
    first = mailbox.submit(scheduler, message(1))
    await asyncio.sleep(0.12)
    with pytest.raises(AnswerTooLate):
        mailbox.submit(scheduler, message(2))
    batch.settle({"Y": batch.gather()["X"] * 2})
    take_and_answer(scheduler, batch)
    await asyncio.gather(stuck, first)
    assert check_sum(scheduler).late == 2


# counters


async def test_arrivals_are_told_with_their_times(scheduler: Scheduler, mailbox: Mailbox) -> None:
    answers = [mailbox.submit(scheduler, message(each)) for each in range(3)]
    await asyncio.sleep(0.05)
    answers.append(mailbox.submit(scheduler, message(1, 2)))
    seen = check_sum(scheduler)
    assert (seen.arrivals, seen.arrived_rows, seen.waiting_rows) == (4, 5, 5)
    assert 50 * MS <= seen.gaps_ns < 10**10
    assert seen.gap_squares >= (50.0 * MS) ** 2
    assert seen.slots >= 4 and seen.slot_squares >= 3
    take_and_answer(scheduler, Batch(scheduler))
    await asyncio.gather(*answers)
    assert sum(scheduler.observe().durations.values()) == 4


async def test_failed_runs_say_nothing_of_the_time(scheduler: Scheduler, mailbox: Mailbox) -> None:
    batch = Batch(scheduler)
    first = mailbox.submit(scheduler, message(1))
    assert scheduler.take(batch)
    batch.fail(13, "broken")
    second = [mailbox.submit(scheduler, message(each)) for each in (1, 2)]
    assert scheduler.take(batch)
    for index in (0, 1):
        batch.select(index)
        batch.settle({"Y": batch.gather()["X"] * 2})
    third = mailbox.submit(scheduler, message(1, 2, 3))
    take_and_answer(scheduler, batch)
    scheduler.close()
    assert not scheduler.take(batch)
    await asyncio.gather(first, *second, third, return_exceptions=True)
    seen = check_sum(scheduler)
    assert [(run.rows, run.executions) for run in seen.runs] == [(3, 1)]
    assert seen.runs[0].busy_squares == pytest.approx(seen.runs[0].busy_ns ** 2)
    assert (seen.answered, seen.failed) == (3, 1)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 8)),
        st.tuples(st.just("submit late"), st.integers(1, 8)),
        st.tuples(st.just("cancel"), st.integers(0, 50)),
        st.tuples(st.just("take"), st.just(0)),
        st.tuples(st.just("settle"), st.integers(0, 2)),
        st.tuples(st.just("shed"), st.integers(0, 3)),
        st.tuples(st.just("cap"), st.integers(1, 8)),
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(steps=steps, end=st.sampled_from(["close", "abandon", "mailbox"]))
async def test_the_counters_add_up_whatever_happens(steps: list[tuple[str, int]], end: str) -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    scheduler = Scheduler(make_spec(), max_queue_size=6, preserve_ordering=len(steps) % 2 == 0)
    batch, is_running = Batch(scheduler), False
    futures: list[asyncio.Future[memoryview]] = []
    refused = 0

    def settle(how: int) -> None:
        if how == 0:
            batch.fail(13, "broken")
        elif how == 1:
            batch.settle({"Y": batch.gather()["X"] * 2})
        else:
            for index in range(batch.members):
                batch.select(index)
                batch.settle({"Y": batch.gather()["X"] * 2})

    for step, number in steps:
        if step.startswith("submit"):
            deadline_ns = time.monotonic_ns() + number * MS // 4 if step == "submit late" else 0
            try:
                futures.append(mailbox.submit(scheduler, message(*range(number)), deadline_ns=deadline_ns))
            except (QueueFull, AnswerTooLate):
                refused += 1
        elif step == "cancel" and futures:
            futures[number % len(futures)].cancel()
            await asyncio.sleep(0)
        elif step == "take" and not is_running and scheduler.pending:
            scheduler.set_policy(delay_us=0)
            # a cancelled or expired queue may be empty by then: another makes sure that there is something to take
            try:
                futures.append(mailbox.submit(scheduler, message(1)))
            except (QueueFull, AnswerTooLate):
                refused += 1
                continue
            is_running = scheduler.take(batch)
        elif step == "settle" and is_running:
            settle(number)
            is_running = False
        elif step == "shed":
            scheduler.set_policy(is_shedding=number > 0, target_us=number * 500, curve=[(1, MS // 2), (8, 2 * MS)])
        elif step == "cap":
            scheduler.set_policy(max_rows=number)
        check_sum(scheduler)
    if is_running:
        settle(1)
    if end == "mailbox":
        mailbox.close()
    if end == "abandon":
        scheduler.abandon(14, "over")
    scheduler.close()
    with pytest.raises(ServerStopping):
        mailbox.submit(scheduler, message(1))
    while scheduler.take(batch):
        settle(1)
    await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 20)
    seen = check_sum(scheduler)
    assert (seen.waiting, seen.running, seen.busy_instances) == (0, 0, 0)
    assert seen.arrivals == len(futures) + refused
    assert scheduler.in_flight == 0
    if end != "mailbox":
        answered = sum(not each.cancelled() and each.exception() is None for each in futures)
        assert seen.answered >= answered, "those that were given up while they ran are answered too late"
    mailbox.close()


async def test_the_counters_add_up_among_threads(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(), max_queue_size=64)
    scheduler.set_policy(target_us=3000, is_shedding=True, curve=[(1, MS // 5), (8, MS)])
    is_over = threading.Event()

    def serve() -> None:
        batch = Batch(scheduler)
        while scheduler.take(batch):
            time.sleep(0.0002)
            batch.settle({"Y": batch.gather()["X"] * 2})

    def watch() -> None:
        while not is_over.is_set():
            check_sum(scheduler)
            scheduler.set_policy(max_rows=random.randint(1, 8), delay_us=random.choice([0, 200]))

    threads = [threading.Thread(target=serve) for _ in range(3)] + [threading.Thread(target=watch)]
    for thread in threads:
        thread.start()
    answers: list[asyncio.Future[memoryview]] = []
    refused = 0
    for number in range(1500):
        try:
            answers.append(mailbox.submit(scheduler, message(number)))
        except (QueueFull, AnswerTooLate):
            refused += 1
        if number % 25 == 0:
            await asyncio.sleep(0.001)
    done = await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), 20)
    is_over.set()
    scheduler.close()
    for thread in threads:
        thread.join(20)
    seen = check_sum(scheduler)
    assert seen.arrivals == 1500 and seen.refused_full + seen.refused_late == refused
    assert seen.answered == sum(not isinstance(each, BaseException) for each in done)
    assert seen.in_time + seen.late == seen.answered
    assert (seen.waiting, seen.running) == (0, 0)


async def test_run_times_are_kept_one_by_one_for_small_batches(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(100))
    batch = Batch(scheduler)
    for rows in (1, 1, 64, 65):
        answer = mailbox.submit(scheduler, message(*range(rows)))
        take_and_answer(scheduler, batch)
        await answer
    scheduler.close()
    assert not scheduler.take(batch)
    runs = {run.rows: run for run in scheduler.observe().runs}
    assert [sum(runs[rows].times.values()) for rows in (1, 64, 65)] == [2, 1, 0]
    (upper_ns,) = runs[64].times
    assert 7 / 8 * upper_ns <= runs[64].busy_ns < upper_ns
