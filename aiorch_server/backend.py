"""The service-provider interface between the server and a framework.

A backend package registers a ``Backend`` subclass under the entry point group ``aiorch.backends``. The server creates
one ``Backend`` object per framework and process, asks it to ``inspect`` an artefact, and lets it ``load`` one
``ModelInstance`` per place in the instance group. Each instance is driven by one thread of its own.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from aiorch_server.errors import AiorchError
from aiorch_server.types import (
    InferenceRequest,
    InferenceResponse,
    ModelSignature,
    NumpyArray,
    Parameter,
    TensorSpec,
)


@dataclass(frozen=True, slots=True)
class DeclaredSignature:
    """The part of a signature that the model's configuration declares; None where it is silent."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int | None = None


class ModelCall(Protocol):
    """The answers of one call to another model, as they come; iterate it once, in one of the two ways.

    An ordinary model gives one answer. The last one carries ``parameters["triton_final_response"]`` True; it has no
    outputs where a decoupled model ended without a last answer. What the called model raised is raised here. A call
    that is dropped before its end is cancelled.
    """

    def __iter__(self) -> Iterator[InferenceResponse]:
        """Blocks the calling thread, never the server's event loop: for threads of instances."""
        ...

    def __aiter__(self) -> AsyncIterator[InferenceResponse]:
        """For coroutines, on whichever event loop they run."""
        ...

    def cancel(self) -> None:
        """The caller wants no more; the called model sees ``is_cancelled``. Any thread, any number of times."""
        ...


class CallModel(Protocol):
    """Calls to other models of this server, from a model's own code; from any thread but the server's event loop."""

    def __call__(self, request: InferenceRequest, *, timeout_s: float | None = None) -> ModelCall:
        """Starts a call; ``timeout_s`` bounds it as a whole (DeadlineExpired). Never blocks; errors come later.

        ``Tensor.data`` may be any contiguous buffer, which must not change before the call has ended.
        """
        ...


class MetricSeries(Protocol):
    """One metric of a model's own: a family's name with one set of labels. Thread-safe."""

    def increment(self, by: float) -> None:
        """Adds; ValueError for a counter that would fall, and for a histogram."""
        ...

    def set(self, to: float) -> None:
        """Sets a gauge; ValueError for the others."""
        ...

    def observe(self, value: float) -> None:
        """Adds a value to a histogram; ValueError for the others."""
        ...

    def value(self) -> float:
        """What a counter or gauge shows now; ValueError for a histogram."""
        ...


class DeclareMetric(Protocol):
    """Makes a metric that ``/metrics`` shows while somebody holds it; equal name and labels share one series."""

    def __call__(
        self, name: str, description: str, kind: str, labels: Mapping[str, str], buckets: Sequence[float] = ()
    ) -> MetricSeries:
        """``kind`` is counter, gauge or histogram; ValueError where names or labels are not Prometheus's, where the
        family exists with another kind, or where there are too many.
        """
        ...


@dataclass(frozen=True, slots=True)
class LoadContext:
    """What a backend is told about the model version it loads.

    ``artefact`` is the version's file or folder (``<model>/<version>/model.onnx``); ``model_directory`` the model's
    folder. ``declared`` is the signature written in the model's configuration: its tensors may be empty (nothing
    written), its ``max_batch_size`` is None if the configuration does not say. ``threads`` is the CPU share of one
    instance, ``device`` is ``"cpu"`` or ``"cuda:<n>"``. ``parameters`` are the configuration's ``parameters`` as
    strings. Pickled artefacts may only be opened where ``allow_code`` is true: they run code when read.
    ``is_requested`` says that the configuration, and perhaps the artefact, came with a load request: unless
    ``allow_code`` is true it must not widen what the artefact may do.
    ``default_max_batch_size`` is what a model that can batch gets when its configuration does not say.
    ``config`` is the whole configuration in protobuf's JSON form with the .proto file's names: for ``inspect`` as it
    was written, for ``load`` as it is served. ``call_model`` and ``declare_metric`` are None where a backend is used
    without a server.
    """

    model_name: str
    model_version: int
    model_directory: Path
    artefact: Path
    declared: DeclaredSignature
    instance_index: int = 0
    threads: int = 1
    device: str = "cpu"
    parameters: Mapping[str, str] = field(default_factory=dict)
    allow_code: bool = False
    is_requested: bool = False
    default_max_batch_size: int = 32
    config: Mapping[str, Any] = field(default_factory=dict)
    call_model: CallModel | None = None
    declare_metric: DeclareMetric | None = None


