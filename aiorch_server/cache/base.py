"""What a response cache must do, wherever it keeps its answers."""

from __future__ import annotations

import abc
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What a cache holds now, and how many entries it gave up for room or age since it was made."""

    entries: int = 0
    used_bytes: int = 0
    evictions: int = 0


class ResponseCache(abc.ABC):
    """Bytes by key, for all models of a server; all methods are called on the server's event loop and may not block it.

    Made with ``size_bytes`` and ``ttl_s`` (0: no limit of age) as keyword arguments. An entry may be forgotten at any
    time. What is raised counts as a miss: a cache that is out of order slows a server down, it fails no request.
    """

    @abc.abstractmethod
    async def get(self, key: bytes) -> bytes | None:
        """What was put under that key, None where there is nothing (any more)."""

    @abc.abstractmethod
    async def put(self, key: bytes, value: bytes) -> None:
        """Keeps ``value``, in place of what was there; may decline, for example what is too big."""

    def read_use(self) -> CacheUse:
        """What is held now; zeros where that is not known."""
        return CacheUse()

    async def close(self) -> None:  # noqa: B027 - memory needs none
        """Gives back connections; called once, after the last call."""
