"""The contract between a place that holds models and the lifecycle that serves them."""

from __future__ import annotations

import abc
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aiorch_server.backend import DeclaredSignature
from aiorch_server.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """One cheap look at a model: what is there, without opening anything.

    ``fingerprint`` changes when the model's own files (configuration, labels) change; ``versions`` maps each version
    number to a fingerprint that changes when any file of that version does. Fingerprints are opaque: compare, never
    parse. ``problem`` is empty, or a sentence that says why the model cannot be opened.
    """

    name: str
    fingerprint: str = ""
    versions: Mapping[int, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class BackendNames:
    """What the installed backends answer to.

    ``artefacts`` maps artefact file names to backend names, for each backend best first; ``platforms`` maps the
    names usable as ``platform:`` to backend names.
    """

    artefacts: Mapping[str, str] = field(default_factory=dict)
    platforms: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Artefact:
    """The file or folder a backend opens, and that backend's name.

    ``path`` is the version's folder itself where the backend looks for no particular file. ``is_stored``: what the
    repository itself holds and configures; False where a load request brought the artefact or chose it.
    """

    path: Path
    backend: str
    is_stored: bool = True


class RepositoryModel(abc.ABC):
    """A model opened for loading: its configuration as read at one moment, and the way to its files.

    Owned: whoever opened it calls ``close`` when no version loaded from it is in use any more. Methods block on
    files; call them off the event loop. Any thread may call them.
    """

    #: What was there just before the configuration was read: a later change shows as a different fingerprint.
    snapshot: ModelSnapshot
    #: The model's folder.
    directory: Path
    #: The configuration as written, unsupported fields already refused.
    config: ModelConfig
    #: The signature as written, with the labels of label files.
    declared: DeclaredSignature
    #: Whether the configuration, and perhaps the files, came from outside: with a load request or an upload.
    is_requested: bool = False
    #: What they came with then, and who can do that; for texts.
    origin: str = "the load request"
    senders: str = "send load requests"

    @property
    def name(self) -> str:
        """The model's name."""
        return self.snapshot.name

    @abc.abstractmethod
    def locate(self, version: int, names: BackendNames) -> Artefact:
        """The artefact of a version and the backend for it.

        Raises ModelLoadError that names the folder, what is in it and what was looked for.
        """

    def select(self, version: int) -> RepositoryModel:
        """The model as it is for one version of its snapshot, which may have a configuration of its own.

        Itself where all versions share one. Another one is the caller's to close; then it is located and loaded for
        that version only. May take as long as fetching files takes. Raises ModelLoadError for what is wrong with this
        version alone, CapacityError where its files cannot be had now.
        """
        return self

    def identify(self, version: int) -> str:
        """What tells this version from all others of its name, on any machine and at any time; for models that loaded.

        Reads all files. Where they are not known, or changed since this was opened: something that comes only once.
        """
        return f"unknown {uuid.uuid4()}"

    def close(self) -> None:  # noqa: B027 - most repositories hold nothing
        """Gives back what was made for this model alone (for example temporary files); may be called again."""


class ModelRepository(abc.ABC):
    """Where models are. Stateless towards its callers: it says what is there now, not what is loaded.

    All methods block on files or a network; call them off the event loop. Any thread may call them.
    """

    @abc.abstractmethod
    def scan(self) -> Mapping[str, ModelSnapshot]:
        """One look at all models, by name.

        Contract: cheap enough for polling (no file is opened). A model with a problem has its own entry that says
        so, and never hides another model. A root that cannot be read raises ModelLoadError: what it holds is
        unknown then, which must not be taken for "all models were removed".
        """

    @abc.abstractmethod
    def look(self, name: str) -> ModelSnapshot | None:
        """The snapshot of one model; None if there is none of that name. Raises like ``scan``."""

    @abc.abstractmethod
    def open(
        self, name: str, config_json: str | bytes | None = None, files: Mapping[str, bytes] | None = None
    ) -> RepositoryModel:
        """Opens a model for loading.

        ``config_json`` replaces the stored configuration. ``files`` maps ``<version>/<path>`` (a leading ``file:`` is
        accepted) to contents; they replace the model's stored files altogether and need ``config_json``. Neither is
        remembered by the repository.
        Raises UnknownModel if nothing of that name is stored (and no files are given), ModelLoadError for anything
        else that is wrong with this model, RequestError for a name or a path that is not allowed.
        """