class ModelInstance(abc.ABC):
    """One loaded copy of a model, used by one thread at a time."""

    @abc.abstractmethod
    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        """Runs one batch and gives all outputs by name.

        Contract: ``inputs`` holds C-contiguous arrays with the signature's dtypes; for a batching model their first
        dimension is the number of rows, the same in all. Absent optional inputs are left out. Arrays are only valid,
        and must not be kept, until the next call; outputs may alias them. Outputs of a batching model have the same
        number of rows. BYTES tensors are ``object`` arrays of ``bytes``, BF16 ``uint16`` bit patterns.
        Any exception fails the batch with INTERNAL, but an ``AiorchError`` keeps its own code.
        """

    @property
    def compiled(self) -> object | None:
        """A capsule of ``include/aiorch_instance.h`` where batches can run without the interpreter, else None.

        Asked once, after warm-up. All inputs and outputs must have types of a fixed item size. A batch that fails there
        is run again through ``execute``, member by member.
        """
        return None

    def close(self) -> None:  # noqa: B027 - most frameworks free with the object
        """Gives back what the instance holds; called once, when no batch runs."""


class ModelRequest(Protocol):
    """One request in a model's hands; it may be kept beyond the batch and answered by any thread of the model's.

    An ordinary model answers each request once, with ``send`` or ``fail``. A decoupled one sends any number of answers
    and ends with ``is_final``, ``finish`` or ``fail``. A request that is dropped before its end fails with INTERNAL.
    ``inputs`` are as in ``ModelInstance.execute``, with the rows of this request alone, and may be kept.
    """

    @property
    def id(self) -> str:
        """As the caller gave it, "" for none."""
        ...

    @property
    def inputs(self) -> Mapping[str, NumpyArray]:
        """By name; optional inputs that the caller left out are missing."""
        ...

    @property
    def requested_outputs(self) -> tuple[str, ...]:
        """The outputs that the caller asks for, all if it named none."""
        ...

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The caller's own parameters, without those that mean something to the server."""
        ...

    @property
    def correlation_id(self) -> int | str:
        """Of the sequence that the request belongs to; 0 or "" for none."""
        ...

    @property
    def is_sequence_start(self) -> bool:
        """Whether it opens its sequence."""
        ...

    @property
    def is_sequence_end(self) -> bool:
        """Whether it closes its sequence."""
        ...

    @property
    def timeout_us(self) -> int:
        """How long the caller was ready to wait in the queue, 0 for no limit of its own."""
        ...

    @property
    def is_ended(self) -> bool:
        """Whether it was answered, ended or failed."""
        ...

    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more; answers are dropped then."""
        ...

    def send(
        self,
        outputs: Mapping[str, NumpyArray],
        parameters: Mapping[str, Parameter] | None = None,
        *,
        is_final: bool = False,
    ) -> None:
        """Sends one answer; outputs that were not asked for are left out, those missing are not sent.

        The arrays are copied before it returns. Of a decoupled model it blocks while the caller is too slow to take
        what was sent before. Does nothing once the caller is gone. Raises ModelExecutionError where an output is not as
        the signature says, or where the request has ended.
        """
        ...

    def send_error(self, error: AiorchError) -> None:
        """One answer of a decoupled model that is an error; the request goes on. Else like ``send``."""
        ...

    def finish(self) -> None:
        """Ends a decoupled request without another answer; ModelExecutionError where it has ended."""
        ...

    def fail(self, error: AiorchError) -> None:
        """Ends the request with an error; ModelExecutionError where it has ended."""
        ...


class RequestInstance(ModelInstance):
    """An instance that takes each batch as its requests. Only such instances can serve decoupled models."""

    @abc.abstractmethod
    def execute_requests(self, requests: Sequence[ModelRequest]) -> None:
        """Runs the requests of one batch, which have the same shapes but for their rows and their ragged inputs.

        When it raises, what it left open fails: an ordinary model's unanswered requests are first run again one by one.
        It must not keep ``requests`` itself, only those it still has to answer.
        """

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        """Not how such an instance runs."""
        raise NotImplementedError(f"{type(self).__name__} takes requests, not batches")


class Backend(abc.ABC):
    """One framework; stateless apart from process-wide settings of that framework."""

    #: The name in ``backend:`` of a model configuration, for example ``"onnxruntime"``.
    name: ClassVar[str]
    #: Names in ``platform:`` that mean this backend, for example ``("onnxruntime_onnx",)``; the first is reported.
    platforms: ClassVar[tuple[str, ...]] = ()
    #: Artefact names looked for in a version folder when the configuration names none, best first.
    artefacts: ClassVar[tuple[str, ...]] = ()
    #: Whether an artefact can run code of its author's choice when it is opened or served. Load requests may bring or
    #: choose such artefacts only where the operator allows code. False is a promise about hostile artefacts.
    runs_code: ClassVar[bool] = True
    #: Names under ``parameters`` of a model's configuration that it reads, beside the server's own; others are an error
    #: at load. None: any, for a backend that hands them to the model.
    parameters: ClassVar[tuple[str, ...] | None] = None

    @abc.abstractmethod
    def inspect(self, context: LoadContext) -> ModelSignature:
        """The signature of the artefact, completed from ``context.declared`` where the format does not hold it.

        Raises ModelLoadError with a text that says what is missing or contradicts the declaration, and where.
        May cache what it opened for the ``load`` that follows.
        """

    @abc.abstractmethod
    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        """Loads one instance that takes and gives exactly ``signature``; raises ModelLoadError."""
