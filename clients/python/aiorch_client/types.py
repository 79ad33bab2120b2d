"""Values that the SDK takes and gives; none of them holds a connection or a protobuf message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy.typing as npt

from aiorch_client.datatypes import Array

Parameter = bool | int | float | str
#: Inputs by name, or one array alone where the model has one input.
Inputs = Mapping[str, npt.ArrayLike] | npt.ArrayLike


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One inference: what ``Client.infer`` takes as arguments and ``Client.stream`` takes many of.

    ``version`` "" leaves the choice to the server, ``outputs`` None asks for all of them.
    """

    model: str
    inputs: Inputs
    version: str = ""
    outputs: Sequence[str] | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class InferResult:
    """An answer. ``outputs`` are whole arrays by name, read-only views on the received bytes: copy before writing.

    BYTES arrive as object arrays of ``bytes``, BF16 as float32. ``model_version`` is the version that answered.
    """

    model_name: str
    model_version: str
    outputs: Mapping[str, Array]
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Array:
        """The output ``name``; KeyError that names those there are."""
        try:
            return self.outputs[name]
        except KeyError:
            raise KeyError(f"no output '{name}'; the answer holds {', '.join(self.outputs) or 'none'}") from None


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    """Name, version and protocol extensions of a server."""

    name: str
    version: str
    extensions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """An input or output: ``shape`` is whole (batch dimension first where the model batches), -1 means any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a model takes and gives; ``versions`` are those that are ready."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


@dataclass(frozen=True, slots=True)
class ModelIndexEntry:
    """One model version in the server's repositories; ``state`` is READY, LOADING, UNLOADING or UNAVAILABLE."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Duration:
    """How often something happened and how long it took in all, in nanoseconds."""

    count: int = 0
    ns: int = 0

    @property
    def mean_ms(self) -> float:
        """Mean milliseconds, 0 where it never happened."""
        return self.ns / self.count / 1e6 if self.count else 0.0


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Executions of one batch size in rows."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """Counts of one model version since it was loaded.

    ``inference_count`` counts rows, ``success.count`` requests, ``execution_count`` batches; ``last_inference_ms`` is
    milliseconds since the epoch, 0 for never.
    """

    name: str
    version: str
    last_inference_ms: int
    inference_count: int
    execution_count: int
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    batches: tuple[BatchStatistics, ...] = ()

    @property
    def mean_batch(self) -> float:
        """Mean rows per execution, 0 where nothing ran."""
        return self.inference_count / self.execution_count if self.execution_count else 0.0
