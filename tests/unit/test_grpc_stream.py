"""The order of a stream: what is read, what runs, what is written, and what is left when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from aiorch_server.frontends.grpc.stream import MAX_IN_FLIGHT, MAX_IN_FLIGHT_BYTES, Turn, run_stream


class Stream:
    """A client's messages, and answers that wait for ``gate``."""

    def __init__(self, messages: Sequence[bytes]) -> None:
        self.unread = list(messages)
        self.gate = asyncio.Event()
        self.running = self.running_bytes = self.most_running = self.most_bytes = 0
        self.written: list[int] = []

    async def read(self) -> AsyncIterator[bytes]:
        while self.unread:
            yield self.unread.pop(0)

    async def respond(self, message: bytes, turn: Turn) -> None:
        answer = await self.answer(message)
        await turn.wait()
        self.written.append(answer)

    async def answer(self, message: bytes) -> int:
        self.running += 1
        self.running_bytes += len(message)
        self.most_running = max(self.running, self.most_running)
        self.most_bytes = max(self.running_bytes, self.most_bytes)
        try:
            await self.gate.wait()
            return len(message)
        finally:
            self.running -= 1
            self.running_bytes -= len(message)

    def serve(self) -> asyncio.Task[None]:
        return asyncio.create_task(run_stream(self.read(), self.respond))


async def settle() -> None:
    """Lets everything run that can: nothing here waits for a clock."""
    for _ in range(10 * MAX_IN_FLIGHT):
        await asyncio.sleep(0)


async def test_messages_in_flight_are_bounded() -> None:
    stream = Stream([b"x"] * (MAX_IN_FLIGHT + 10))
    serving = stream.serve()
    await settle()
    assert stream.running == MAX_IN_FLIGHT and len(stream.unread) >= 9
    stream.gate.set()
    await serving
    assert stream.most_running == MAX_IN_FLIGHT and len(stream.written) == MAX_IN_FLIGHT + 10


async def test_bytes_in_flight_are_bounded() -> None:
    large = bytes(MAX_IN_FLIGHT_BYTES * 2 // 5)
    stream = Stream([large, large, large, b"small", large])
    serving = stream.serve()
    await settle()
    assert stream.running == 2 and len(stream.unread) == 2  # the third is read, and waits
    stream.gate.set()
    await serving
    assert stream.written == [len(large), len(large), len(large), 5, len(large)]
    assert stream.most_bytes <= MAX_IN_FLIGHT_BYTES


async def test_a_message_larger_than_the_bound_runs_alone() -> None:
    larger = bytes(MAX_IN_FLIGHT_BYTES + 1)
    stream = Stream([b"first", larger, b"last"])
    stream.gate.set()
    await asyncio.wait_for(stream.serve(), 10)
    assert stream.written == [5, len(larger), 4]


@pytest.mark.parametrize("is_full", [False, True])
async def test_cancelling_leaves_nothing_behind(is_full: bool) -> None:
    stream = Stream([b"x"] * (MAX_IN_FLIGHT * 2 if is_full else 3))
    before = asyncio.all_tasks()
    serving = stream.serve()
    await settle()
    assert stream.running == (MAX_IN_FLIGHT if is_full else 3)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert stream.running == 0 and asyncio.all_tasks() == before and stream.written == []
