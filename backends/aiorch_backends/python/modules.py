"""Importing a user's ``model.py`` under a name that nothing else has."""

from __future__ import annotations

import itertools
import logging
import re
import weakref
from typing import Any

from aiorch_backends.common import refuse, require_artefact
from aiorch_backends.python.imports import PrivatePackage, forget_package
from aiorch_backends.python.triton.utilities import UTILITIES, make_utilities
from aiorch_server.backend import LoadContext
from aiorch_server.errors import AiorchError

logger = logging.getLogger(__name__)

_COUNTER = itertools.count()
_TRITON_CLASS = "TritonPythonModel"


class UserModule:
    """One import of a ``model.py``: an object of its class ``Model``, or its class ``TritonPythonModel``.

    ``model`` is None for the latter: its constructor runs when an instance is loaded. ``utilities`` is what the file
    may import as ``triton_python_backend_utils``.
    """

    def __init__(self, name: str, model_class: type, model: Any, utilities: Any) -> None:
        self.model_class = model_class
        self.model = model
        self.utilities = utilities
        # Also when the object is dropped without being closed: what is in sys.modules is never collected.
        self._forget = weakref.finalize(self, forget_package, name)

    @property
    def is_triton(self) -> bool:
        """Whether the model is written for Triton's python backend."""
        return self.model_class.__name__ == _TRITON_CLASS

    @classmethod
    def open(cls, context: LoadContext) -> UserModule:
        """Imports the file; ModelLoadError with type and text of what the user's code raised."""
        path = require_artefact(context)
        if path.suffix != ".py":
            raise refuse(context, "the file name must end in .py")
        stem = re.sub(r"\W", "_", f"{context.model_name}_v{context.model_version}")
        name = f"aiorch_models_{next(_COUNTER)}_{stem}"
        utilities = make_utilities(context)
        folders = [path.parent, context.model_directory]
        try:
            module = PrivatePackage(name, folders, {UTILITIES: utilities}).open(path)
            model_class = getattr(module, _TRITON_CLASS, None) or getattr(module, "Model", None)
            if not isinstance(model_class, type):
                raise refuse(context, f"the file has no class 'Model' and no class '{_TRITON_CLASS}'")
            model = None if model_class.__name__ == _TRITON_CLASS else model_class()
            if not callable(getattr(model or model_class, "execute", None)):
                raise refuse(context, f"class '{model_class.__name__}' has no method 'execute'")
            return cls(name, model_class, model, utilities)
        except BaseException as error:
            forget_package(name)
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
    return refuse(context, summarize(error))


def summarize(error: BaseException) -> str:
    """Type and first line of an error: what its owner needs, without the stack."""
    first = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
