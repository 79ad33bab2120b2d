"""Whatever happens to one member of a batch, its batch-mates get their own answers."""

from __future__ import annotations

import asyncio

import pytest
from hand_driven import HandDriven, make_spec, message, values_of

from aiorch_server._core import Batch, Mailbox, Scheduler
from aiorch_server.errors import AiorchError, Code, DeadlineExpired, ModelExecutionError, QueueTimeout, ServerStopping

N = 5


async def settle_all(futures: list[asyncio.Future[bytes]]) -> list[object]:
    return await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 20)


def check(results: list[object], lost: set[int], kind: type[BaseException]) -> None:
    for index, result in enumerate(results):
        if index in lost:
            assert isinstance(result, kind), f"member {index} got {result!r}"
        else:
            assert isinstance(result, memoryview), f"member {index} got {result!r}"
            assert values_of(result) == [2.0 * index]


@pytest.mark.parametrize("victim", range(N))
async def test_cancel_while_queued(scheduler: Scheduler, instance: HandDriven, mailbox: Mailbox, victim: int) -> None:
    blocker = mailbox.submit(scheduler, message(99))
    await instance.until_taken()
    futures = [mailbox.submit(scheduler, message(index)) for index in range(N)]
    assert scheduler.pending == N
    futures[victim].cancel()
    await asyncio.sleep(0)
    assert scheduler.pending == N - 1, "a cancelled request still takes a place"
    instance.go(2)
    check(await settle_all(futures), {victim}, asyncio.CancelledError)
    assert values_of(await blocker) == [198.0]
    assert instance.sizes == [1, N - 1]
    assert scheduler.counters().failures["CANCELED"] == 1


@pytest.mark.parametrize("victim", range(N))
async def test_cancel_while_running(scheduler: Scheduler, instance: HandDriven, mailbox: Mailbox, victim: int) -> None:
    blocker = mailbox.submit(scheduler, message(99))
    await instance.until_taken()
    futures = [mailbox.submit(scheduler, message(index)) for index in range(N)]
    instance.go()
    await blocker
    await instance.until_taken()
    futures[victim].cancel()
    await asyncio.sleep(0)
    instance.go()
    check(await settle_all(futures), {victim}, asyncio.CancelledError)
    assert await asyncio.to_thread(scheduler.wait_idle, 10)
    assert scheduler.counters().failures["CANCELED"] == 1


async def test_cancel_after_the_answer(scheduler: Scheduler, instance: HandDriven, mailbox: Mailbox) -> None:
    futures = [mailbox.submit(scheduler, message(index)) for index in range(N)]
    instance.go(N)
    # settled in the sink, but this loop has not looked yet
    assert scheduler.wait_idle(10)
    futures[2].cancel()
    check(await settle_all(futures), {2}, asyncio.CancelledError)


async def test_all_members_cancelled(scheduler: Scheduler, instance: HandDriven, mailbox: Mailbox) -> None:
    futures = [mailbox.submit(scheduler, message(1)) for _ in range(N)]
    await instance.until_taken()
    for future in futures:
        future.cancel()
    instance.go(N)
    assert await asyncio.to_thread(scheduler.wait_idle, 10)
    after = mailbox.submit(scheduler, message(7))
    instance.go()
    assert values_of(await asyncio.wait_for(after, 10)) == [14.0]


async def test_expired_member(scheduler: Scheduler, instance: HandDriven, mailbox: Mailbox) -> None:
    blocker = mailbox.submit(scheduler, message(99))
    await instance.until_taken()
    futures = [mailbox.submit(scheduler, message(index), deadline_ns=1 if index == 3 else 0) for index in range(N)]
    instance.go(2)
    check(await settle_all([*futures]), {3}, DeadlineExpired)
    await blocker


async def test_queue_policy_timeout(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(), default_timeout_us=1)
    future = mailbox.submit(scheduler, message(1, id="late"))
    instance = HandDriven(scheduler)
    with pytest.raises(AiorchError, match=r"^\[request id: late\] Request timeout expired$") as caught:
        await asyncio.wait_for(future, 10)
    assert caught.value.code is Code.UNAVAILABLE
    assert QueueTimeout.code is Code.UNAVAILABLE
    assert scheduler.counters().failures["REJECTED"] == 1
    instance.stop()


