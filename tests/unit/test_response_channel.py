"""The way of a decoupled model's answers to the event loop: bounded, ended exactly once, left without a trace."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

import pytest

from aiorch_server.errors import DeadlineExpired, ModelExecutionError, StreamStalled
from aiorch_server.execution import response_channel
from aiorch_server.execution import taker as taker_module
from aiorch_server.execution.response_channel import MAX_WAITING, MAX_WAITING_BYTES, ResponseChannel
from aiorch_server.execution.taker import Taker
from aiorch_server.types import FINAL_RESPONSE, InferenceResponse

TIMEOUT_S = 20


def answer(place: int, *, is_final: bool = False) -> InferenceResponse:
    return InferenceResponse("m", "1", (), str(place), {FINAL_RESPONSE: True} if is_final else {})


def new_end() -> asyncio.Future[memoryview]:
    return asyncio.get_running_loop().create_future()


async def put_until_full(channel: ResponseChannel, size_bytes: int) -> tuple[threading.Thread, list[bool]]:
    """A thread that puts until nobody follows; returns when it stands still."""
    results: list[bool] = []

    def put() -> None:
        while not results or results[-1]:
            results.append(channel.put(answer(len(results)), size_bytes))

    thread = threading.Thread(target=put)
    thread.start()
    before = -1
    async with asyncio.timeout(TIMEOUT_S):
        while before != len(results) or not results:
            before = len(results)
            await asyncio.sleep(0.05)
    return thread, results


@pytest.mark.parametrize(
    ("size_bytes", "total_bytes", "wanted"),
    [
        (1, 1 << 30, MAX_WAITING),
        (MAX_WAITING_BYTES // 4, 1 << 30, 4),
        (MAX_WAITING_BYTES * 2, 1 << 30, 1),
        (100, 250, 2),
    ],
)
async def test_what_waits_is_bounded(
    monkeypatch: pytest.MonkeyPatch, size_bytes: int, total_bytes: int, wanted: int
) -> None:
    monkeypatch.setattr(response_channel, "MAX_TOTAL_BYTES", total_bytes)
    channel, end = ResponseChannel(asyncio.get_running_loop()), new_end()
    thread, results = await put_until_full(channel, size_bytes)
    assert len(results) == wanted and all(results)
    async with aclosing(channel.follow(end)) as answers:
        for place in range(3 * wanted):  # who takes makes room
            assert (await asyncio.wait_for(anext(answers), TIMEOUT_S)).id == str(place)
    await asyncio.to_thread(thread.join, TIMEOUT_S)
    assert end.cancelled() and channel.is_closed and results[-1] is False
    assert response_channel._ledger.size_bytes == 0


async def test_answers_come_before_the_end_and_its_error() -> None:
    channel, end = ResponseChannel(asyncio.get_running_loop()), new_end()
    for place in range(3):
        channel.put(answer(place), 1)
    end.set_exception(ModelExecutionError("it broke"))
    found = []
    with pytest.raises(ModelExecutionError, match="it broke"):
        async for each in channel.follow(end):
            found.append(each.id)
    assert found == ["0", "1", "2"] and channel.put(answer(3), 1) is False


async def test_nothing_comes_after_the_final_answer() -> None:
    channel, end = ResponseChannel(asyncio.get_running_loop()), new_end()
    channel.put(answer(0, is_final=True), 1)
    channel.put(answer(1), 1)
    following = asyncio.create_task(_collect(channel, end))
    await asyncio.sleep(0.05)
    assert not following.done()  # the request is about to be settled: leaving now would cancel it
    end.set_result(memoryview(b""))
    assert await asyncio.wait_for(following, TIMEOUT_S) == ["0"]


async def test_a_deadline_ends_it() -> None:
    loop = asyncio.get_running_loop()
    channel, end = ResponseChannel(loop), new_end()
    with pytest.raises(DeadlineExpired):
        await asyncio.wait_for(_collect(channel, end, int((loop.time() + 0.05) * 1e9)), TIMEOUT_S)
    assert end.cancelled() and channel.is_closed


async def _collect(channel: ResponseChannel, end: asyncio.Future[memoryview], deadline_ns: int = 0) -> list[str]:
    return [each.id async for each in channel.follow(end, deadline_ns)]


async def test_a_taker_that_stays_away_for_too_long_loses_its_stream() -> None:
    lost: list[str] = []
    taker = Taker(0.05, lambda: lost.append("lost"))
    channel, end = ResponseChannel(asyncio.get_running_loop(), taker), new_end()
    async with aclosing(channel.follow(end)) as answers:
        channel.put(answer(0), 1)
        assert (await anext(answers)).id == "0"
        with taker.away():
            thread, results = await put_until_full(channel, MAX_WAITING_BYTES)
            await asyncio.to_thread(thread.join, TIMEOUT_S)
            assert results == [True, False] and lost == ["lost"]
            async with asyncio.timeout(TIMEOUT_S):  # the model learns it though nobody comes back
                await asyncio.wait((end,))
        with pytest.raises(StreamStalled, match=r"taken for 0\.05 s while its model waited"):
            await anext(answers)
    assert end.cancelled() and response_channel._ledger.size_bytes == 0


async def test_a_taker_that_is_slow_but_comes_keeps_its_stream() -> None:
    taker = Taker(0.2)
    channel, end = ResponseChannel(asyncio.get_running_loop(), taker), new_end()
    channel.put(answer(0), 1)
    async with aclosing(channel.follow(end)) as answers:
        assert (await anext(answers)).id == "0"
        thread, _ = await put_until_full(channel, MAX_WAITING_BYTES)
        for place in range(1, 6):  # half a second in all
            with taker.away():
                await asyncio.sleep(0.1)
            assert await asyncio.wait_for(anext(answers), TIMEOUT_S)
            assert not end.done(), place
    await asyncio.to_thread(thread.join, TIMEOUT_S)


async def test_a_model_waits_for_others_inside_as_long_as_for_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taker_module, "_MAX_WAIT_INSIDE_S", 0.2)
    channel, end = ResponseChannel(asyncio.get_running_loop(), Taker(0.01)), new_end()
    following = channel.follow(end)
    channel.put(answer(0), 1)
    await anext(following)
    thread, results = await put_until_full(channel, MAX_WAITING_BYTES)
    assert results == [True]
    await asyncio.to_thread(thread.join, TIMEOUT_S)
    with pytest.raises(StreamStalled, match="by the models behind it"):
        await anext(following)
    assert results == [True, False]
