"""What the doors ask besides inference: readiness, metadata, configuration, statistics, and changes of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from aiorch_server import __version__
from aiorch_server.config.labels import read_labels
from aiorch_server.config.model import ModelConfig
from aiorch_server.config.server import LifecycleConfig
from aiorch_server.errors import (
    BackendError,
    NotFoundError,
    RequestError,
    ServerStopping,
    UnknownModel,
    UnsupportedRequest,
)
from aiorch_server.exchange import SharedRegions
from aiorch_server.lifecycle.manager import LifecycleManager
from aiorch_server.lifecycle.refusals import UNKNOWN_LOAD_TEXT, UNKNOWN_UNLOAD_TEXT, parse_version
from aiorch_server.lifecycle.servable import Servable
from aiorch_server.observability.log_settings import LogSettings, LogValue
from aiorch_server.observability.trace_settings import TraceSettings
from aiorch_server.security import Role, current_access, keep_seen, permit, sees
from aiorch_server.tracing import current_incoming
from aiorch_server.types import (
    ModelIndexEntry,
    ModelMetadata,
    ModelSignature,
    ModelStatistics,
    ServerMetadata,
    TensorMetadata,
    TensorSpec,
)

SERVER_NAME = "aiorchestrator"
#: The protocol's extensions that work through every door.
EXTENSIONS = (
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "sequence",
    "sequence(string_id)",
    "statistics",
)


class ControlPlane:
    """The management side of the server; all methods are for the event loop's thread and none blocks it.

    The texts of its errors are Triton's, because clients' tests look at them. ``regions`` are the data plane's;
    without ``log_settings`` the process's logging is somebody else's and is left alone. A model that the caller may not
    see is answered like one that does not exist, and left out of lists; PermissionDenied where the caller may see it,
    and not do with it what the call does.
    """

    def __init__(
        self,
        manager: LifecycleManager,
        config: LifecycleConfig,
        *,
        extensions: Sequence[str] = EXTENSIONS,
        regions: SharedRegions | None = None,
        trace_settings: TraceSettings | None = None,
        log_settings: LogSettings | None = None,
        server_id: str = SERVER_NAME,
        has_deployed: Callable[[], bool] = lambda: True,
    ) -> None:
        """``has_deployed``: whether what the registry deployed here at the start is as it should be, or has failed."""
        self._manager = manager
        self.regions = regions or SharedRegions()
        self._traces = trace_settings or TraceSettings()
        self._logs = log_settings
        self._server_id = server_id
        self._has_deployed = has_deployed
        self._is_strict = config.is_readiness_strict
        self._extensions = tuple(extensions)

    def server_metadata(self) -> ServerMetadata:
        """Name, version and the extensions that work."""
        optional = {
            "system_shared_memory": self.regions.is_enabled,
            "trace": self._traces.can_trace,
            "logging": self._logs is not None,
        }
        extensions = (*self._extensions, *(name for name, works in optional.items() if works))
        return ServerMetadata(self._server_id, __version__, extensions)

    def is_live(self) -> bool:
        """True while the server runs; ServerStopping once it drains."""
        self.check_running("Server exiting")
        return True

    def is_ready(self) -> bool:
        """Whether the start is over and, if readiness is strict, every model serves that should. Raises as is_live."""
        self.check_running("Server exiting")
        return self._manager.is_started and self._has_deployed() and not (self._is_strict and self._manager.problems())

    def readiness_problems(self) -> dict[str, str]:
        """Why the server is not ready, by model; empty while it starts, and where readiness is not strict."""
        problems = self._manager.problems() if self._is_strict else {}
        return {name: text for name, text in problems.items() if sees(name)}

    def model_ready(self, name: str, version: str = "") -> bool:
        """Whether that version (any, if empty) takes requests; RequestError for a bad version string."""
        self.check_running("Server not ready")
        if not permit(name):
            parse_version(version)
            return False
        return self._manager.is_ready(name, version)

    async def bring(self, name: str, version: str = "", *, deadline_ns: int = 0) -> None:
        """Loads a model that is loaded on demand, so that what is asked of it next finds it; nothing for any other.

        It is there until the caller awaits something else. Raises as LifecycleManager.bring.
        """
        if permit(name):
            await self._manager.bring(name, version, deadline_ns)

    def model_metadata(self, name: str, version: str = "") -> ModelMetadata:
        """Tensors of one version and all ready versions; shapes are whole, -1 first where the model batches.

        Raises UnknownModel, UnknownVersion, ModelNotReady, ServerStopping or RequestError.
        """
        self.check_running("Server not ready")
        servable = self._find(name, version)
        return ModelMetadata(
            name=name,
            versions=tuple(map(str, self._manager.versions(name))),
            platform=servable.platform,
            inputs=tuple(_describe(spec, servable.signature) for spec in servable.signature.inputs),
            outputs=tuple(_describe(spec, servable.signature) for spec in servable.signature.outputs),
        )

    def model_config(self, name: str, version: str = "") -> ModelConfig:
        """The completed configuration of a loaded version; raises as model_metadata."""
        self.check_running("Server not ready")
        return self._find(name, version).config

    def find_signature(self, name: str, version: str = "") -> tuple[int, ModelSignature]:
        """A version, and what it takes and gives; raises as LifecycleManager.find.

        Unlike the other questions it is answered while the server drains: requests are served until the end.
        """
        servable = self._find(name, version)
        return servable.version, servable.signature

    def foresee(self, name: str, version: str = "") -> tuple[int, ModelSignature]:
        """As ``find_signature``, for a request that cannot be read without: of the version that it will run on.

        Where shares say that, it is counted here, and not again when the request that this task has received is run.
        """
        incoming = current_incoming.get()
        if version or incoming is None:
            return self.find_signature(name, version)
        if not permit(name):
            raise self._manager.explain_unknown(name, version)
        servable, is_sampled = self._manager.choose(name, key=incoming.route_key, chosen=incoming.choice)
        incoming.choice = servable.version, is_sampled
        return servable.version, servable.signature

    def find_labelled(self, name: str, label: str) -> int:
        """The version to which the configuration of the model's highest ready version gives ``label``.

        It need not be ready itself. RequestError for a label that is not written there, or if no version is ready.
        """
        try:
            config = self._find(name).config
        except NotFoundError:
            labels: Mapping[str, int] = {}
        else:
            labels = read_labels(config.to_strings())
        if label not in labels:
            raise RequestError(f"Unrecognized servable version label: {label}")
        return labels[label]

    def statistics(self, name: str = "", version: str = "") -> list[ModelStatistics]:
        """Counts since load: of all that is loaded, of all loaded versions of a model, or of one version.

        RequestError for a model or version that is not loaded. Works while the server drains: that can be watched.
        """
        number = parse_version(version)
        servables = self._manager.servables()
        if name:
            if not permit(name) or not self._manager.is_known(name):
                raise RequestError(f"requested model '{name}' is not available")
            servables = [each for each in servables if each.name == name and number in (0, each.version)]
            if not servables:
                raise RequestError(f"requested model version is not available for model '{name}'")
        return [each.statistics() for each in keep_seen(servables)]

    def repository_index(self, ready_only: bool = False) -> list[ModelIndexEntry]:
        """All models that are managed or stored, with state and reason."""
        self.check_running("Server not ready")
        return keep_seen(self._manager.index(ready_only))

    def waiting_versions(self, name: str) -> tuple[int, ...]:
        """The versions of a model that the next request for it would load."""
        return self._manager.waiting_versions(name) if permit(name) else ()

    async def load_model(
        self, name: str, config_json: str | bytes | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Loads or reloads a model; returns when it serves. Raises as LifecycleManager.load."""
        self.check_running("Server not ready")
        if not permit(name):
            self._manager.check_explicit()
            raise BackendError(UNKNOWN_LOAD_TEXT.format(name))
        await self._manager.load(name, config_json, files)

    async def unload_model(self, name: str, unload_dependents: bool = False) -> None:
        """Unloads all versions and returns when they are drained. Raises as LifecycleManager.unload.

        ``unload_dependents``: also the models of an ensemble's steps that were loaded only for it.
        """
        self.check_running("Server not ready")
        if not permit(name):
            self._manager.check_explicit()
            raise UnknownModel(UNKNOWN_UNLOAD_TEXT.format(name))
        await self._manager.unload(name, unload_dependents)

    def trace_setting(self, model: str, changes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Changes how a model (all, for an empty name) is traced, and gives the setting in force.

        Raises as TraceSettings.update, and RequestError for a model that does not serve.
        """
        if not model:
            current_access.get().require_everywhere(Role.ADMIN if changes else Role.VIEWER)
        elif not (permit(model, changes=bool(changes)) and self._manager.is_known(model)) or not self._manager.is_ready(
            model
        ):
            raise RequestError(f"Request for unknown model : {model}")
        setting = self._traces.update(changes, model) if changes else self._traces.get(model)
        return setting.to_strings()

    def log_settings(self, changes: Mapping[str, LogValue | None]) -> dict[str, LogValue]:
        """Changes what is logged, and gives all settings. Raises as LogSettings.update."""
        if self._logs is None:
            raise UnsupportedRequest("the server does not support dynamic logging: its process has set up its own")
        return self._logs.update(changes) if changes else self._logs.values()

    def _find(self, name: str, version: str = "") -> Servable:
        if not permit(name):
            raise self._manager.explain_unknown(name, version)
        return self._manager.find(name, version)

    def check_running(self, text: str) -> None:
        """ServerStopping with ``text`` once the server drains."""
        if self._manager.is_stopping:
            raise ServerStopping(text)


def _describe(spec: TensorSpec, signature: ModelSignature) -> TensorMetadata:
    shape = (-1, *spec.shape) if signature.max_batch_size else spec.shape
    return TensorMetadata(spec.name, spec.datatype.value, shape)
