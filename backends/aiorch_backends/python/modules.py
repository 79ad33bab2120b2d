"""Importing a user's ``model.py`` under a name that nothing else has."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import re
import sys
import weakref
from collections.abc import Container
from typing import Any

from aiorch_backends.common import refuse, require_artefact
from aiorch_server.backend import LoadContext
from aiorch_server.errors import AiorchError

logger = logging.getLogger(__name__)

_COUNTER = itertools.count()


class UserModule:
    """One import of a ``model.py`` and one object of its class ``Model``."""

    def __init__(self, name: str, model: Any) -> None:
        self.model = model
        # Also when the object is dropped without being closed: what is in sys.modules is never collected.
        self._forget = weakref.finalize(self, _forget, name)

    @classmethod
    def open(cls, context: LoadContext) -> UserModule:
        """Imports the file and makes the object; ModelLoadError with type and text of what the user's code raised."""
        path = require_artefact(context)
        stem = re.sub(r"\W", "_", f"{context.model_name}_v{context.model_version}")
        name = f"aiorch_models_{next(_COUNTER)}_{stem}"
        # A package in form, so that relative imports find the files beside it and no other model's.
        spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
        if spec is None or spec.loader is None:
            raise refuse(context, "the file name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
            model_class = getattr(module, "Model", None)
            if not isinstance(model_class, type):
                raise refuse(context, f"the file has no class 'Model'{_hint_at_triton(vars(module))}")
            model = model_class()
            if not callable(getattr(model, "execute", None)):
                raise refuse(context, "class 'Model' has no method 'execute'")
            return cls(name, model)
        except BaseException as error:
            _forget(name)
            if not isinstance(error, (Exception, SystemExit)):
                raise
            raise explain(context, error) from error

    def close(self) -> None:
        """Forgets the module and its siblings; a second call does nothing."""
        self.model = None
        self._forget()


def explain(context: LoadContext, error: BaseException) -> Exception:
    """A ModelLoadError for what the user's code raised while loading; an AiorchError is passed on as it is."""
    if isinstance(error, AiorchError):
        return error
    logger.error("model '%s': its code failed while loading", context.model_name, exc_info=error)
    hint = _hint_at_triton({error.name}) if isinstance(error, ModuleNotFoundError) else ""
    return refuse(context, summarize(error) + hint)


def summarize(error: BaseException) -> str:
    """Type and first line of an error: what its owner needs, without the stack."""
    first = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _hint_at_triton(names: Container[str | None]) -> str:
    """What to do with a model written for Triton's python backend, if one of its names is among ``names``."""
    if "TritonPythonModel" in names or "triton_python_backend_utils" in names:
        return "; it is written for Triton's python backend: here a class 'Model' takes and gives arrays by name"
    return ""


def _forget(name: str) -> None:
    # A copy made in one step: other threads import at the same time.
    for known in list(sys.modules):
        if known == name or known.startswith(f"{name}."):
            sys.modules.pop(known, None)
