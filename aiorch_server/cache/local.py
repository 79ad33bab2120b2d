"""A cache in the server's own memory: what was not used for longest goes first."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from aiorch_server.cache.base import CacheUse, ResponseCache

#: What an entry costs beside its key and value: two objects, a tuple, a number and its place in the table.
ENTRY_BYTES: Final = 256


class LocalCache(ResponseCache):
    """Least recently used first out; bounded in bytes, keys and bookkeeping included; used on one event loop.

    An entry older than ``ttl_s`` is forgotten when it is asked for or when room is needed. An entry that would not fit
    an empty cache is not kept.
    """

    is_shared = False

    def __init__(self, *, size_bytes: int, ttl_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._size_bytes = size_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        self._used_bytes = 0
        self._evictions = 0

    async def get(self, key: bytes) -> bytes | None:
        """The value, which becomes the most recently used."""
        found = self._entries.get(key)
        if found is None:
            return None
        value, expires = found
        if expires and self._clock() >= expires:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return value

    async def put(self, key: bytes, value: bytes) -> None:
        """Keeps it and drops what there is no room for."""
        if key in self._entries:
            self._drop(key, is_eviction=False)
        size = _measure(key, value)
        if size > self._size_bytes:
            return
        while self._used_bytes + size > self._size_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = (value, self._clock() + self._ttl_s if self._ttl_s else 0.0)
        self._used_bytes += size

    def read_use(self) -> CacheUse:
        """Entries, bytes and evictions."""
        return CacheUse(len(self._entries), self._used_bytes, self._evictions)

    def _drop(self, key: bytes, *, is_eviction: bool = True) -> None:
        value, _ = self._entries.pop(key)
        self._used_bytes -= _measure(key, value)
        self._evictions += is_eviction


def _measure(key: bytes, value: bytes) -> int:
    return len(key) + len(value) + ENTRY_BYTES
