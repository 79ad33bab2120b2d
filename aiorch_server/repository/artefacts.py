"""Chooses the artefact in a version folder and the backend that opens it."""

from __future__ import annotations

from pathlib import Path

from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import ModelLoadError
from aiorch_server.repository.base import Artefact, BackendNames

_MOST_SHOWN = 8


def choose_artefact(folder: Path, config: ModelConfig, names: BackendNames) -> Artefact:
    """The artefact in ``folder`` for this configuration.

    The backend is the one in ``backend`` or ``platform``; without either, the one whose artefact is there. The file is
    ``default_model_filename``, else the backend's best artefact name that is there, else (for a backend that looks for
    none) the folder. ModelLoadError says what was looked for and what is there.
    """
    backend = _read_backend(config, names)
    if config.default_model_filename:
        path = folder / config.default_model_filename
        if not path.exists():
            raise ModelLoadError(
                f"default_model_filename '{path.name}' is not in {folder}, which holds {_list_folder(folder)}"
            )
        return Artefact(path, backend or _guess_backend(path.name, folder, names))
    looked_for = [name for name, owner in names.artefacts.items() if backend in ("", owner)]
    present = [name for name in looked_for if (folder / name).exists()]
    if backend and not looked_for:
        return Artefact(folder, backend)
    if not present:
        owner = f"backend '{backend}'" if backend else "any installed backend"
        raise ModelLoadError(
            f"no artefact of {owner} in {folder}: looked for "
            f"{', '.join(looked_for) or 'nothing'}; found {_list_folder(folder)}. "
            f"Rename the artefact, or set default_model_filename{'' if backend else ' and backend'}"
        )
    owners = sorted({names.artefacts[name] for name in present})
    if len(owners) > 1:
        raise ModelLoadError(
            f"{folder} holds artefacts of several backends ({', '.join(present)}); set 'backend' to one of "
            f"{', '.join(owners)}"
        )
    return Artefact(folder / present[0], owners[0])


def _read_backend(config: ModelConfig, names: BackendNames) -> str:
    if not config.platform:
        return config.backend
    owner = names.platforms.get(config.platform)
    if config.backend:
        if owner is not None and owner != config.backend:
            raise ModelLoadError(
                f"platform '{config.platform}' belongs to backend '{owner}', but backend is '{config.backend}'; "
                "write only one of the two"
            )
        return config.backend
    if owner is None:
        raise ModelLoadError(
            f"platform '{config.platform}' belongs to no installed backend; known are "
            f"{', '.join(sorted(names.platforms)) or 'none'}. Install its backend, or set 'backend'"
        )
    return owner


def _guess_backend(file_name: str, folder: Path, names: BackendNames) -> str:
    exact = names.artefacts.get(file_name)
    if exact is not None:
        return exact
    suffix = Path(file_name).suffix
    owners = sorted({owner for name, owner in names.artefacts.items() if suffix and Path(name).suffix == suffix})
    if len(owners) != 1:
        found = f"fits backends {', '.join(owners)}" if owners else "fits no installed backend"
        raise ModelLoadError(f"artefact '{file_name}' in {folder} {found}; set 'backend'")
    return owners[0]


def _list_folder(folder: Path) -> str:
    try:
        found = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"what cannot be read ({error.strerror})"
    shown = ", ".join(found[:_MOST_SHOWN])
    return (shown if len(found) <= _MOST_SHOWN else f"{shown} and {len(found) - _MOST_SHOWN} more") or "nothing"
