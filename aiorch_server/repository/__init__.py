"""Model repositories: where artefacts and configurations are."""

from aiorch_server.repository.base import Artefact, BackendNames, ModelRepository, ModelSnapshot, RepositoryModel
from aiorch_server.repository.filesystem import FilesystemRepository
from aiorch_server.repository.registered import RegisteredModel, RegisteredRepository, RegisteredVersion
from aiorch_server.repository.union import UnionRepository

__all__ = [
    "Artefact",
    "BackendNames",
    "FilesystemRepository",
    "ModelRepository",
    "ModelSnapshot",
    "RegisteredModel",
    "RegisteredRepository",
    "RegisteredVersion",
    "RepositoryModel",
    "UnionRepository",
]
