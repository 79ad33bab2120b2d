"""What the REST door needs from the planes behind it, and the limits it keeps."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiorch_server.errors import CapacityError
from aiorch_server.exchange import SharedRegions
from aiorch_server.frontends.rest.connection import Patience
from aiorch_server.observability.log_settings import LogValue
from aiorch_server.types import (
    InferenceRequest,
    InferenceResponse,
    ModelIndexEntry,
    ModelMetadata,
    ModelSignature,
    ModelStatistics,
    ServerMetadata,
)


class InferencePlane(Protocol):
    """The data plane's side: one request in, one answer or one ``AiorchError`` out; cancelling it frees its place."""

    async def infer(self, request: InferenceRequest, *, deadline_ns: int = 0) -> InferenceResponse:
        """Answers ``request``; ``deadline_ns`` is absolute on the monotonic clock, 0 for none."""
        ...

    def stream(self, request: InferenceRequest, *, deadline_ns: int = 0) -> AsyncGenerator[InferenceResponse, None]:
        """The answers to ``request`` as they come; closing it takes the request back."""
        ...


class JsonConfig(Protocol):
    """A model configuration that can be shown as a document."""

    def to_dict(self) -> Mapping[str, Any]:
        """The configuration with Triton's keys, in values that JSON knows."""
        ...


class ManagementPlane(Protocol):
    """The control plane's side; unknown names raise the errors of ``aiorch_server.errors``."""

    @property
    def regions(self) -> SharedRegions:
        """The shared memory that clients have registered."""
        ...

    def server_metadata(self) -> ServerMetadata:
        """Name, version and working extensions of this server."""
        ...

    def is_live(self) -> bool:
        """Whether the process answers at all."""
        ...

    def is_ready(self) -> bool:
        """Whether inference requests can be sent."""
        ...

    def readiness_problems(self) -> Mapping[str, str]:
        """Models that should be ready and are not, with the reason."""
        ...

    def model_ready(self, name: str, version: str) -> bool:
        """Whether that version (empty: any) serves."""
        ...

    async def bring(self, name: str, version: str = "", *, deadline_ns: int = 0) -> None:
        """Loads a model that requests load, so that it is there until something else is awaited."""
        ...

    def model_metadata(self, name: str, version: str) -> ModelMetadata:
        """Inputs, outputs and ready versions."""
        ...

    def model_config(self, name: str, version: str) -> JsonConfig:
        """The completed configuration of a loaded version."""
        ...

    def find_signature(self, name: str, version: str = "") -> tuple[int, ModelSignature]:
        """A version, "" for the default one, and what it takes and gives."""
        ...

    def foresee(self, name: str, version: str = "") -> tuple[int, ModelSignature]:
        """The version that the request at hand will run on, and what it takes and gives."""
        ...

    def find_labelled(self, name: str, label: str) -> int:
        """The version that the model's configuration gives ``label``."""
        ...

    def statistics(self, name: str = "", version: str = "") -> Sequence[ModelStatistics]:
        """Counts since load; all models if ``name`` is empty."""
        ...

    def repository_index(self, ready_only: bool) -> Sequence[ModelIndexEntry]:
        """What the repository holds, and in which state."""
        ...

    def waiting_versions(self, name: str) -> Sequence[int]:
        """The versions of a model that the next request for it would load."""
        ...

    async def load_model(
        self, name: str, config_json: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Loads or reloads a model, perhaps with another configuration or other files."""
        ...

    async def unload_model(self, name: str, unload_dependents: bool = False) -> None:
        """Unloads all versions of a model."""
        ...

    def trace_setting(self, model: str, changes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Changes what is traced of a model, or of all, and gives what is in force."""
        ...

    def log_settings(self, changes: Mapping[str, LogValue | None]) -> dict[str, LogValue]:
        """Changes what is logged, and gives all settings."""
        ...


@dataclass(slots=True)
class HeldBodies:
    """Bytes of request bodies that the door holds, for all connections together; belongs to the loop's thread."""

    limit_bytes: int = 1 << 30
    held_bytes: int = 0

    def take(self, size: int) -> None:
        """Books ``size`` more bytes; CapacityError where that is too much."""
        if self.held_bytes + size > self.limit_bytes:
            raise CapacityError("the server holds as many bytes of request bodies as it may; try again later")
        self.held_bytes += size

    def give(self, size: int) -> None:
        """Gives booked bytes back."""
        self.held_bytes -= size


@dataclass(frozen=True, slots=True)
class RestLimits:
    """Bounds on one request, and with ``bodies`` on what all bodies together take.

    ``max_body_bytes`` holds before and after decompression. ``max_json_bytes`` bounds the JSON part alone: its Python
    objects take up to twenty times the memory of the text, and the interpreter lock is held while they are made; large
    tensors belong into the binary part. ``body_idle_timeout_s`` is how long a body may stand still while it is
    received; after that time it must have come with ``min_body_bytes_per_s`` on average. ``patience`` is about
    everything but bodies.
    """

    max_body_bytes: int = 64 * 1024 * 1024
    max_json_bytes: int = 16 * 1024 * 1024
    body_idle_timeout_s: float = 30.0
    min_body_bytes_per_s: int = 1024
    patience: Patience = field(default_factory=Patience)
    bodies: HeldBodies = field(default_factory=HeldBodies)
