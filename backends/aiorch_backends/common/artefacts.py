"""Opening artefacts: what is there, what is refused and why, what waits between ``inspect`` and ``load``."""

from __future__ import annotations

import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

from aiorch_server.backend import LoadContext
from aiorch_server.errors import ModelLoadError

_MAX_REASON_CHARACTERS = 600
_OPENED_LIMIT = 4

Opened = TypeVar("Opened")


def locate(context: LoadContext) -> str:
    """The artefact as its owner knows it, ``<model>/<version>/<file>``: no folder of this machine is told."""
    try:
        return context.artefact.relative_to(context.model_directory.parent).as_posix()
    except ValueError:
        return context.artefact.name


def refuse(context: LoadContext, reason: object) -> ModelLoadError:
    """The error that says which model and file does not load, and why; a framework's long text is cut."""
    text = " ".join(str(reason).replace(str(context.artefact), locate(context)).split())
    if not text and isinstance(reason, BaseException):
        text = type(reason).__name__
    if len(text) > _MAX_REASON_CHARACTERS:
        text = text[:_MAX_REASON_CHARACTERS] + " ..."
    return ModelLoadError(f"model '{context.model_name}' version {context.model_version}, '{locate(context)}': {text}")


def require_artefact(context: LoadContext, *, is_folder: bool = False) -> Path:
    """The artefact's path, when a file (or folder) is there; ModelLoadError when not."""
    path = context.artefact
    if is_folder and not path.is_dir():
        raise refuse(context, "there is no such folder" if not path.exists() else "this must be a folder")
    if not is_folder and not path.is_file():
        raise refuse(context, "there is no such file" if not path.exists() else "this must be a file")
    return path


def import_framework(name: str, *, extra: str) -> ModuleType:
    """Imports the framework when its backend is first used; ModelLoadError names the extra to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] != name.split(".")[0]:
            reason = f"'{name}' is installed, but cannot be imported: {error}"
        else:
            reason = f"'{name}' is not installed"
        raise ModelLoadError(f"{reason}; install it with: pip install 'aiorchestrator[{extra}]'") from error


def is_set(context: LoadContext, parameter: str) -> bool:
    """Whether a parameter of the model's configuration says true; ModelLoadError for anything but true or false."""
    value = context.parameters.get(parameter, "false").strip().lower()
    if value in ("true", "1"):
        return True
    if value in ("false", "0", ""):
        return False
    raise refuse(context, f'parameter \'{parameter}\' must be "true" or "false", not "{value}"')


class OpenedArtefacts(Generic[Opened]):
    """What ``inspect`` opened, kept for the ``load`` that follows; each is given out once, at most four are kept.

    An artefact that changed on disk in between is not found again. ``discard`` gets what is dropped without being
    given out. Safe to use from several threads.
    """

    def __init__(self, discard: Callable[[Opened], object] | None = None) -> None:
        self._discard = discard
        self._lock = threading.Lock()
        self._opened: OrderedDict[Hashable, Opened] = OrderedDict()

    def put(self, context: LoadContext, opened: Opened) -> None:
        """Keeps ``opened``; the oldest is dropped when there are too many."""
        key = _fingerprint(context)
        dropped = []
        with self._lock:
            if key in self._opened:
                dropped.append(self._opened.pop(key))
            self._opened[key] = opened
            while len(self._opened) > _OPENED_LIMIT:
                dropped.append(self._opened.popitem(last=False)[1])
        if self._discard is not None:
            for old in dropped:
                self._discard(old)

    def take(self, context: LoadContext) -> Opened | None:
        """What was kept for this artefact, device and thread count, now owned by the caller; None if nothing was."""
        key = _fingerprint(context)
        with self._lock:
            return self._opened.pop(key, None)


def _fingerprint(context: LoadContext) -> Hashable:
    path = context.artefact
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stamps = []
    for file in files:
        status = file.stat()
        stamps.append((file, status.st_mtime_ns, status.st_size))
    return tuple(stamps), context.device, context.threads, tuple(sorted(context.parameters.items()))
