"""Models that a registry holds and a reconciler wants served, in the form that the lifecycle knows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from aiorch_server.config.model import ModelConfig
from aiorch_server.config.placement import InstanceGroup, SpecificVersions, VersionPolicy
from aiorch_server.errors import ModelLoadError, RequestError, UnknownModel
from aiorch_server.pauses import pause
from aiorch_server.repository.base import Artefact, BackendNames, ModelRepository, ModelSnapshot, RepositoryModel
from aiorch_server.repository.filesystem import FilesystemModel

logger = logging.getLogger(__name__)


class Tree(Protocol):
    """A version's files on this machine, laid out like a model's folder; they stay until ``release``."""

    @property
    def directory(self) -> Path:
        """The model's folder, named like the model."""

    def release(self) -> None:
        """Gives them back; may be called again."""


@dataclass(frozen=True, slots=True)
class RegisteredVersion:
    """A version that shall serve: ``digest`` of its files, and the (blocking) way to them on this machine."""

    digest: str
    check_out: Callable[[], Tree]


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    """Exactly the versions of a model that shall serve; ``instances`` of each, 0 as each one's configuration says."""

    versions: Mapping[int, RegisteredVersion]
    instances: int = 0


class RegisteredRepository(ModelRepository):
    """The models that were put here last. Thread-safe; opening is cheap, the files come with ``select``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[str, RegisteredModel] = {}

    def put(self, name: str, model: RegisteredModel) -> None:
        """From now on, this shall serve of the model; the lifecycle sees it with its next look."""
        with self._lock:
            if model.versions:
                self._models[name] = model
            else:
                self._models.pop(name, None)

    def remove(self, name: str) -> None:
        """The model is not here any more; nothing happens if it was not."""
        with self._lock:
            self._models.pop(name, None)

    def scan(self) -> Mapping[str, ModelSnapshot]:
        """See ModelRepository.scan."""
        with self._lock:
            return {name: _look_at(name, model) for name, model in sorted(self._models.items())}

    def look(self, name: str) -> ModelSnapshot | None:
        """See ModelRepository.look."""
        with self._lock:
            model = self._models.get(name)
        return None if model is None else _look_at(name, model)

    def open(
        self, name: str, config_json: str | bytes | None = None, files: Mapping[str, bytes] | None = None
    ) -> RepositoryModel:
        """See ModelRepository.open; RequestError for a configuration or files in the request."""
        with self._lock:
            model = self._models.get(name)
        if model is None:
            raise UnknownModel(f"model '{name}' is not deployed from the registry")
        if config_json is not None or files:
            raise RequestError(
                f"model '{name}' is deployed from the registry, whose versions never change: a load request may not "
                "bring a configuration or files for it; upload a new version"
            )
        return _DeployedModel(_look_at(name, model), model)


class _DeployedModel(RepositoryModel):
    """All deployed versions of a model, each with a configuration of its own."""

    def __init__(self, snapshot: ModelSnapshot, model: RegisteredModel) -> None:
        self.snapshot = snapshot
        self.directory = Path()
        self._model = model
        self._policy = VersionPolicy(specific=SpecificVersions(versions=tuple(sorted(model.versions))))
        self.config = _adapt(ModelConfig.from_dict({}, folder=snapshot.name), self._policy, 0)
        self.declared = self.config.declare_signature({})

    def locate(self, version: int, names: BackendNames) -> Artefact:
        """Each version is located by what ``select`` gives."""
        raise ModelLoadError(f"version {version} of model '{self.name}' has not been selected")

    def select(self, version: int) -> RepositoryModel:
        """See RepositoryModel.select."""
        wanted = self._model.versions[version]
        tree = wanted.check_out()
        try:
            pause()
            snapshot = replace(self.snapshot, versions={version: self.snapshot.versions[version]})
            return _CheckedOutVersion(snapshot, tree, wanted.digest, self._policy, self._model.instances)
        except BaseException:
            tree.release()
            raise


class _CheckedOutVersion(FilesystemModel):
    """One version, its files checked out while this is open; trusted no further than what a load request brings."""

    origin = "the uploaded version"
    senders = "upload versions"

    def __init__(self, snapshot: ModelSnapshot, tree: Tree, digest: str, policy: VersionPolicy, instances: int) -> None:
        super().__init__(snapshot, tree.directory, tree.directory.resolve())
        self._tree = tree
        self._digest = digest
        self.is_requested = True
        self.config = _adapt(self.config, policy, instances)

    def locate(self, version: int, names: BackendNames) -> Artefact:
        """See RepositoryModel.locate."""
        return replace(super().locate(version, names), is_stored=False)

    def identify(self, version: int) -> str:
        """See RepositoryModel.identify: the digest tells everything."""
        return f"registered {self._digest}"

    def close(self) -> None:
        """See RepositoryModel.close."""
        self._tree.release()


def _look_at(name: str, model: RegisteredModel) -> ModelSnapshot:
    scaled = f" x{model.instances}" if model.instances else ""
    return ModelSnapshot(name, versions={number: f"{each.digest}{scaled}" for number, each in model.versions.items()})


def _adapt(config: ModelConfig, policy: VersionPolicy, instances: int) -> ModelConfig:
    """The configuration with what the deployment decides in place of what is written."""
    changes: dict[str, object] = {"version_policy": policy}
    if instances:
        groups = config.instance_group
        if len(groups) > 1:
            raise ModelLoadError(
                f"model '{config.name}' is scaled to {instances} instances, but its configuration has {len(groups)} "
                "instance groups; upload a version with one"
            )
        group = groups[0] if groups else InstanceGroup()
        changes["instance_group"] = (group.model_copy(update={"count": instances}),)
    return config.model_copy(update=changes)
