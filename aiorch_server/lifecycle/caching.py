"""Which versions have their answers cached, and what is refused."""

from __future__ import annotations

from aiorch_server.cache import ResponseCache, VersionCache
from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import ModelLoadError
from aiorch_server.lifecycle.servable import Servable


def check_caching(config: ModelConfig, cache: ResponseCache | None) -> None:
    """ModelLoadError where a model wants its answers cached and the server has no cache."""
    if config.is_cached and cache is None:
        raise ModelLoadError(
            f"model '{config.name}': response_cache.enable: found true, but this server keeps no answers; "
            "start it with --cache local or redis, or write false"
        )


def attach_cache(servable: Servable, cache: ResponseCache | None, max_waiting: int) -> None:
    """Gives a servable that is not published yet its part of the cache, if its configuration wants one.

    ``max_waiting`` bounds the requests that wait for an equal one, 0 stands for the core's own bound.
    """
    config = servable.config
    if cache is None or not config.is_cached:
        return
    servable.cache = VersionCache(
        cache,
        servable.name,
        servable.version,
        identity=servable.identity,
        config=config.to_dict(),
        outputs=[spec.name for spec in servable.signature.outputs],
        max_waiting=max_waiting or 16384,
    )
