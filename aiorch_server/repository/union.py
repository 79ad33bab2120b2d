"""Two repositories as one: models in folders and models deployed from a registry, by name in one place only."""

from __future__ import annotations

from collections.abc import Mapping

from aiorch_server.errors import ModelLoadError
from aiorch_server.repository.base import ModelRepository, ModelSnapshot, RepositoryModel


class UnionRepository(ModelRepository):
    """What ``stored`` and ``deployed`` hold; a name in both is a problem of that model.

    What is deployed does not depend on ``stored`` being readable; a look at everything does.
    """

    def __init__(self, stored: ModelRepository, deployed: ModelRepository) -> None:
        self._stored = stored
        self._deployed = deployed

    def scan(self) -> Mapping[str, ModelSnapshot]:
        """See ModelRepository.scan."""
        stored, deployed = self._stored.scan(), self._deployed.scan()
        both = {name: _explain_clash(name) for name in stored.keys() & deployed.keys()}
        return dict(sorted({**stored, **deployed, **both}.items()))

    def look(self, name: str) -> ModelSnapshot | None:
        """See ModelRepository.look."""
        deployed = self._deployed.look(name)
        if deployed is None:
            return self._stored.look(name)
        return _explain_clash(name) if self._is_stored(name) else deployed

    def open(
        self, name: str, config_json: str | bytes | None = None, files: Mapping[str, bytes] | None = None
    ) -> RepositoryModel:
        """See ModelRepository.open."""
        if self._deployed.look(name) is None:
            return self._stored.open(name, config_json, files)
        if self._is_stored(name):
            raise ModelLoadError(_explain_clash(name).problem)
        return self._deployed.open(name, config_json, files)

    def _is_stored(self, name: str) -> bool:
        try:
            return self._stored.look(name) is not None
        except ModelLoadError:
            return False  # its root cannot be read, which must not take down what is deployed


def _explain_clash(name: str) -> ModelSnapshot:
    return ModelSnapshot(
        name,
        problem=f"model '{name}' is both in the model repository's folder and deployed from the registry; remove its "
        "folder, or undeploy it",
    )
