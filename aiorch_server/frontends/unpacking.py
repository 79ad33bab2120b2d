"""Bounds what compressed requests unpack to, for all requests of a door together.

A kilobyte can unpack to a megabyte: what a client may have in flight by its windows says nothing about the memory that
its requests take once they are unpacked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

#: What all compressed requests of a door may hold unpacked at the same time.
BUDGET_BYTES: Final = 256 << 20
#: How long a request waits for others to give back before it is refused.
PATIENCE_S: Final = 10.0
#: No gzip or deflate stream unpacks to more than this many times its size (RFC 1951: 258 bytes from 2 bits).
LARGEST_RATIO: Final = 1032


class UnpackBudget:
    """Bytes that requests reserve before they unpack and give back when they are done; served in order of arrival.

    A reservation that is larger than the whole budget is granted alone. All methods belong to the loop's thread.
    """

    def __init__(self, limit_bytes: int = BUDGET_BYTES, *, patience_s: float = PATIENCE_S) -> None:
        self._limit_bytes = limit_bytes
        self._patience_s = patience_s
        self._reserved_bytes = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def reserved_bytes(self) -> int:
        """What is reserved now."""
        return self._reserved_bytes

    async def reserve(self, size: int) -> None:
        """Takes ``size`` bytes, waiting for them if need be; TimeoutError when they do not become free in time."""
        if not self._waiters and self._fits(size):
            self._reserved_bytes += size
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (size, waiter)
        self._waiters.append(entry)
        try:
            async with asyncio.timeout(self._patience_s):
                await waiter
        except BaseException:
            if entry in self._waiters:
                self._waiters.remove(entry)
                self._grant()
            else:
                self.release(size)  # granted at the very moment that nobody wanted it any more
            raise

    def release(self, size: int) -> None:
        """Gives ``size`` reserved bytes back."""
        self._reserved_bytes -= size
        self._grant()

    def _fits(self, size: int) -> bool:
        return self._reserved_bytes == 0 or self._reserved_bytes + size <= self._limit_bytes

    def _grant(self) -> None:
        while self._waiters and self._fits(self._waiters[0][0]):
            size, waiter = self._waiters.popleft()
            self._reserved_bytes += size
            if waiter.done():  # cancelled: the one who waited gives it back
                continue
            waiter.set_result(None)
