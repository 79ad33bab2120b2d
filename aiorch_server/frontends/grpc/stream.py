"""ModelStreamInfer's order of things: many requests run at once, their answers leave in the order they came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeVar

#: Requests of one stream that are read but not yet answered, in number and in bytes; beyond it the client is not read.
MAX_IN_FLIGHT: Final = 64
MAX_IN_FLIGHT_BYTES: Final = 64 << 20

Answer = TypeVar("Answer")


async def answer_in_order(
    messages: AsyncIterator[bytes],
    answer: Callable[[bytes], Awaitable[Answer]],
    write: Callable[[Answer], Awaitable[None]],
) -> None:
    """Runs ``answer`` for each message, as many at once as the bounds allow, and ``write`` for each answer in order.

    A message that is larger than MAX_IN_FLIGHT_BYTES runs alone. Returns when the messages ended and all are written.
    However it is left (cancelled, ``write`` or the reading failed), whatever still runs is cancelled and waited for,
    so nothing outlives the call.
    """
    queue: asyncio.Queue[tuple[asyncio.Task[Answer], int] | None] = asyncio.Queue()
    unwritten: set[asyncio.Task[Answer]] = set()
    unwritten_bytes = 0
    has_changed = asyncio.Event()

    async def run(message: bytes) -> Answer:
        return await answer(message)

    async def read() -> None:
        nonlocal unwritten_bytes
        try:
            async for message in messages:
                size = len(message)
                while unwritten and (len(unwritten) >= MAX_IN_FLIGHT or unwritten_bytes + size > MAX_IN_FLIGHT_BYTES):
                    has_changed.clear()
                    await has_changed.wait()
                task = asyncio.create_task(run(message))
                unwritten.add(task)
                unwritten_bytes += size
                queue.put_nowait((task, size))
        finally:
            queue.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (running := await queue.get()) is not None:
            task, size = running
            await write(await task)
            unwritten.discard(task)
            unwritten_bytes -= size
            has_changed.set()
        await reader
    finally:
        for unfinished in (reader, *unwritten):
            unfinished.cancel()
        await asyncio.gather(reader, *unwritten, return_exceptions=True)
