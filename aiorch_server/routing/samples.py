"""Observers of a sample of the requests: what they get, when they run, and what they may not hold up.

The caller's answer waits for nobody here. Observers run in tasks of their own, so many at a time and with so many bytes
in all; a sample for which there is no room is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol

from aiorch_server.errors import RequestCancelled
from aiorch_server.types import InferenceRequest, InferenceResponse, ModelSignature, Tensor

logger = logging.getLogger(__name__)

MAX_CONCURRENT: Final = 32
MAX_BYTES: Final = 64 << 20
#: How long the observers of one sample may take together.
PATIENCE_S: Final = 30.0
#: Faults of a model's observers that are not worth a line in the log: those so soon after the last.
_QUIET_S: Final = 10.0


class Served(Protocol):
    """What is told of the version that answered."""

    name: str
    version: int
    signature: ModelSignature


@dataclass(frozen=True, slots=True)
class Sample:
    """One request that a version answered, or refused: there is either ``answer`` or ``error``.

    The tensors are copies of its own; they are gone from the books when the observers are done, so keep copies. All
    outputs that were asked for are in the answer, as the model gave them: before classification, and where the client
    had them written into shared memory. ``latency_ns`` is from the choice of the version to the answer. A caller who
    went away leaves RequestCancelled.
    """

    servable: Served
    request: InferenceRequest
    answer: InferenceResponse | None
    error: Exception | None
    latency_ns: int


class Replay(Protocol):
    """Runs a sample's request on a version of its model, at the lowest priority that the version knows."""

    async def __call__(self, request: InferenceRequest, version: int, *, deadline_ns: int = 0) -> InferenceResponse:
        """Raises what ``DataPlane.infer`` raises: ModelNotReady, say, if the version went away."""
        ...


class Observer(Protocol):
    """Somebody who looks at samples: compares, copies, records."""

    async def observe(self, sample: Sample, replay: Replay) -> None:
        """Called for each sample, on the event loop: never block. What it raises is logged and goes no further."""
        ...


@dataclass(slots=True)
class SampleCounts:
    """Of one model, since its observers were first set: samples handed on, and those for which there was no room."""

    taken: int = 0
    dropped: int = 0


class Samples:
    """Hands samples to observers; for the event loop's thread.

    ``max_concurrent`` samples are with their observers at a time, all models together, and hold ``max_bytes``.
    """

    def __init__(
        self,
        replay: Replay,
        *,
        max_concurrent: int = MAX_CONCURRENT,
        max_bytes: int = MAX_BYTES,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._replay = replay
        self._max_concurrent = max_concurrent
        self._max_bytes = max_bytes
        self._patience_s = patience_s
        self._observers: dict[str, tuple[Observer, ...]] = {}
        self._counts: dict[str, SampleCounts] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = 0
        self._held_bytes = 0
        self._quiet_until: dict[str, float] = {}
        self._is_closed = False

    @property
    def held_bytes(self) -> int:
        """Bytes of tensors in samples that are being taken or observed."""
        return self._held_bytes

    def set_sampling(self, model: str, *observers: Observer) -> None:
        """From now on samples of ``model`` go to these, and to nobody else; to nobody, if there are none.

        How large the sample is, ``Traffic.sampled`` says. What an observer has begun, it ends.
        """
        if observers:
            self._observers[model] = observers
            self._counts.setdefault(model, SampleCounts())
        else:
            self._observers.pop(model, None)

    def counts(self) -> dict[str, SampleCounts]:
        """By model."""
        return {model: dataclasses.replace(counts) for model, counts in self._counts.items()}

    def take(self, servable: Served, request: InferenceRequest, since_ns: int) -> Taking | None:
        """A context for the run of a request that is in the sample; None where it is not observed.

        Tensors that others may change are copied here, so not after the answer.
        """
        if servable.name not in self._observers or self._is_closed:
            return None
        size = _count_bytes(request.inputs)
        if self._running >= self._max_concurrent or not self._reserve(size):
            self._counts[servable.name].dropped += 1
            return None
        self._running += 1
        request = dataclasses.replace(request, inputs=[_own(tensor) for tensor in request.inputs])
        return Taking(self, servable, request, since_ns, size)

    def hand_on(self, taking: Taking, answer: InferenceResponse | None, error: Exception | None) -> None:
        """The run is over: its observers get to see it, when the caller has got the answer."""
        latency_ns = time.monotonic_ns() - taking.since_ns
        size = 0 if answer is None else _count_bytes(answer.outputs)
        if self._is_closed or not self._reserve(size):
            self._counts[taking.servable.name].dropped += 1
            self._forget(taking.size)
            return
        self._counts[taking.servable.name].taken += 1
        sample = Sample(taking.servable, taking.request, answer, error, latency_ns)
        # Nothing of the caller's: its trace and its calls are not the observers'.
        task = asyncio.get_running_loop().create_task(self._observe(sample), context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._end(done, taking.size + size))

    async def close(self) -> None:
        """Takes no more samples, and ends the observers."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _observe(self, sample: Sample) -> None:
        model = sample.servable.name
        if sample.answer is not None:
            answer = dataclasses.replace(sample.answer, outputs=[_own(tensor) for tensor in sample.answer.outputs])
            sample = dataclasses.replace(sample, answer=answer)
        try:
            async with asyncio.timeout(self._patience_s):
                for observer in self._observers.get(model, ()):
                    try:
                        await observer.observe(sample, self._replay)
                    except Exception as error:
                        self._tell(model, error)
        except TimeoutError as error:
            self._tell(model, error)

    def _tell(self, model: str, error: Exception) -> None:
        now = time.monotonic()
        if now >= self._quiet_until.get(model, 0.0):
            self._quiet_until[model] = now + _QUIET_S
            logger.warning("an observer of '%s' failed or took more than %g s", model, self._patience_s, exc_info=error)

    def _reserve(self, size: int) -> bool:
        if self._held_bytes + size > self._max_bytes:
            return False
        self._held_bytes += size
        return True

    def _forget(self, size: int) -> None:
        self._running -= 1
        self._held_bytes -= size

    def _end(self, task: asyncio.Task[None], size: int) -> None:
        self._tasks.discard(task)
        self._forget(size)


class Taking:
    """Surrounds the run of one request that is in the sample; ``answer`` is to be set when there is one."""

    __slots__ = ("_samples", "answer", "request", "servable", "since_ns", "size")

    def __init__(self, samples: Samples, servable: Served, request: InferenceRequest, since_ns: int, size: int) -> None:
        self._samples = samples
        self.servable = servable
        self.request = request
        self.since_ns = since_ns
        self.size = size
        self.answer: InferenceResponse | None = None

    def __enter__(self) -> Taking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, asyncio.CancelledError):
            error = RequestCancelled("the caller went away")
        self._samples.hand_on(self, self.answer, error if isinstance(error, Exception) else None)


def _count_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(memoryview(tensor.data).nbytes for tensor in tensors if tensor.data is not None)


def _own(tensor: Tensor) -> Tensor:
    """The tensor with bytes that nobody changes and nobody else's memory."""
    if tensor.data is None or isinstance(tensor.data, bytes):
        return tensor
    return dataclasses.replace(tensor, data=bytes(tensor.data))
