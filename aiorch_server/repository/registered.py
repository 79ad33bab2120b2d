"""Models that a registry holds and a reconciler wants served, in the form that the lifecycle knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from aiorch_server.repository.base import ModelRepository, ModelSnapshot, RepositoryModel


class Tree(Protocol):
    """A version's files on this machine, laid out like a model's folder; they stay until ``release``."""

    directory: Path

    def release(self) -> None:
        """Gives them back; may be called again."""


@dataclass(frozen=True, slots=True)
class RegisteredVersion:
    """A version that shall serve: ``digest`` of its files, and the (blocking) way to them on this machine."""

    digest: str
    check_out: Callable[[], Tree]


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    """What shall serve of a model: exactly these versions; ``instances`` of each, 0 as each one's configuration says."""

    versions: Mapping[int, RegisteredVersion]
    instances: int = 0


class RegisteredRepository(ModelRepository):
    """The models that were put here last. Thread-safe; opening is cheap, the files come with ``select``."""

    def put(self, name: str, model: RegisteredModel) -> None:
        """From now on, this shall serve of the model; the lifecycle sees it with its next look."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """The model is not here any more; nothing happens if it was not."""
        raise NotImplementedError

    def scan(self) -> Mapping[str, ModelSnapshot]:
        """See ModelRepository.scan."""
        raise NotImplementedError

    def look(self, name: str) -> ModelSnapshot | None:
        """See ModelRepository.look."""
        raise NotImplementedError

    def open(
        self, name: str, config_json: str | bytes | None = None, files: Mapping[str, bytes] | None = None
    ) -> RepositoryModel:
        """See ModelRepository.open; RequestError for a configuration or files in the request."""
        raise NotImplementedError
