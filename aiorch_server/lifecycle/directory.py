"""What is managed and what is routed, for the planes to ask."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from aiorch_server.errors import (
    AiorchError,
    ModelNotReady,
    RequestError,
    ServerStopping,
    UnknownModel,
    UnknownVersion,
)
from aiorch_server.lifecycle.model import STOPPING_TEXT, ManagedModel
from aiorch_server.lifecycle.offers import Offers
from aiorch_server.lifecycle.refusals import explain_missing, explain_unknown, parse_version
from aiorch_server.lifecycle.route import Route
from aiorch_server.lifecycle.servable import Servable, ServableHandle
from aiorch_server.repository import ModelSnapshot
from aiorch_server.routing import Traffic
from aiorch_server.types import ModelIndexEntry, ModelState


class ModelDirectory:
    """The half of LifecycleManager that changes nothing. All methods are for one event loop's thread."""

    def __init__(self, load_on_demand: Sequence[str]) -> None:
        self._models: dict[str, ManagedModel] = {}
        self._routes: dict[str, Route] = {}
        self._traffic: dict[str, Traffic] = {}
        self._offers = Offers(self._models, load_on_demand)
        #: What the repository held at the last look.
        self._snapshots: Mapping[str, ModelSnapshot] = {}
        self._is_started = False
        self._is_stopping = False
        self._has_closed = False

    @property
    def is_started(self) -> bool:
        """Whether the models of the start set are loaded or have failed."""
        return self._is_started

    @property
    def is_stopping(self) -> bool:
        """Whether an end was announced: not ready any more, and no model changes."""
        return self._is_stopping

    def acquire(self, name: str, version: str = "") -> ServableHandle:
        """A lease on a version that is ready, for one request; "" is what the shares choose for it, see ``choose``.

        Raises UnknownModel, UnknownVersion, ModelNotReady, ServerStopping, or RequestError for a bad version string.
        """
        return self.choose(name, version)[0].acquire()

    def choose(
        self,
        name: str,
        version: str = "",
        *,
        key: bytes = b"",
        correlation_id: int | str = 0,
        chosen: tuple[int, bool] | None = None,
    ) -> tuple[Servable, bool]:
        """The version that one request is to run on, and whether it is in the sample that observers get.

        For each request once: where it names no version, it is counted to the shares. A sequence goes where it is
        under way; else the version in ``chosen`` holds while it is ready, then the shares decide, by ``key`` (the
        request's, see ROUTE_KEY) where they are sticky. Raises as ``acquire``.
        """
        number, route = self._find_route(name, version)
        found = route.choose(number, key, correlation_id, chosen) if route is not None else None
        if found is None:
            raise explain_missing(name, number, self._models.get(name), self._routes.get(name))
        return found

    def find(self, name: str, version: str = "") -> Servable:
        """For looking at a version that is ready, without a lease; "" is the first that has a share.

        No request is counted. Raises as ``acquire``.
        """
        number, route = self._find_route(name, version)
        servable = route.look(number) if route is not None else None
        if servable is None:
            raise explain_missing(name, number, self._models.get(name), self._routes.get(name))
        return servable

    def _find_route(self, name: str, version: str) -> tuple[int, Route | None]:
        number = parse_version(version)
        if self._has_closed:
            raise ServerStopping(STOPPING_TEXT)
        return number, self._routes.get(name)

    def list_choices(self, name: str, version: str = "") -> list[Servable]:
        """Everything that ``choose`` may give for a request; empty where it raises."""
        try:
            number, route = self._find_route(name, version)
        except (RequestError, ServerStopping):
            return []
        return route.list_choices(number) if route is not None else []

    def explain_unknown(self, name: str, version: str = "") -> AiorchError:
        """What ``find`` raises where there is no model of that name, whether there is one or not."""
        try:
            parse_version(version)
        except RequestError as error:
            return error
        return ServerStopping(STOPPING_TEXT) if self._has_closed else explain_unknown(name)

    def is_ready(self, name: str, version: str = "") -> bool:
        """Whether requests for that version should be sent; RequestError for a bad version string."""
        try:
            self.find(name, version)
            return not self._is_stopping
        except ServerStopping:
            return False
        except (UnknownModel, UnknownVersion, ModelNotReady):
            model = self._offers.find(name, parse_version(version))
            return model is not None and model.is_loadable(asyncio.get_running_loop().time()) and not self._is_stopping

    def servables(self) -> list[Servable]:
        """What serves or drains, by name and version."""
        return [servable for name in sorted(self._models) for servable in self._models[name].servables()]

    def versions(self, name: str) -> list[int]:
        """The ready versions of a model, lowest first."""
        return sorted(self._routes[name].servables) if name in self._routes else []

    def traffic(self, name: str) -> Traffic | None:
        """What ``set_traffic`` was last told."""
        return self._traffic.get(name)

    def is_known(self, name: str) -> bool:
        """Whether a version of the model was ever tried."""
        return name in self._models and bool(self._models[name].versions)

    def index(self, ready_only: bool = False) -> list[ModelIndexEntry]:
        """All models that are managed or were seen in the repository, by name and version."""
        entries = [entry for name in sorted(self._models) for entry in self._models[name].index()]
        if ready_only:
            return [entry for entry in entries if entry.state is ModelState.READY]
        for name, snapshot in self._snapshots.items():
            if name not in self._models:
                entries.append(ModelIndexEntry(name, "", ModelState.UNKNOWN, snapshot.problem))
        return sorted(entries, key=lambda entry: (entry.name, int(entry.version or 0)))

    def is_own(self, name: str) -> bool:
        """Whether a model of that name is managed that is not deployed from the registry."""
        model = self._models.get(name)
        return model is not None and not model.is_deployed and bool(model.is_wanted or model.versions or model.offered)

    def index_model(self, name: str) -> list[ModelIndexEntry]:
        """The rows of one model, none if it is not managed."""
        return self._models[name].index() if name in self._models else []

    def waiting_versions(self, name: str) -> tuple[int, ...]:
        """The versions of a model that the next request for it would load."""
        model = self._models.get(name)
        if model is None or not model.is_resting or not model.is_loadable(asyncio.get_running_loop().time()):
            return ()
        return tuple(sorted(model.offered))

    def ready(self, name: str) -> Mapping[int, Servable]:
        """The ready versions of a model."""
        return self._models[name].ready() if name in self._models else {}

    def problems(self) -> dict[str, str]:
        """Models that should be ready and are not, with the reason."""
        return {name: problem for name, model in self._models.items() if (problem := model.problem())}
