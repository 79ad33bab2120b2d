"""Answers kept for requests that come again: the interface, the cache in memory, and what one version does with it."""

from aiorch_server.cache.answers import hash_version
from aiorch_server.cache.base import CacheUse, ResponseCache
from aiorch_server.cache.find import open_cache
from aiorch_server.cache.local import LocalCache
from aiorch_server.cache.version import VersionCache

__all__ = ["CacheUse", "LocalCache", "ResponseCache", "VersionCache", "hash_version", "open_cache"]
