"""What ``import`` means in a user's files: they see each other and Triton's utilities, and nobody else sees them.

The files of a model are modules of one private package. An absolute import in them finds Triton's utilities, then the
files beside ``model.py`` and in the model's folder (Triton has both on ``sys.path``), then what Python itself finds.
The standard library always comes first. So two models may each have a ``text.py``, and nobody's ``sys.path`` changes.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Final

_SUFFIXES: Final = tuple(importlib.machinery.all_suffixes())
_packages: dict[str, PrivatePackage] = {}


class PrivatePackage:
    """The files in ``folders`` under a name that nothing else has; ``provided`` are modules given by name."""

    def __init__(self, name: str, folders: Sequence[Path], provided: Mapping[str, ModuleType]) -> None:
        self.name = name
        self._folders = tuple(folders)
        self._provided = provided
        self._builtins = {**vars(builtins), "__import__": self._import}

    def open(self, path: Path) -> ModuleType:
        """Runs the file as the package itself; raises what it raises, and forgets it then."""
        if _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)
        loader = _Loader(self.name, str(path), self._builtins)
        spec = importlib.machinery.ModuleSpec(self.name, loader, origin=str(path), is_package=True)
        spec.has_location = True
        assert spec.submodule_search_locations is not None
        spec.submodule_search_locations.extend(map(str, self._folders))
        module = importlib.util.module_from_spec(spec)
        _packages[self.name] = self
        sys.modules[self.name] = module
        try:
            loader.exec_module(module)
        except BaseException:
            forget_package(self.name)
            raise
        return module

    def wrap(self, spec: importlib.machinery.ModuleSpec | None) -> importlib.machinery.ModuleSpec | None:
        """The same place, loaded with this package's imports."""
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.name, spec.loader.path, self._builtins)
        return spec

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        if level == 0 and name in self._provided:
            return self._provided[name]
        if level == 0 and self._is_own(top):
            name = f"{self.name}.{name}"
            module = importlib.import_module(name)
            if not fromlist:
                return sys.modules[f"{self.name}.{top}"]
            # CPython's own rule for ``from package import submodule``
            return builtins.__import__(name, globals, locals, fromlist, 0) if hasattr(module, "__path__") else module
        return builtins.__import__(name, globals, locals, fromlist or (), level)

    def _is_own(self, top: str) -> bool:
        if not top or top in sys.stdlib_module_names:
            return False
        return any((folder / f"{top}{suffix}").is_file() for folder in self._folders for suffix in _SUFFIXES) or any(
            next((folder / top).glob("*.py"), None) is not None for folder in self._folders
        )


def forget_package(name: str) -> None:
    """Drops the package and all that was imported into it; a second call does nothing."""
    _packages.pop(name, None)
    # A copy made in one step: other threads import at the same time.
    for known in list(sys.modules):
        if known == name or known.startswith(f"{name}."):
            sys.modules.pop(known, None)


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, own_builtins: Mapping[str, Any]) -> None:
        super().__init__(name, path)
        self._own_builtins = own_builtins

    def get_code(self, fullname: str) -> CodeType:
        """What stands in the file now.

        Python's files of compiled code know their source by whole seconds and its size: a model that is edited and
        loaded again within a second could stay the old one.
        """
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = self._own_builtins
        super().exec_module(module)


class _Finder(MetaPathFinder):
    """Finds the files beside a model, so that they get the same imports as the model."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package = _packages.get(fullname.partition(".")[0])
        if package is None or path is None:
            return None
        return package.wrap(importlib.machinery.PathFinder.find_spec(fullname, path, target))


_FINDER: Final = _Finder()
