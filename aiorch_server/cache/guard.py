"""A cache outside of this process behind bounds: whatever it does, no request fails and none waits long."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Coroutine
from typing import Any, Final

from aiorch_server.cache.answers import seal, unseal
from aiorch_server.cache.base import CacheUse, EntryUnusable, ResponseCache

logger = logging.getLogger(__name__)

#: How long a cache that failed is left alone before it is tried again.
PAUSE_S: Final = 1.0
LOG_INTERVAL_S: Final = 10.0
#: Answers on their way into the cache; further ones are not kept.
MOST_PENDING: Final = 64
MOST_PENDING_BYTES: Final = 32 << 20
#: Checked on the event loop up to here (about 0.2 ms), beyond on a thread.
_LARGEST_INLINE_BYTES: Final = 1 << 18
_LONGEST_TEXT: Final = 200


class GuardedCache(ResponseCache):
    """A cache as VersionCache may use it: raises nothing, bounds look-ups in time, inserts beside the request.

    Entries are sealed: what comes back is what was put under that very key, or nothing. After a failure, one of time
    included, the cache is left alone for ``pause_s``; then it is tried beside the requests, which go on without it
    until it answers. Failures are counted and told to the log, one line at most per ``LOG_INTERVAL_S``.
    """

    def __init__(self, cache: ResponseCache, name: str, *, timeout_s: float, pause_s: float = PAUSE_S) -> None:
        self.is_shared = cache.is_shared
        self._cache = cache
        self._name = name
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self._pending: dict[bytes, bytes] = {}
        self._pending_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures = 0
        #: 0 while it is used.
        self._paused_until = 0.0
        self._is_checking = False
        self._is_closed = False
        self._logged_at = -LOG_INTERVAL_S

    async def get(self, key: bytes) -> bytes | None:
        """The value; None also where it cannot be had in time, or is not what was put there."""
        pending = self._pending.get(key)
        if pending is not None or not self._is_usable():
            return pending
        try:
            async with asyncio.timeout(self._timeout_s):
                sealed = await self._cache.get(key)
            if sealed is None:
                return None
            if len(sealed) <= _LARGEST_INLINE_BYTES:
                return unseal(key, sealed)
            return await asyncio.to_thread(unseal, key, sealed)
        except Exception as error:
            self._fail("look-up", error)
            return None

    async def put(self, key: bytes, value: bytes) -> None:
        """Keeps it soon; ``get`` knows it at once."""
        size = len(value)
        if not self._is_usable() or key in self._pending or len(self._pending) >= MOST_PENDING:
            return
        if self._pending_bytes + size > MOST_PENDING_BYTES:
            return
        self._pending[key] = value
        self._pending_bytes += size
        self._start(self._put(key, value))

    def read_use(self) -> CacheUse:
        """What the cache says, with the failures of its use."""
        return dataclasses.replace(self._cache.read_use(), failures=self._failures)

    async def close(self) -> None:
        """Gives insertions under way their time, then closes the cache."""
        self._is_closed = True
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=self._timeout_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self._timeout_s):
                await self._cache.close()

    async def _put(self, key: bytes, value: bytes) -> None:
        try:
            sealed = (
                seal(key, value) if len(value) <= _LARGEST_INLINE_BYTES else await asyncio.to_thread(seal, key, value)
            )
            async with asyncio.timeout(self._timeout_s):
                await self._cache.put(key, sealed)
        except Exception as error:
            self._fail("insertion", error)
        finally:
            del self._pending[key]
            self._pending_bytes -= len(value)

    def _is_usable(self) -> bool:
        if not self._paused_until:
            return not self._is_closed
        if not self._is_checking and not self._is_closed and asyncio.get_running_loop().time() >= self._paused_until:
            self._is_checking = True
            self._start(self._check())
        return False

    async def _check(self) -> None:
        try:
            async with asyncio.timeout(max(self._timeout_s, self._cache.check_timeout_s)):
                await self._cache.check()
        except Exception as error:
            self._fail("check", error)
        else:
            self._paused_until = 0.0
            logger.info("cache '%s' is used again", self._name)
        finally:
            self._is_checking = False

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _fail(self, what: str, error: Exception) -> None:
        self._failures += 1
        now = asyncio.get_running_loop().time()
        if not isinstance(error, EntryUnusable):
            self._paused_until = now + self._pause_s
        if now - self._logged_at >= LOG_INTERVAL_S:
            self._logged_at = now
            reason = f"{type(error).__name__}: {error}"[:_LONGEST_TEXT] if str(error) else type(error).__name__
            text = "cache '%s': a %s failed (%s), models run instead; failures so far: %d"
            logger.warning(text, self._name, what, reason, self._failures)
