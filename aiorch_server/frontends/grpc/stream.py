"""ModelStreamInfer's order of things: many requests run at once, their answers leave in the order they came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeVar

#: Requests of one stream that are read but not yet answered; beyond it the client is not read.
MAX_IN_FLIGHT: Final = 64

Answer = TypeVar("Answer")


async def answer_in_order(
    messages: AsyncIterator[bytes],
    answer: Callable[[bytes], Awaitable[Answer]],
    write: Callable[[Answer], Awaitable[None]],
) -> None:
    """Runs ``answer`` for each message, at most MAX_IN_FLIGHT at once, and ``write`` for each answer in order.

    Returns when the messages ended and all are written. However it is left (cancelled, ``write`` or the reading
    failed), whatever still runs is cancelled and waited for, so nothing outlives the call.
    """
    slots = asyncio.Semaphore(MAX_IN_FLIGHT)
    queue: asyncio.Queue[asyncio.Task[Answer] | None] = asyncio.Queue()
    unwritten: set[asyncio.Task[Answer]] = set()

    async def run(message: bytes) -> Answer:
        return await answer(message)

    async def read() -> None:
        try:
            async for message in messages:
                await slots.acquire()
                task = asyncio.create_task(run(message))
                unwritten.add(task)
                queue.put_nowait(task)
        finally:
            queue.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (task := await queue.get()) is not None:
            await write(await task)
            unwritten.discard(task)
            slots.release()
        await reader
    finally:
        for unfinished in (reader, *unwritten):
            unfinished.cancel()
        await asyncio.gather(reader, *unwritten, return_exceptions=True)
