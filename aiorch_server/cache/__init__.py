"""Answers kept for requests that come again: the interface, caches, and what a version does with them."""

from aiorch_server.cache.answers import hash_version
from aiorch_server.cache.base import CacheUse, EntryUnusable, ResponseCache
from aiorch_server.cache.find import open_cache
from aiorch_server.cache.guard import GuardedCache
from aiorch_server.cache.local import LocalCache
from aiorch_server.cache.version import VersionCache

__all__ = [
    "CacheUse",
    "EntryUnusable",
    "GuardedCache",
    "LocalCache",
    "ResponseCache",
    "VersionCache",
    "hash_version",
    "open_cache",
]