async def test_backend_failure_fails_each_member_once(
    scheduler: Scheduler, instance: HandDriven, mailbox: Mailbox
) -> None:
    instance.execute = lambda batch: batch.fail(Code.INTERNAL, "no luck")
    futures = [mailbox.submit(scheduler, message(index)) for index in range(N)]
    instance.go(N)
    results = await settle_all(futures)
    assert [str(result) for result in results] == ["no luck"] * N
    assert all(isinstance(result, ModelExecutionError) for result in results)
    assert scheduler.counters().failures["BACKEND"] == N


async def test_members_run_again_alone(scheduler: Scheduler, instance: HandDriven, mailbox: Mailbox) -> None:
    def isolate(batch: Batch) -> None:
        for index in range(batch.members):
            batch.select(index)
            inputs = batch.gather()
            if inputs["X"][0, 0] == 2:
                batch.fail(Code.INTERNAL, "poisoned")
            else:
                batch.settle({"Y": inputs["X"] * 2})
            batch.select(None)

    instance.execute = isolate
    blocker = mailbox.submit(scheduler, message(99))
    await instance.until_taken()
    futures = [mailbox.submit(scheduler, message(index)) for index in range(N)]
    instance.go(2)
    await blocker
    check(await settle_all(futures), {2}, ModelExecutionError)


async def test_an_executor_that_forgets(scheduler: Scheduler, instance: HandDriven, mailbox: Mailbox) -> None:
    instance.execute = lambda batch: None
    forgotten = mailbox.submit(scheduler, message(1))
    await instance.until_taken()
    instance.go()
    with pytest.raises(ModelExecutionError, match="left this request unanswered"):
        await asyncio.wait_for(forgotten, 10)
    instance.execute = HandDriven.echo
    after = mailbox.submit(scheduler, message(4))
    instance.go()
    assert values_of(await asyncio.wait_for(after, 10)) == [8.0]


async def test_abandon_fails_what_is_queued(scheduler: Scheduler, instance: HandDriven, mailbox: Mailbox) -> None:
    running = mailbox.submit(scheduler, message(5))
    await instance.until_taken()
    queued = [mailbox.submit(scheduler, message(index)) for index in range(N)]
    scheduler.abandon(Code.UNAVAILABLE, "gone")
    results = await settle_all(queued)
    assert [str(result) for result in results] == ["[request id: <id_unknown>] gone"] * N
    instance.go()
    assert values_of(await asyncio.wait_for(running, 10)) == [10.0]
    with pytest.raises(ServerStopping):
        mailbox.submit(scheduler, message(1))


async def test_a_scheduler_that_is_dropped_leaves_nobody_waiting(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec())
    futures = [mailbox.submit(scheduler, message(index)) for index in range(N)]
    del scheduler
    results = await settle_all(futures)
    assert all(isinstance(result, AiorchError) and result.code is Code.UNAVAILABLE for result in results)


async def test_a_batch_that_is_dropped_leaves_nobody_waiting(scheduler: Scheduler, mailbox: Mailbox) -> None:
    future = mailbox.submit(scheduler, message(1))
    batch = Batch(scheduler)
    assert scheduler.take(batch)
    del batch
    with pytest.raises(ModelExecutionError, match="unanswered"):
        await asyncio.wait_for(future, 10)


async def test_a_mailbox_that_closes_leaves_nobody_waiting(scheduler: Scheduler, instance: HandDriven) -> None:
    box = Mailbox(asyncio.get_running_loop())
    running = box.submit(scheduler, message(1))
    await instance.until_taken()
    queued = box.submit(scheduler, message(2))
    box.close()
    for future in (running, queued):
        with pytest.raises(ServerStopping):
            await asyncio.wait_for(future, 10)
    with pytest.raises(ServerStopping):
        box.submit(scheduler, message(3))
    instance.go()
    assert await asyncio.to_thread(scheduler.wait_idle, 10)
