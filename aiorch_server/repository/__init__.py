"""Model repositories: where artefacts and configurations are."""

from aiorch_server.repository.base import Artefact, BackendNames, ModelRepository, ModelSnapshot, RepositoryModel
from aiorch_server.repository.filesystem import FilesystemRepository

__all__ = [
    "Artefact",
    "BackendNames",
    "FilesystemRepository",
    "ModelRepository",
    "ModelSnapshot",
    "RepositoryModel",
]
