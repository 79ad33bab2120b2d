"""Sections of a model configuration about versions, instances, optimisation and the smaller switches."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping

from pydantic import Field, model_validator

from aiorch_server.config.problems import Problem, raise_problems
from aiorch_server.config.section import Flag, Int32, Int64, Number, Section, UInt32, Version

MOST_INSTANCES = 1024


class LatestVersions(Section):
    """The highest ``num_versions`` versions."""

    num_versions: UInt32 = Field(default=1, ge=1)


class AllVersions(Section):
    """Every version that is there."""


class SpecificVersions(Section):
    """Exactly these versions."""

    versions: tuple[Version, ...] = Field(min_length=1)


class VersionPolicy(Section):
    """Which versions are served; exactly one choice is written."""

    latest: LatestVersions | None = None
    all: AllVersions | None = None
    specific: SpecificVersions | None = None

    @model_validator(mode="after")
    def _check(self) -> VersionPolicy:
        written = [name for name in ("latest", "all", "specific") if getattr(self, name) is not None]
        if len(written) != 1:
            found = " and ".join(written) or "nothing"
            raise_problems([Problem((), f"found {found}; exactly one of latest, all, specific must be written")])
        return self


class InstanceKind(enum.StrEnum):
    """Where instances run; AUTO means the CPU unless the group names GPUs."""

    KIND_AUTO = "KIND_AUTO"
    KIND_GPU = "KIND_GPU"
    KIND_CPU = "KIND_CPU"
    KIND_MODEL = "KIND_MODEL"


class RateLimiterResource(Section):
    """A resource that an instance holds while it runs."""

    name: str = Field(min_length=1)
    # The key is `global`, which Python reserves.
    is_global: Flag = Field(default=False, alias="global")
    count: UInt32 = 0


class RateLimiter(Section):
    """Resources and priority of an instance group."""

    resources: tuple[RateLimiterResource, ...] = ()
    priority: UInt32 = 0


class SecondaryDeviceKind(enum.StrEnum):
    """Devices beside the main one."""

    KIND_NVDLA = "KIND_NVDLA"


class SecondaryDevice(Section):
    """A device beside the main one."""

    kind: SecondaryDeviceKind = SecondaryDeviceKind.KIND_NVDLA
    device_id: Int64 = 0


class InstanceGroup(Section):
    """``count`` instances of one kind; with ``gpus``, ``count`` on each of them.

    KIND_GPU without ``gpus`` means the first one (Triton: all); the served configuration says so.
    """

    name: str = ""
    kind: InstanceKind = InstanceKind.KIND_AUTO
    count: Int32 = Field(default=1, ge=1, le=MOST_INSTANCES)
    rate_limiter: RateLimiter | None = None
    gpus: tuple[Int32, ...] = ()
    secondary_devices: tuple[SecondaryDevice, ...] = ()
    profile: tuple[str, ...] = ()
    passive: Flag = False
    host_policy: str = ""

    @model_validator(mode="after")
    def _check(self) -> InstanceGroup:
        raise_problems(self._find_problems())
        return self

    def _find_problems(self) -> Iterator[Problem]:
        if self.gpus and self.kind in (InstanceKind.KIND_CPU, InstanceKind.KIND_MODEL):
            yield Problem(("gpus",), f"found {list(self.gpus)}; {self.kind} takes no gpus")
        if self.rate_limiter is not None and self.rate_limiter.priority and not self.rate_limiter.resources:
            text = (
                f"found {self.rate_limiter.priority}; it orders instances that share a resource, name one in resources"
            )
            yield Problem(("rate_limiter", "priority"), text)
        if any(gpu < 0 for gpu in self.gpus) or len(set(self.gpus)) != len(self.gpus):
            yield Problem(("gpus",), f"found {list(self.gpus)}; each must be a device number >= 0, named once")


class ModelPriority(enum.StrEnum):
    """How urgent a model's work is beside that of others."""

    PRIORITY_DEFAULT = "PRIORITY_DEFAULT"
    PRIORITY_MAX = "PRIORITY_MAX"
    PRIORITY_MIN = "PRIORITY_MIN"


class GraphOptimization(Section):
    """The level of a framework's graph optimisation."""

    level: Int32 = 0


class CudaGraphShape(Section):
    """A shape for a captured graph."""

    dim: tuple[Int64, ...] = ()


class CudaGraphBound(Section):
    """The smallest batch and shapes a captured graph serves."""

    batch_size: Int32 = 0
    input: Mapping[str, CudaGraphShape] = {}


class CudaGraphSpec(Section):
    """A batch size and shapes to capture a graph for."""

    batch_size: Int32 = 0
    input: Mapping[str, CudaGraphShape] = {}
    graph_lower_bound: CudaGraphBound | None = None


class CudaOptimization(Section):
    """Switches for CUDA."""

    graphs: Flag = False
    busy_wait_events: Flag = False
    graph_spec: tuple[CudaGraphSpec, ...] = ()
    output_copy_stream: Flag = False


class Accelerator(Section):
    """An execution accelerator by name."""

    name: str = ""
    parameters: Mapping[str, str] = {}


class ExecutionAccelerators(Section):
    """Accelerators that take over parts of a model."""

    gpu_execution_accelerator: tuple[Accelerator, ...] = ()
    cpu_execution_accelerator: tuple[Accelerator, ...] = ()


class PinnedMemory(Section):
    """Whether page-locked memory is used."""

    enable: Flag = False


class Optimization(Section):
    """Hints about speed that never change an answer."""

    graph: GraphOptimization | None = None
    priority: ModelPriority = ModelPriority.PRIORITY_DEFAULT
    cuda: CudaOptimization | None = None
    execution_accelerators: ExecutionAccelerators | None = None
    input_pinned_memory: PinnedMemory | None = None
    output_pinned_memory: PinnedMemory | None = None
    gather_kernel_buffer_threshold: UInt32 = 0
    eager_batching: Flag = False


class ModelOperations(Section):
    """Libraries with custom operations."""

    op_library_filename: tuple[str, ...] = ()


class TransactionPolicy(Section):
    """Whether a request may have any number of answers."""

    decoupled: Flag = False


class ResponseCache(Section):
    """Whether answers are cached."""

    enable: Flag = False


class RepositoryAgent(Section):
    """An agent that prepares the model's folder."""

    name: str = ""
    parameters: Mapping[str, str] = {}


class RepositoryAgents(Section):
    """Agents, in order."""

    agents: tuple[RepositoryAgent, ...] = ()


class MetricIdentifier(Section):
    """The metric family that a control is about."""

    family: str = ""


class HistogramOptions(Section):
    """Bounds of a histogram's buckets."""

    buckets: tuple[Number, ...] = ()


class MetricControl(Section):
    """Options of one metric family."""

    metric_identifier: MetricIdentifier | None = None
    histogram_options: HistogramOptions | None = None


class ModelMetrics(Section):
    """Options of a model's metrics."""

    metric_control: tuple[MetricControl, ...] = ()
