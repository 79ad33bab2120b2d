"""How long an event loop was held up, seen from inside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

TICK_S = 0.005


class LoopLag:
    """``worst_s``: the longest time by which a timer of TICK_S came late."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            self.worst_s = max(self.worst_s, loop.time() - due_s)


@asynccontextmanager
async def measure_lag() -> AsyncIterator[LoopLag]:
    lag = LoopLag()
    watching = asyncio.create_task(lag.watch())
    await asyncio.sleep(0)
    try:
        yield lag
        await asyncio.sleep(2 * TICK_S)  # what held up the loop last is seen by the tick after it
    finally:
        watching.cancel()
