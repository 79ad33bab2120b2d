"""A model repository in folders: ``<root>/<model>/[config.pbtxt|config.yaml]`` and ``<version>/<artefact>``.

The layout is Triton's. Entries that cannot be models (files, hidden folders) and folders in a model that are not
version numbers are passed over; everything else that is wrong is a problem of that one model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from aiorch_server.backend import DeclaredSignature
from aiorch_server.config.files import LARGEST_CONFIG_BYTES, find_config_file, load_model_config, read_labels
from aiorch_server.config.model import ModelConfig
from aiorch_server.config.names import check_name, parse_version
from aiorch_server.errors import ModelLoadError, RequestError, UnknownModel
from aiorch_server.repository.artefacts import choose_artefact
from aiorch_server.repository.base import Artefact, BackendNames, ModelRepository, ModelSnapshot, RepositoryModel
from aiorch_server.repository.fingerprint import (
    OutsideRoot,
    TooManyEntries,
    hash_contents,
    hash_files,
    hash_folder,
    stay_inside,
)
from aiorch_server.repository.overlay import Overlay

logger = logging.getLogger(__name__)


class FilesystemRepository(ModelRepository):
    """Models in one or more root folders; a name in two roots is a problem of that model in both.

    Roots may be links that are switched while the server runs (they are resolved at each look). Links below a root
    are followed as long as they stay below it.
    """

    def __init__(self, roots: Sequence[str | os.PathLike[str]]) -> None:
        self._roots = tuple(Path(root).absolute() for root in roots)

    def scan(self) -> Mapping[str, ModelSnapshot]:
        """See ModelRepository.scan."""
        folders: dict[str, list[tuple[Path, Path]]] = {}
        for root in self._resolve_roots():
            for name in _list_names(root):
                folders.setdefault(name, []).append((root / name, root))
        return {name: _look_at(name, places) for name, places in sorted(folders.items())}

    def look(self, name: str) -> ModelSnapshot | None:
        """See ModelRepository.look."""
        places = self._find(name)
        return _look_at(name, places) if places else None

    def open(
        self, name: str, config_json: str | bytes | None = None, files: Mapping[str, bytes] | None = None
    ) -> RepositoryModel:
        """See ModelRepository.open."""
        if files:
            return _open_overlay(name, config_json, files)
        places = self._find(name)
        if not places:
            raise UnknownModel(f"model '{name}' is not in the model repository")
        snapshot = _look_at(name, places)
        if snapshot.problem:
            raise ModelLoadError(snapshot.problem)
        folder, root = places[0]
        return FilesystemModel(snapshot, folder, root, config_json)

    def _find(self, name: str) -> list[tuple[Path, Path]]:
        _check_model_name(name)
        places = [(root / name, root) for root in self._resolve_roots()]
        return [(path, root) for path, root in places if os.path.lexists(path) and not path.is_file()]

    def _resolve_roots(self) -> list[Path]:
        try:
            # Two spellings of one folder are one root; its models are not there twice.
            return list(dict.fromkeys(root.resolve(strict=True) for root in self._roots))
        except (OSError, RuntimeError) as error:
            raise ModelLoadError(f"the model repository cannot be read: {error}") from None


class FilesystemModel(RepositoryModel):
    """A model in a folder; with an overlay, that folder is temporary and goes with it."""

    def __init__(
        self,
        snapshot: ModelSnapshot,
        folder: Path,
        root: Path,
        config_json: str | bytes | None = None,
        overlay: Overlay | None = None,
    ) -> None:
        self.snapshot = snapshot
        self.directory = folder
        self._root = root
        self._overlay = overlay
        self.is_requested = config_json is not None
        self.config = _read_config(snapshot.name, folder, config_json)
        self.declared: DeclaredSignature = self.config.declare_signature(self._read_labels())
        for note in self.config.notes():
            logger.info("model '%s': %s", snapshot.name, note)

    def locate(self, version: int, names: BackendNames) -> Artefact:
        """See RepositoryModel.locate."""
        folder = self.directory / str(version)
        try:
            if not folder.is_dir():
                raise ModelLoadError(f"version {version} of model '{self.name}' has no folder {folder}")
            artefact = choose_artefact(folder, self.config, names)
            stay_inside(artefact.path, self._root)
            if artefact.path.is_dir():
                hash_folder(artefact.path, self._root)  # refuses links inside that lead out
        except (OSError, OutsideRoot, TooManyEntries) as error:
            raise ModelLoadError(f"version {version} of model '{self.name}' cannot be read: {error}") from None
        return replace(artefact, is_stored=self._is_stored(artefact, folder, names))

    def identify(self, version: int) -> str:
        """See RepositoryModel.identify."""
        try:
            files = [path for path in self.directory.iterdir() if path.is_file()]
            found = hash_contents(self.directory / str(version), files)
        except (OSError, TooManyEntries):
            return super().identify(version)
        # What was read is what was loaded if nothing has changed from before the load until now.
        now = _look_at(self.name, [(self.directory, self._root)])
        then = self.snapshot
        is_same = now.fingerprint == then.fingerprint and now.versions.get(version) == then.versions.get(version)
        return found if is_same and not now.problem else super().identify(version)

    def close(self) -> None:
        """See RepositoryModel.close."""
        if self._overlay is not None:
            self._overlay.close()

    def _is_stored(self, artefact: Artefact, folder: Path, names: BackendNames) -> bool:
        """Whether the stored configuration leads to ``artefact`` too."""
        if self._overlay is not None:
            return False
        if not self.is_requested:
            return True
        try:
            return choose_artefact(folder, load_model_config(self.directory, self.name), names) == artefact
        except ModelLoadError:
            return False

    def _read_labels(self) -> dict[str, tuple[str, ...]]:
        try:
            for output in self.config.output:
                stay_inside(self.directory / output.label_filename, self._root)
        except (OSError, RuntimeError, OutsideRoot) as error:
            raise ModelLoadError(f"labels of model '{self.name}' cannot be read: {error}") from None
        return read_labels(self.directory, self.config)


def _read_config(name: str, folder: Path, config_json: str | bytes | None) -> ModelConfig:
    if config_json is not None:
        if len(config_json) > LARGEST_CONFIG_BYTES:
            raise ModelLoadError(f"the configuration in the load request is larger than {LARGEST_CONFIG_BYTES} bytes")
        return ModelConfig.from_json(config_json, folder=name, source=f"model '{name}' in the load request")
    return load_model_config(folder, name)


def _open_overlay(name: str, config_json: str | bytes | None, files: Mapping[str, bytes]) -> RepositoryModel:
    _check_model_name(name)
    if config_json is None:
        raise RequestError(f"load request for model '{name}' brings files and so must bring its 'config' too")
    overlay = Overlay(name, files)
    try:
        folder = overlay.directory
        snapshot = _look_at(name, [(folder, folder.parent)])
        return FilesystemModel(snapshot, folder, folder.parent, config_json, overlay)
    except BaseException:
        overlay.close()
        raise


def _check_model_name(name: str) -> None:
    try:
        check_name(name)
    except ValueError as error:
        raise RequestError(f"model name {name!r} is not allowed: {error}") from None


def _list_names(root: Path) -> list[str]:
    """Names in ``root`` that stand for models: all but hidden ones and plain files."""
    try:
        with os.scandir(root) as entries:
            return [entry.name for entry in entries if not entry.name.startswith(".") and not _is_file(entry)]
    except OSError as error:
        raise ModelLoadError(f"model repository {root} cannot be read: {error.strerror}") from None


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False  # whatever it is, the look at the model will tell


def _look_at(name: str, places: Sequence[tuple[Path, Path]]) -> ModelSnapshot:
    """One model's snapshot; whatever is wrong ends up in its ``problem``."""
    if len(places) > 1:
        roots = ", ".join(str(folder.parent) for folder, _ in places)
        return ModelSnapshot(name, problem=f"model '{name}' is in more than one repository ({roots}); keep one")
    folder, root = places[0]
    try:
        check_name(name)
        return _look_inside(name, folder, root)
    except (ValueError, OSError, RuntimeError, OutsideRoot, TooManyEntries, ModelLoadError) as error:
        return ModelSnapshot(name, problem=f"model '{name}' cannot be read: {error}")


def _look_inside(name: str, folder: Path, root: Path) -> ModelSnapshot:
    stay_inside(folder, root)
    files: list[Path] = []
    versions: dict[int, str] = {}
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = Path(entry.path)
        if entry.is_file():
            files.append(path)
        elif (version := parse_version(entry.name)) is not None and entry.is_dir():
            stay_inside(path, root)
            versions[version] = hash_folder(path, root)
    find_config_file(folder)
    return ModelSnapshot(name, hash_files(files, root), dict(sorted(versions.items())))
