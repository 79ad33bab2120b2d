"""A loaded model version, and the lease that keeps it alive while somebody uses it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from aiorch_server._core import ModelSpec, Scheduler
from aiorch_server.cache import VersionCache
from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import Code, ModelNotReady
from aiorch_server.execution.response_counts import ResponseCounts
from aiorch_server.lifecycle.memory import Holding
from aiorch_server.lifecycle.threads import wait_until
from aiorch_server.types import ModelSignature, ModelStatistics, PhaseHistogram, SchedulerCounters

if TYPE_CHECKING:
    from aiorch_server.scheduling.ensemble import EnsembleScheduler
    from aiorch_server.scheduling.sequence import SequenceScheduler


class RequestQueue(Protocol):
    """What a servable needs of whatever takes its requests."""

    @property
    def in_flight(self) -> int:
        """Requests that are queued or running."""
        ...

    def close(self) -> None:
        """No new requests; what is there is still served."""
        ...

    def counters(self) -> SchedulerCounters:
        """Counts since load."""
        ...

    def durations(self) -> Mapping[int, int]:
        """How many answered requests took how long since load; see Scheduler.durations."""
        ...


class Instances(Protocol):
    """What a servable needs of whatever runs its requests; ``ended`` is resolved when all is over."""

    ended: Future[str]
    responses: ResponseCounts

    @property
    def alive(self) -> int:
        """Instances that serve."""
        ...

    def abandon(self, code: int, text: str) -> None:
        """Closes, and fails what waits with that code and text."""
        ...


class Servable:
    """One version of a model that is loaded: its scheduler and the instances that pull from it.

    An ensemble has neither: ``ensemble`` runs it, and stands for both. Owned by the LifecycleManager. Others hold it
    through a ``ServableHandle`` and give it back soon; may be leased from any thread.
    """

    def __init__(
        self,
        name: str,
        version: int,
        *,
        config: ModelConfig,
        signature: ModelSignature,
        platform: str,
        spec: ModelSpec,
        scheduler: RequestQueue,
        instances: Instances,
        sequencer: SequenceScheduler | None = None,
        fingerprint: str = "",
        load_seconds: float = 0.0,
        ensemble: EnsembleScheduler | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self.config = config
        self.signature = signature
        self.platform = platform
        self.spec = spec
        self.scheduler = scheduler
        self.instances = instances
        self.sequencer = sequencer
        self.ensemble = ensemble
        #: Set before it is published, where its answers are cached.
        self.cache: VersionCache | None = None
        self.fingerprint = fingerprint
        #: What tells it from other models of its name and configuration, elsewhere and at other times too if need be.
        self.identity = fingerprint
        self.load_seconds = load_seconds
        #: What it has of the devices' memory; None for ensembles, which take none.
        self.memory: Holding | None = None
        #: When it was loaded: on the monotonic clock in seconds, and on that of statistics.
        self.loaded_at = time.monotonic()
        self.loaded_ms = time.time_ns() // 1_000_000
        self._lock = threading.Lock()
        self._leases = 0
        self._is_open = True
        self._idle: Future[str] = Future()  # resolved when it is closed to new leases and the last one came back
        self._idle.set_running_or_notify_cancel()

    def __repr__(self) -> str:
        return f"<Servable {self.name}:{self.version} leases={self._leases} in_flight={self.scheduler.in_flight}>"

    @property
    def is_open(self) -> bool:
        """Whether new leases are given."""
        return self._is_open

    @property
    def plain_scheduler(self) -> Scheduler | None:
        """The queue that takes requests as they are; None where they must be prepared on the control plane first."""
        return self.scheduler if isinstance(self.scheduler, Scheduler) else None

    @property
    def is_plain(self) -> bool:
        """Whether each request goes through ``plain_scheduler``: none is answered from a cache."""
        return self.plain_scheduler is not None and self.cache is None

    @property
    def leases(self) -> int:
        """Handles that are held now."""
        return self._leases

    @property
    def pending(self) -> int:
        """Requests that are queued or running, and leases that may still bring one."""
        return self.scheduler.in_flight + self._leases

    @property
    def is_idle(self) -> bool:
        """Whether nobody uses it: no request, no lease, no sequence under way."""
        return not self.pending and not self.has_sequences

    @property
    def has_sequences(self) -> bool:
        """Whether a sequence is under way."""
        return self.sequencer is not None and bool(self.sequencer.live or self.sequencer.backlog)

    def acquire(self) -> ServableHandle:
        """A new lease; ModelNotReady once the servable drains."""
        with self._lock:
            if not self._is_open:
                raise ModelNotReady(
                    f"Request for unknown model: '{self.name}' version {self.version} is not at ready state"
                )
            self._leases += 1
        return ServableHandle(self)

    def release(self) -> None:
        """Takes one lease back; only for ServableHandle."""
        with self._lock:
            self._leases -= 1
            is_idle = self._leases == 0 and not self._is_open
        if is_idle:
            self._idle.set_result("")

    async def drain(self, grace_s: float, refusal: str) -> bool:
        """Gives no new leases, waits for those given, then for all requests, then for the instances to end.

        What is still queued after ``grace_s`` is failed with UNAVAILABLE and the text ``refusal``. Gives True if all
        ended in time. May be called again, with another grace, while a first call waits; may be cancelled.
        """
        deadline = time.monotonic() + grace_s
        self._shut()
        if self.sequencer is not None:
            self.sequencer.close()
        # Leases first: who holds one may still put a request into the queue, which has to be open for it.
        is_idle = await wait_until(self._idle, grace_s)
        self.scheduler.close()
        is_ended = await wait_until(self.instances.ended, max(0.0, deadline - time.monotonic()))
        if not is_ended:
            self.instances.abandon(Code.UNAVAILABLE, refusal)
        return is_idle and is_ended

    def abandon(self, refusal: str) -> None:
        """Closes at once and fails what is queued; running batches end by themselves."""
        self._shut()
        self.instances.abandon(Code.UNAVAILABLE, refusal)

    def _shut(self) -> None:
        with self._lock:
            was_open, self._is_open = self._is_open, False
            is_idle = was_open and self._leases == 0
        if is_idle:
            self._idle.set_result("")

    def statistics(self) -> ModelStatistics:
        """Counts since load, from the scheduler's counters."""
        counters = self.scheduler.counters()
        if self.sequencer is not None:
            counters = self.sequencer.count(counters)
        statistics = ModelStatistics(
            name=self.name,
            version=str(self.version),
            last_inference_ms=counters.last_inference_ms,
            inference_count=counters.rows,
            execution_count=counters.executions,
            success=counters.success,
            fail=counters.fail,
            queue=counters.queue,
            compute_input=counters.compute_input,
            compute_infer=counters.compute_infer,
            compute_output=counters.compute_output,
            batches=counters.batch_sizes,
            failures=counters.failures,
            pending=counters.pending,
            refused_late=counters.refused_late,
            dropped_late=counters.dropped_late,
            responses=self.instances.responses.read() if self.signature.is_decoupled else {},
            first_response=self.instances.responses.read_first() if self.signature.is_decoupled else None,
            stalled=self.instances.responses.stalled,
        )
        return statistics if self.cache is None else self.cache.add_to(statistics)

    def phase_histograms(self) -> Mapping[str, PhaseHistogram]:
        """How long requests spent in each phase since load; keys as in SchedulerCounters.phases."""
        return self.scheduler.counters().phases


class ServableHandle:
    """A lease on a servable: while it is held, an unload waits. Use it as a context manager."""

    __slots__ = ("_is_held", "servable")

    def __init__(self, servable: Servable) -> None:
        self.servable = servable
        self._is_held = True

    def release(self) -> None:
        """Gives the lease back; a second call does nothing."""
        if self._is_held:
            self._is_held = False
            self.servable.release()

    def __enter__(self) -> Servable:
        return self.servable

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
