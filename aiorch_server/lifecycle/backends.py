"""Finds backends: entry points of the group ``aiorch.backends``, and classes named as ``"module:attribute"``.

A backend whose package is missing or broken is no problem until a model needs it; the reason is kept for that model.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import entry_points
from typing import Any

from aiorch_server.backend import Backend
from aiorch_server.errors import AiorchError, ModelLoadError

logger = logging.getLogger(__name__)

GROUP = "aiorch.backends"


class BackendRegistry:
    """The backends of this process, by name; one object per backend, made when it is first needed. Thread-safe."""

    def __init__(self, plugins: Sequence[str] = (), *, group: str = GROUP) -> None:
        self._lock = threading.RLock()
        self._sources: dict[str, Callable[[], Any]] = {point.name: point.load for point in entry_points(group=group)}
        # A plugin may replace a backend of the same name; its name is only known once it is imported.
        self._plugins = tuple(plugins)
        self._backends: dict[str, Backend] = {}
        self._problems: dict[str, str] = {}
        self._is_scanned = False

    def add(self, backend: Backend) -> None:
        """Makes a backend known that is neither installed nor named; it wins over others of its name."""
        with self._lock:
            self._backends[backend.name] = backend

    def get(self, name: str) -> Backend:
        """The backend of that name, or the one that serves that platform; ModelLoadError if there is none."""
        with self._lock:
            self._import_all()
            for backend in self._backends.values():
                if backend.name == name or name in backend.platforms:
                    return backend
            if name in self._problems:
                raise ModelLoadError(f"backend '{name}' cannot be used: {self._problems[name]}")
            broken = "".join(f"; '{each}' cannot be used: {why}" for each, why in sorted(self._problems.items()))
            known = ", ".join(sorted(self._backends)) or "none"
            raise ModelLoadError(f"there is no backend '{name}'; known here: {known}{broken}")

    def artefact_names(self) -> Mapping[str, str]:
        """Artefact names (``"model.onnx"``) and the backend that reads them, best first."""
        with self._lock:
            self._import_all()
            names: dict[str, str] = {}
            longest = max((len(backend.artefacts) for backend in self._backends.values()), default=0)
            for rank in range(longest):
                for backend in self._backends.values():
                    if rank < len(backend.artefacts):
                        names.setdefault(backend.artefacts[rank], backend.name)
            return names

    def platforms(self) -> Mapping[str, str]:
        """Names in ``platform:`` of a configuration and the backend they mean."""
        with self._lock:
            self._import_all()
            return {platform: backend.name for backend in self._backends.values() for platform in backend.platforms}

    def _import_all(self) -> None:
        # Importing a backend does not import its framework, so this is cheap.
        if self._is_scanned:
            return
        self._is_scanned = True
        for plugin in self._plugins:
            self._add(plugin, partial(_import_plugin, plugin))
        for name, load in self._sources.items():
            self._add(name, load)

    def _add(self, name: str, load: Callable[[], Any]) -> None:
        try:
            found = load()
            backend = found() if isinstance(found, type) else found
            if not isinstance(backend, Backend):
                raise TypeError(f"{found!r} is not a subclass of aiorch_server.backend.Backend")
        except (Exception, SystemExit) as error:
            # Any error: the packages are foreign code, and one that is broken must not take the others along.
            self._problems[name] = str(error) if isinstance(error, AiorchError) else f"{type(error).__name__}: {error}"
            logger.info("backend '%s' cannot be used: %s", name, self._problems[name])
            return
        self._backends.setdefault(backend.name, backend)


def _import_plugin(plugin: str) -> Any:
    module, _, attribute = plugin.partition(":")
    if not module or not attribute:
        raise ModelLoadError(f"backend '{plugin}' should be written as 'module:attribute'")
    found: Any = importlib.import_module(module)
    for step in attribute.split("."):
        found = getattr(found, step)
    return found
