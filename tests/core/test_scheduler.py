"""Bounds, refusals, order, statistics, and answers under many clients and instances."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hand_driven import HandDriven, make_spec, message, values_of

from aiorch_server._core import Batch, Mailbox, ModelSpec, Scheduler, decode_response, encode_request
from aiorch_server.errors import InternalError, ModelExecutionError, QueueFull, RequestError, ServerStopping
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec


async def test_a_full_queue_refuses_and_loses_nothing(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(), max_queue_size=3)
    kept = [mailbox.submit(scheduler, message(index)) for index in range(3)]
    with pytest.raises(QueueFull, match=r"Exceeds maximum queue size$"):
        mailbox.submit(scheduler, message(9))
    instance = HandDriven(scheduler)
    instance.go(3)
    assert [values_of(answer) for answer in await asyncio.gather(*kept)] == [[0.0], [2.0], [4.0]]
    assert scheduler.counters().failures["REJECTED"] == 1
    instance.stop()


async def test_the_queue_is_bounded_in_bytes(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(), max_queue_bytes=1000)
    first = mailbox.submit(scheduler, message(1, width=500))  # one request always fits
    with pytest.raises(QueueFull):
        mailbox.submit(scheduler, message(2))
    first.cancel()
    await asyncio.sleep(0)
    mailbox.submit(scheduler, message(3)).cancel()


async def test_a_closed_scheduler_refuses(scheduler: Scheduler, mailbox: Mailbox) -> None:
    scheduler.close()
    with pytest.raises(ServerStopping, match="has stopped accepting new inference requests"):
        mailbox.submit(scheduler, message(1))
    assert not scheduler.take(Batch(scheduler))


async def test_a_closed_scheduler_does_not_wait_for_company(mailbox: Mailbox) -> None:
    """What is queued when it is closed is served at once, however long the batching delay."""
    scheduler = Scheduler(make_spec(), max_queue_delay_us=3_600_000_000, preferred_batch_sizes=(8,))
    instance = HandDriven(scheduler)
    waiting = mailbox.submit(scheduler, message(1))
    scheduler.close()
    instance.go()
    assert values_of(await asyncio.wait_for(waiting, 10)) == [2.0]
    instance.stop()


async def test_priorities(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(1), priority_levels=3, default_priority_level=2)
    order: list[str] = []

    async def ask(id: str, priority: int) -> None:
        await mailbox.submit(scheduler, message(1, id=id), priority=priority)
        order.append(id)

    tasks = [
        asyncio.create_task(ask(id, priority))
        for id, priority in (("low", 3), ("default", 0), ("same", 2), ("high", 1))
    ]
    await asyncio.sleep(0)
    with pytest.raises(RequestError, match="priority 4 is above the 3 priority levels"):
        mailbox.submit(scheduler, message(1), priority=4)
    instance = HandDriven(scheduler)
    for count in range(1, 5):
        instance.go()
        while len(order) < count:
            await asyncio.sleep(0.001)
    await asyncio.gather(*tasks)
    assert order == ["high", "default", "same", "low"]
    instance.stop()


async def test_a_message_that_does_not_fit_is_our_fault(scheduler: Scheduler, mailbox: Mailbox) -> None:
    with pytest.raises(InternalError, match="does not fit model 'echo'"):
        mailbox.submit(scheduler, encode_request("echo", "", "", [("X", "FP64", (1, 4), bytes(32))]))
    with pytest.raises(InternalError, match="malformed"):
        mailbox.submit(scheduler, b"\xff")


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (np.zeros((3, 4), np.float32), r"shape \[3, 4\] for a batch of 2 rows"),
        (np.float32(1), r"shape \[\] for a batch of 2 rows"),
        (np.zeros((2, 4), np.float64), "has numpy type float64; FP32 needs float32"),
        (np.zeros((2,) + (1,) * 8, np.float32), "9 dimensions"),
        (None, "gave no output 'Y'; it gave"),
    ],
)
async def test_wrong_outputs_settle_nobody(scheduler: Scheduler, mailbox: Mailbox, output: object, text: str) -> None:
    future = mailbox.submit(scheduler, message(1, 2))
    batch = Batch(scheduler)
    assert scheduler.take(batch)
    with pytest.raises(ModelExecutionError, match=text):
        batch.settle({} if output is None else {"Y": output})  # type: ignore[dict-item]
    batch.settle({"Y": batch.gather()["X"] * 2})
    assert values_of(await asyncio.wait_for(future, 10)) == [2.0, 4.0]


async def test_outputs_in_any_memory_order(scheduler: Scheduler, mailbox: Mailbox) -> None:
    future = mailbox.submit(scheduler, message(1, 2))
    batch = Batch(scheduler)
    assert scheduler.take(batch)
    batch.settle({"Y": np.asfortranarray(batch.gather()["X"])[:, ::-1]})
    assert values_of(await asyncio.wait_for(future, 10)) == [1.0, 2.0]


async def test_requested_outputs_bytes_and_optional_inputs(mailbox: Mailbox) -> None:
    inputs = (TensorSpec("T", DataType.BYTES, (-1,)), TensorSpec("N", DataType.INT16, (), optional=True))
    outputs = (TensorSpec("U", DataType.BYTES, (-1,)), TensorSpec("L", DataType.INT64, (-1,)))
    scheduler = Scheduler(ModelSpec("text", 1, ModelSignature(inputs, outputs, 16)))

    def ask(*rows: list[bytes], wanted: tuple[str, ...] = (), number: bool = False) -> asyncio.Future[bytes]:
        raw = b"".join(len(text).to_bytes(4, "little") + text for row in rows for text in row)
        given = [("T", "BYTES", (len(rows), len(rows[0])), raw)]
        if number:
            given.append(("N", "INT16", (len(rows),), np.arange(len(rows), dtype=np.int16).tobytes()))
        return mailbox.submit(scheduler, encode_request("text", "1", "", given, wanted))

    one = ask([b"a", b""], wanted=("L",))
    two = ask([b"bc", b"\xff\0"], [b"", b"x"], wanted=("U",))
    three = ask([b"d", b"e"], number=True)
    batch = Batch(scheduler)
    assert scheduler.take(batch) and batch.rows == 3  # the third has another shape key: it brings an optional input
    given = batch.gather()
    assert list(given) == ["T"]
    assert given["T"].tolist() == [[b"a", b""], [b"bc", b"\xff\0"], [b"", b"x"]]
    lengths = np.vectorize(len, otypes=[np.int64])(given["T"])
    upper = np.array([[text.upper() for text in row] for row in given["T"].tolist()], dtype=object)
    batch.settle({"U": upper, "L": lengths})
    assert scheduler.take(batch) and batch.rows == 1
    assert batch.gather()["N"].tolist() == [0]
    batch.settle({"U": np.array([["D", b"E"]], dtype=object), "L": np.zeros((1, 2), np.int64)})

    _, _, _, found = decode_response(await one)
    assert [(name, kind, shape) for name, kind, shape, _ in found] == [("L", "INT64", (1, 2))]
    assert np.frombuffer(found[0][3], np.int64).tolist() == [1, 0]
    _, _, _, found = decode_response(await two)
    assert [(name, shape) for name, _, shape, _ in found] == [("U", (2, 2))]
    assert bytes(found[0][3]) == b"\2\0\0\0BC\2\0\0\0\xff\0\0\0\0\0\1\0\0\0X"
    _, _, _, found = decode_response(await three)
    assert [name for name, *_ in found] == ["U", "L"]
    assert bytes(found[0][3]) == b"\1\0\0\0D\1\0\0\0E"


async def test_a_model_without_batch_dimension_runs_requests_alone(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(0))

    def ask(*values: float) -> asyncio.Future[bytes]:
        data = np.array(values, np.float32)
        return mailbox.submit(scheduler, encode_request("echo", "", "", [("X", "FP32", data.shape, data.tobytes())]))

    futures = [ask(1, 2), ask(3, 4)]
    batch = Batch(scheduler)
    for want in ([1, 2], [3, 4]):
        assert scheduler.take(batch) and batch.members == 1
        given = batch.gather()["X"]
        assert given.tolist() == want
        batch.settle({"Y": given})
    for future, want in zip(futures, ([1, 2], [3, 4]), strict=True):
        _, _, _, outputs = decode_response(await future)
        assert np.frombuffer(outputs[0][3], np.float32).tolist() == want


async def test_statistics(scheduler: Scheduler, instance: HandDriven, mailbox: Mailbox) -> None:
    blocker = mailbox.submit(scheduler, message(0))
    await instance.until_taken()
    futures = [mailbox.submit(scheduler, message(1, 2)), mailbox.submit(scheduler, message(3))]
    instance.go(2)
    await asyncio.gather(blocker, *futures)
    assert scheduler.wait_idle(10)
    counters = scheduler.counters()
    assert (counters.rows, counters.executions, counters.success.count) == (4, 2, 3)
    assert [(size.batch_size, size.compute_infer.count) for size in counters.batch_sizes] == [(1, 1), (3, 1)]
    assert counters.queue.count == counters.compute_input.count == counters.compute_output.count == 3
    parts = counters.queue.ns + counters.compute_input.ns + counters.compute_infer.ns + counters.compute_output.ns
    assert 0 < parts <= counters.success.ns, "phases overlap"
    total = counters.phases["total"]
    assert sum(total.counts) == 3 and total.sum_s == pytest.approx(counters.success.ns / 1e9)
    assert len(total.counts) == len(total.bounds_s) + 1
    assert counters.last_inference_ms > 1_600_000_000_000
    assert (counters.pending, counters.in_flight) == (0, 0)


@pytest.mark.parametrize("instances", [1, 3])
async def test_nobody_gets_anothers_answer(mailbox: Mailbox, instances: int) -> None:
    scheduler = Scheduler(make_spec(16), max_queue_delay_us=200)
    started = threading.Barrier(instances)

    def run() -> None:
        batch = Batch(scheduler)
        started.wait(20)
        while scheduler.take(batch):
            batch.settle({"Y": batch.gather()["X"] * 2})

    threads = [threading.Thread(target=run) for _ in range(instances)]
    for thread in threads:
        thread.start()
    answered = 0

    async def client(number: int) -> None:
        nonlocal answered
        for turn in range(40):
            rows = [number * 1000 + turn + part / 8 for part in range(1 + (number + turn) % 3)]
            future = mailbox.submit(scheduler, message(*rows, id=f"{number}-{turn}", width=1 + turn % 2))
            if (number * 7 + turn) % 11 == 0:
                await asyncio.sleep(0)
                future.cancel()
                continue
            answer = await asyncio.wait_for(future, 20)
            assert values_of(answer) == [2 * row for row in rows]
            assert decode_response(answer)[:3] == ("echo", "3", f"{number}-{turn}")
            answered += 1

    await asyncio.gather(*(client(number) for number in range(64)))
    scheduler.close()
    for thread in threads:
        thread.join(20)
    counters = scheduler.counters()
    assert answered > 2000
    assert counters.success.count + counters.failures["CANCELED"] == 64 * 40
    assert counters.executions < counters.success.count, "nothing was batched"


def test_bad_settings_are_refused() -> None:
    for settings in (
        {"preferred_batch_sizes": [9]},
        {"preferred_batch_sizes": [0]},
        {"max_queue_delay_us": -1},
        {"priority_levels": 2},
        {"priority_levels": 2, "default_priority_level": 3},
    ):
        with pytest.raises(ValueError):
            Scheduler(make_spec(8), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 64 inputs"):
        ModelSpec("m", 1, ModelSignature(tuple(TensorSpec(str(i), DataType.FP32, ()) for i in range(65)), ()))
    with pytest.raises(ValueError, match="tensor 'x' has 8 dimensions"):
        ModelSpec("m", 1, ModelSignature((TensorSpec("x", DataType.FP32, (1,) * 8),), ()))


async def test_serve_answers_until_the_queue_is_empty(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(1))
    answers = [mailbox.submit(scheduler, message(value)) for value in (1, 2, 3, 4)]
    scheduler.close()
    batch = Batch(scheduler)

    def execute(inputs: dict[str, NumpyArray]) -> dict[str, NumpyArray]:
        value = inputs["X"][0, 0]
        if value == 2:
            raise RuntimeError("spoiled")
        return {} if value == 3 else {"Y": inputs["X"] * 2}

    with pytest.raises(RuntimeError, match="spoiled"):
        batch.serve(execute)
    batch.fail(13, "no")
    with pytest.raises(ModelExecutionError, match="gave no output 'Y'"):
        batch.serve(execute)
    assert batch.members == 1
    batch.serve(execute)  # what was left unsettled is failed
    assert scheduler.in_flight == 0
    assert values_of(await answers[0]) == [2.0] and values_of(await answers[3]) == [8.0]
    with pytest.raises(ModelExecutionError, match=r"^no$"):
        await answers[1]
    with pytest.raises(ModelExecutionError, match="unanswered"):
        await answers[2]


def test_an_idle_instance_looks_around_by_itself(scheduler: Scheduler) -> None:
    """So that a wake-up that the C library loses costs a second and not the request."""
    thread = threading.Thread(target=lambda: scheduler.take(Batch(scheduler)), daemon=True)
    thread.start()
    status = Path(f"/proc/self/task/{thread.native_id}/status")

    def count_sleeps() -> int:
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("voluntary")]
        return int(line.split()[1])

    end = time.monotonic() + 20
    while status.read_text().split("State:")[1].split()[0] != "S":
        assert time.monotonic() < end
    before = count_sleeps()
    while count_sleeps() < before + 2:
        assert time.monotonic() < end, "the instance sleeps for ever"
        time.sleep(0.01)
    scheduler.close()
    thread.join(20)
    assert not thread.is_alive()
