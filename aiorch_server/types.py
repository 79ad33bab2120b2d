"""Values that cross layers: datatypes, tensor specifications, neutral requests and responses."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

Parameter = bool | int | float | str
#: The parameter that says of an answer in a stream whether it is the last for its request.
FINAL_RESPONSE: Final = "triton_final_response"
NumpyArray = npt.NDArray[np.generic]


class DataType(enum.Enum):
    """Tensor element types of the V2 protocol.

    The value is the protocol's spelling. ``BF16`` travels through numpy as ``uint16`` bit patterns, because numpy
    has no such type; ``BYTES`` as ``object`` arrays of ``bytes``.
    Numbers: ``DataType`` of model_config.proto (BOOL 1 ... STRING 13, BF16 14).
    """

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    FP32 = "FP32"
    FP64 = "FP64"
    BYTES = "BYTES"
    BF16 = "BF16"

    @property
    def number(self) -> int:
        """The protobuf enum number in model_config.proto."""
        return _NUMBERS[self]

    @property
    def config_name(self) -> str:
        """The spelling in model configurations, for example ``TYPE_FP32`` or ``TYPE_STRING``."""
        return "TYPE_STRING" if self is DataType.BYTES else f"TYPE_{self.value}"

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """The numpy dtype that carries this type in memory."""
        return _NUMPY[self]

    @property
    def itemsize(self) -> int:
        """Bytes per element on the wire; 0 for BYTES, whose elements have their own lengths."""
        return 0 if self is DataType.BYTES else _NUMPY[self].itemsize

    @classmethod
    def from_config_name(cls, name: str) -> DataType:
        """The type for a configuration spelling such as ``TYPE_FP32``; KeyError if there is none."""
        return _BY_CONFIG_NAME[name]

    @classmethod
    def from_numpy(cls, dtype: npt.DTypeLike) -> DataType:
        """The type that carries ``dtype``; strings and objects are BYTES. TypeError if there is none."""
        resolved = np.dtype(dtype)
        if resolved.kind in "OSU":
            return cls.BYTES
        try:
            return _BY_NUMPY[resolved.newbyteorder("=")]
        except KeyError:
            raise TypeError(f"numpy dtype '{resolved}' has no datatype in the V2 protocol") from None


_NUMBERS = {member: number for number, member in enumerate(DataType, start=1)}
_NUMPY: dict[DataType, np.dtype[np.generic]] = {
    DataType.BOOL: np.dtype(np.bool_),
    DataType.UINT8: np.dtype(np.uint8),
    DataType.UINT16: np.dtype(np.uint16),
    DataType.UINT32: np.dtype(np.uint32),
    DataType.UINT64: np.dtype(np.uint64),
    DataType.INT8: np.dtype(np.int8),
    DataType.INT16: np.dtype(np.int16),
    DataType.INT32: np.dtype(np.int32),
    DataType.INT64: np.dtype(np.int64),
    DataType.FP16: np.dtype(np.float16),
    DataType.FP32: np.dtype(np.float32),
    DataType.FP64: np.dtype(np.float64),
    DataType.BYTES: np.dtype(np.object_),
    DataType.BF16: np.dtype(np.uint16),
}
_BY_CONFIG_NAME = {member.config_name: member for member in DataType}
_BY_NUMPY = {dtype: member for member, dtype in _NUMPY.items() if member is not DataType.BF16}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    ``shape`` leaves out the batch dimension of a batching model; -1 stands for any size. ``optional`` is for inputs,
    and so is ``is_ragged``: requests whose sizes differ there may run in one batch.
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    optional: bool = False
    labels: tuple[str, ...] = ()
    is_ragged: bool = False


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """What a loaded model version takes and gives.

    ``max_batch_size`` 0 means that the model has no batch dimension: each request is run alone, shapes are whole.
    ``is_decoupled``: a request has any number of answers, at any time.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0
    is_decoupled: bool = False


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor as raw little-endian row-major bytes (V2's raw form; BYTES elements carry 4-byte LE lengths).

    ``data`` is None where a request names a tensor without bringing its bytes. The holder keeps ``data`` alive.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview | None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that the caller asks for, with its parameters (for example ``classification``)."""

    name: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SequencePlace:
    """Where a request stands in its sequence; ``correlation_id`` 0 or empty says that it belongs to none."""

    correlation_id: int | str = 0
    is_start: bool = False
    is_end: bool = False


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A request as any door hands it to the data plane. ``outputs`` empty means all outputs.

    ``sequence`` None: the ``parameters`` say it (sequence_id, sequence_start, sequence_end), see validation.
    """

    model_name: str
    model_version: str
    inputs: Sequence[Tensor]
    outputs: Sequence[RequestedOutput] = ()
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    sequence: SequencePlace | None = None


@dataclass(frozen=True, slots=True)
class InferenceResponse:
    """An answer as the data plane hands it to any door; every output carries its bytes.

    ``error`` is for the answers of a decoupled model that are errors and after which it goes on; they have no outputs.
    """

    model_name: str
    model_version: str
    outputs: Sequence[Tensor]
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    error: Exception | None = None


class ModelState(enum.Enum):
    """States of a model version as RepositoryIndex spells them."""

    UNKNOWN = "UNKNOWN"
    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"
    LOADING = "LOADING"
    UNLOADING = "UNLOADING"


@dataclass(frozen=True, slots=True)
class ModelIndexEntry:
    """One row of RepositoryIndex; ``version`` is empty for a model of which no version was ever loaded."""

    name: str
    version: str
    state: ModelState
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    """Answer of ServerMetadata; ``extensions`` lists exactly the protocol extensions that work."""

    name: str
    version: str
    extensions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """A tensor as ModelMetadata shows it: ``shape`` is whole, -1 first where the model batches."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """Answer of ModelMetadata; ``versions`` are those that are ready."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


@dataclass(frozen=True, slots=True)
class Duration:
    """How often something happened and how long it took in all, in nanoseconds."""

    count: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Executions of one batch size (rows): compute phases counted per execution."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


@dataclass(frozen=True, slots=True)
class ResponseStatistics:
    """The answers that a decoupled model sent at one place of their streams: how many, and how long they took.

    ``success`` is ``compute_infer`` (since the answer before) and ``compute_output`` together; ``empty_response`` are
    ends without an answer, ``cancel`` answers that nobody waited for.
    """

    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()
    success: Duration = Duration()
    fail: Duration = Duration()
    empty_response: Duration = Duration()
    cancel: Duration = Duration()


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What a cache holds now, and how many entries it gave up for room or age, since it was made; None: not known.

    ``failures`` are look-ups and insertions that went wrong, None for a cache that has none.
    """

    entries: int | None = None
    used_bytes: int | None = None
    evictions: int | None = None
    failures: int | None = None


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """Counts since load of one model version, as the statistics extension of the V2 protocol defines them.

    ``inference_count`` counts rows, ``success.count`` requests, ``execution_count`` batches; ``last_inference_ms`` is
    milliseconds since the epoch, 0 for never. ``pending`` is the number of requests queued now. ``responses`` are those
    of a decoupled model, by their place in the stream ("0" is the first); ``first_response`` says how long the first
    ones took, ``stalled`` how many streams were ended because nobody took their answers. ``cache_hit`` counts requests
    answered without a run (look-up, or the wait for an equal one), ``cache_miss`` those run and kept.

    ``failures`` splits ``fail.count`` by reason. BACKEND: the model had the request and failed it, with whatever code,
    or died with it: these are the version's own faults. REJECTED: nobody took it, for the queue was full, its time was
    over or no instance was left: the version is too slow, or gone; ``refused_late`` and ``dropped_late`` are those of
    them that could not have been answered in time, at the door and after waiting. CANCELED: its caller left. OTHER: a
    step of an ensemble refused it. What does not fit the signature never comes to a version and is in none of these.
    """

    name: str
    version: str
    last_inference_ms: int = 0
    inference_count: int = 0
    execution_count: int = 0
    success: Duration = Duration()
    fail: Duration = Duration()
    queue: Duration = Duration()
    compute_input: Duration = Duration()
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()
    batches: tuple[BatchStatistics, ...] = ()
    failures: Mapping[str, int] = field(default_factory=dict)
    pending: int = 0
    responses: Mapping[str, ResponseStatistics] = field(default_factory=dict)
    first_response: PhaseHistogram | None = None
    stalled: int = 0
    has_cache: bool = False
    cache_hit: Duration = Duration()
    cache_miss: Duration = Duration()
    refused_late: int = 0
    dropped_late: int = 0


@dataclass(frozen=True, slots=True)
class PhaseHistogram:
    """A histogram that can be added up over machines: ``counts[i]`` values lie below ``bounds_s[i]`` and not below the
    bound before; the last count, for which there is no bound, holds the rest. Seconds.
    """

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]
    sum_s: float


@dataclass(frozen=True, slots=True)
class SchedulerCounters:
    """Everything one scheduler has counted since it was made; durations are sums in nanoseconds.

    A request that succeeded adds to ``success`` and to each phase; phases count requests, ``batch_sizes`` executions
    by their number of rows. ``queue`` includes the time that a free instance waited for company (``batch_wait``).
    ``phases`` has the keys queue, batch_wait, compute_input, infer, compute_output, total, and wait, which is the
    first two together. ``refused_late`` and ``dropped_late``: of those rejected, which could not have been answered in
    time, at the door and after waiting.
    """

    rows: int
    executions: int
    success: Duration
    fail: Duration
    failures: Mapping[str, int]
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    batch_sizes: tuple[BatchStatistics, ...]
    last_inference_ms: int
    pending: int
    in_flight: int
    phases: Mapping[str, PhaseHistogram]
    refused_late: int = 0
    dropped_late: int = 0


@dataclass(frozen=True, slots=True)
class BatchingPolicy:
    """How a scheduler batches now; ``Scheduler.set_policy`` says what each field means.

    ``curve`` has pairs (rows, ns), ascending: how long an instance is busy with a batch; empty where nobody knows.
    """

    max_rows: int
    delay_us: int
    target_us: int
    margin_us: int
    is_deferring: bool
    is_shedding: bool
    instances: int
    curve: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class RunObservation:
    """All runs of one batch size: how many, and how long an instance was busy, from taking the batch to being free.

    ``busy_squares`` is the sum of the squares of these times, in ns squared. Failed runs are left out. ``times`` has
    the runs by the upper bound of their time in ns, eight bounds to the power of two and counts modulo 2**32; empty for
    batches of more than 64 rows.
    """

    rows: int
    executions: int
    busy_ns: int
    busy_squares: float
    times: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SchedulerObservation:
    """What a tuner needs to know of one scheduler, all at one moment; counts since it was made.

    ``arrivals`` = ``answered`` + ``failed`` + ``refused_full`` + ``refused_late`` + ``dropped_late`` + ``waiting`` +
    ``running``, at any time. Refused at the door: ``refused_full`` for the queue's bounds, ``refused_late`` because an
    answer could not have been in time; ``dropped_late``: the same after waiting. ``failed`` has all others without an
    answer. ``in_time`` and ``late`` divide what was answered while there was a target. Gaps lie between arrivals that
    follow each other; slots are the 10 ms between the first and the last arrival, with ``slot_squares`` the sum of the
    squares of their arrivals. ``instances``: those that wait for work or run now.
    """

    at_ns: int
    arrivals: int
    arrived_rows: int
    answered: int
    answered_rows: int
    failed: int
    refused_full: int
    refused_late: int
    dropped_late: int
    in_time: int
    late: int
    waiting: int
    waiting_rows: int
    running: int
    instances: int
    busy_instances: int
    gaps_ns: int
    gap_squares: float
    slots: int
    slot_squares: float
    runs: tuple[RunObservation, ...]
    durations: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class QuotaCounters:
    """What one tenant's quota has counted since it was made; ``in_flight`` is now."""

    admitted: int
    refused_requests: int
    refused_rows: int
    refused_in_flight: int
    in_flight: int


@dataclass(slots=True)
class PhaseStamps:
    """When one request passed the doorways, on the monotonic clock in nanoseconds; 0: it did not.

    ``free_ns``: an instance was free. ``batch_rows`` and ``batch_members`` are of the batch that it ran in.
    """

    received_ns: int = 0
    enqueued_ns: int = 0
    free_ns: int = 0
    taken_ns: int = 0
    gather_ns: int = 0
    run_ns: int = 0
    run_ended_ns: int = 0
    settled_ns: int = 0
    batch_rows: int = 0
    batch_members: int = 0

    def phases_us(self) -> dict[str, float]:
        """How long each phase took, in microseconds; without those that it did not come to."""
        bounds = {
            "queue": (self.enqueued_ns, self.free_ns or self.settled_ns),
            "batch_wait": (self.free_ns, self.taken_ns),
            "compute_input": (self.gather_ns, self.run_ns),
            "infer": (self.run_ns, self.run_ended_ns),
            "compute_output": (self.run_ended_ns, self.settled_ns if self.run_ended_ns else 0),
            "total": (self.received_ns, self.settled_ns),
        }
        return {phase: (end - start) / 1e3 for phase, (start, end) in bounds.items() if start and end}


@dataclass(frozen=True, slots=True)
class SlowRequest:
    """A request that took longer than the scheduler was told to note.

    ``status`` is gRPC's code, the ids of trace and span are hexadecimal or empty.
    """

    id: str
    trace_id: str
    span_id: str
    status: int
    stamps: PhaseStamps
