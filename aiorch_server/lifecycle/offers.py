"""Which models requests load, and which versions of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from aiorch_server.lifecycle.model import ManagedModel
from aiorch_server.repository import ModelSnapshot
from aiorch_server.security.roles import matches


class Offers:
    """Over the manager's own table of models; ``patterns`` are names with ``*`` for any characters."""

    def __init__(self, models: dict[str, ManagedModel], patterns: Sequence[str]) -> None:
        self._models = models
        self._patterns = tuple(patterns)

    def cover(self, name: str) -> bool:
        """Whether the repository's model of that name is one of those that requests load."""
        return any(matches(pattern, name) for pattern in self._patterns)

    def find(self, name: str, version: int) -> ManagedModel | None:
        """The model that a request for this version (0: any) may load."""
        model = self._models.get(name)
        if model is None or not model.offered or (version and version not in model.offered):
            return None
        return model

    def are_left_to_requests(self, name: str) -> bool:
        """Whether nobody but requests has to load the model now."""
        model = self._models.get(name)
        return model is not None and model.is_on_demand and model.is_resting

    def list_changed(self, former: Mapping[str, ModelSnapshot], found: Mapping[str, ModelSnapshot]) -> Iterator[str]:
        """Covered models of which the repository holds something else than before."""
        if not self._patterns:
            return
        for name in sorted(former.keys() | found.keys()):
            if former.get(name) != found.get(name) and self.cover(name):
                model = self._models.get(name)
                if model is None or (model.is_on_demand and not model.is_deployed):  # else an unload took it back
                    yield name

    def follow(self, model: ManagedModel, snapshot: ModelSnapshot | None) -> None:
        """Offers what the repository holds now, and forgets a model that is gone and was never loaded."""
        model.follow_demand(True, snapshot)
        if snapshot is None and model.is_resting and not (model.versions or model.waiters):
            del self._models[model.name]

    def share(self, model: ManagedModel, step: ManagedModel) -> None:
        """What was loaded for an ensemble alone goes with it, and comes back with it or by a request of its own."""
        if model.is_on_demand and not (step.is_on_demand or step.is_asked or step.is_deployed):
            step.follow_demand(True, step.seen)
