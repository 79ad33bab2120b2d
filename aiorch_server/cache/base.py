"""What a response cache must do, wherever it keeps its answers."""

from __future__ import annotations

import abc

from aiorch_server.types import CacheUse

__all__ = ["CacheUse", "EntryUnusable", "ResponseCache"]


class EntryUnusable(Exception):
    """Something is wrong with one entry; the cache as such is in order."""


class ResponseCache(abc.ABC):
    """Bytes by key, for all models of a server; all methods are called on the server's event loop and may not block it.

    Made with ``size_bytes`` and ``ttl_s`` (0: no limit of age) as keyword arguments. An entry may be forgotten at any
    time. The server puts bounds around a cache that is not its own (GuardedCache): calls that take too long are
    cancelled, what is raised counts as a miss, and entries that do not come back as they were put are not used.
    """

    #: Whether entries may come from other servers, or from before this one's start.
    is_shared: bool = True
    #: How long ``check`` may take.
    check_timeout_s: float = 1.0

    @abc.abstractmethod
    async def get(self, key: bytes) -> bytes | None:
        """What was put under that key, None where there is nothing (any more).

        EntryUnusable if something is wrong with that entry alone; anything else that is raised means the whole cache.
        """

    @abc.abstractmethod
    async def put(self, key: bytes, value: bytes) -> None:
        """Keeps ``value``, in place of what was there; may decline, for example what is too big."""

    def read_use(self) -> CacheUse:
        """What is held now, as far as that is known."""
        return CacheUse()

    async def check(self) -> None:  # noqa: B027 - for most the next call will tell
        """Raises while the cache cannot be used; called after a failure, before it is used again."""

    async def close(self) -> None:  # noqa: B027 - memory needs none
        """Gives back connections; called once, after the last call."""
