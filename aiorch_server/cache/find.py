"""Finds response caches: ``local``, ``redis``, entry points of the group ``aiorch.caches``, ``"module:attribute"``."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from aiorch_server.cache.base import ResponseCache
from aiorch_server.cache.guard import GuardedCache
from aiorch_server.cache.local import LocalCache
from aiorch_server.config.server import CacheConfig
from aiorch_server.errors import AiorchError, InvalidSettings

GROUP = "aiorch.caches"


def open_cache(config: CacheConfig) -> ResponseCache | None:
    """The cache that the settings name, None for ``off``; InvalidSettings where it cannot be had.

    All but ``local`` are guarded. Nothing is connected yet: a cache that is out of order does not keep a server down.
    """
    if config.kind == "off":
        return None
    if config.kind == "local":
        return LocalCache(size_bytes=config.size_bytes, ttl_s=config.ttl_secs)
    timeout_s = config.timeout_ms / 1000
    if config.kind == "redis":
        return GuardedCache(_make_redis(config, timeout_s), "redis", timeout_s=timeout_s)
    try:
        made = _find(config.kind)(size_bytes=config.size_bytes, ttl_s=config.ttl_secs)
    except AiorchError:
        raise
    except (Exception, SystemExit) as error:  # foreign code
        raise InvalidSettings(f"cache '{config.kind}' cannot be used: {type(error).__name__}: {error}") from error
    if not isinstance(made, ResponseCache):
        raise InvalidSettings(
            f"cache '{config.kind}' cannot be used: it gives a {type(made).__name__}, no ResponseCache"
        )
    return GuardedCache(made, config.kind, timeout_s=timeout_s)


def _make_redis(config: CacheConfig, timeout_s: float) -> ResponseCache:
    try:
        from aiorch_server.cache.redis import RedisCache  # its package is an extra
    except ImportError as error:
        text = f"cache 'redis' needs the package 'redis': pip install 'aiorchestrator[redis]' ({error})"
        raise InvalidSettings(text) from error
    return RedisCache(config.redis, ttl_s=config.ttl_secs, timeout_s=timeout_s)


def _find(kind: str) -> Any:
    if ":" in kind:
        module, _, attribute = kind.partition(":")
        found: Any = importlib.import_module(module)
        for step in attribute.split("."):
            found = getattr(found, step)
        return found
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if kind not in installed:
        known = ", ".join(["off", "local", "redis", *sorted(installed)])
        raise InvalidSettings(f"there is no cache '{kind}'; known here: {known}, or MODULE:ATTRIBUTE")
    return installed[kind].load()
