"""Finds response caches: ``local``, entry points of the group ``aiorch.caches``, and ``"module:attribute"``."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from aiorch_server.cache.base import ResponseCache
from aiorch_server.cache.local import LocalCache
from aiorch_server.config.server import CacheConfig
from aiorch_server.errors import AiorchError, InvalidSettings

GROUP = "aiorch.caches"


def open_cache(config: CacheConfig) -> ResponseCache | None:
    """The cache that the settings name, None for ``off``; InvalidSettings where it cannot be had."""
    if config.kind == "off":
        return None
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
    return made


def _find(kind: str) -> Any:
    if kind == "local":
        return LocalCache
    if ":" in kind:
        module, _, attribute = kind.partition(":")
        found: Any = importlib.import_module(module)
        for step in attribute.split("."):
            found = getattr(found, step)
        return found
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if kind not in installed:
        known = ", ".join(["off", "local", *sorted(installed)])
        raise InvalidSettings(f"there is no cache '{kind}'; known here: {known}, or MODULE:ATTRIBUTE")
    return installed[kind].load()
