"""ModelStreamInfer's order of things: many requests run at once, each with its turn to write.

Answers of ordinary models leave in the order in which their requests came, a decoupled model's when they are there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

#: Requests of one stream that are read but not yet answered, in number and in bytes; beyond it the client is not read.
MAX_IN_FLIGHT: Final = 64
MAX_IN_FLIGHT_BYTES: Final = 64 << 20


class Turn:
    """The place of one request in its stream's order."""

    def __init__(self, before: asyncio.Future[None] | None) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._before = before
        self._has_left = False

    async def wait(self) -> None:
        """Until every request that came before has said all it has to say in order."""
        if self._before is not None:
            await asyncio.wait((self._before,))

    def leave(self) -> None:
        """Nobody waits for this request: the one behind takes its place. A second call does nothing."""
        if self._has_left:
            return
        self._has_left = True
        if self._before is None or self._before.done():
            self._pass_on()
        else:
            self._before.add_done_callback(self._pass_on)
        self._before = None  # or a long stream would be one long chain

    def _pass_on(self, _: object = None) -> None:
        if not self.over.done():
            self.over.set_result(None)


class SequenceOrder:
    """Whose turn it is among the requests of each sequence of one stream.

    What one request needs before it enters its model's queue (unpacking it, reading shared memory) may take longer than
    the same for the next one, and a sequence's requests are queued in the order in which they were sent.
    """

    def __init__(self) -> None:
        self._last: dict[object, asyncio.Future[None]] = {}

    def join(self, key: object) -> Turn:
        """The turn of a request of the sequence ``key``, behind those that joined before."""
        turn = Turn(self._last.get(key))
        self._last[key] = turn.over
        turn.over.add_done_callback(lambda over: self._forget(key, over))
        return turn

    def _forget(self, key: object, over: asyncio.Future[None]) -> None:
        if self._last.get(key) is over:
            del self._last[key]


async def run_stream(messages: AsyncIterator[bytes], respond: Callable[[bytes, Turn], Awaitable[None]]) -> None:
    """Runs ``respond`` for each message, as many at once as the bounds allow; it writes when its turn has come.

    A message that is larger than MAX_IN_FLIGHT_BYTES runs alone. Returns when the messages ended and all are answered.
    However it is left (cancelled, or something failed, which is raised), whatever still runs is cancelled and waited
    for, so nothing outlives the call.
    """
    running: set[asyncio.Task[None]] = set()
    running_bytes = 0
    last: asyncio.Future[None] | None = None
    has_changed = asyncio.Event()
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(message: bytes, turn: Turn) -> None:
        nonlocal running_bytes
        try:
            await respond(message, turn)
        finally:
            turn.leave()
            running_bytes -= len(message)
            has_changed.set()

    async def read() -> None:
        nonlocal running_bytes, last
        async for message in messages:
            while running and (len(running) >= MAX_IN_FLIGHT or running_bytes + len(message) > MAX_IN_FLIGHT_BYTES):
                has_changed.clear()
                await has_changed.wait()
            turn = Turn(last)
            last = turn.over
            running_bytes += len(message)
            task = asyncio.create_task(run(message, turn))
            running.add(task)
            task.add_done_callback(on_done)
            del message, task

    def on_done(task: asyncio.Task[None]) -> None:
        running.discard(task)
        has_changed.set()
        error = None if task.cancelled() else task.exception()  # looked at, else asyncio complains
        if ended.done():
            return
        if task.cancelled():
            ended.cancel()
        elif error is not None:
            ended.set_exception(error)
        elif reader.done() and not running:
            ended.set_result(None)

    reader = asyncio.create_task(read())
    reader.add_done_callback(on_done)
    try:
        await ended
    finally:
        unfinished = (reader, *running)
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
