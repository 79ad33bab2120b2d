"""Runs ensembles: each step is a request of its own to its model's queue, begun as soon as its tensors are there.

Tensors are never copied on the way: a step's answer is one piece of memory, and the next request's tensors are views
of it. All methods are for the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Protocol, TypeVar

from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import AiorchError, DeadlineExpired, InternalError, QueueFull, error_from_code
from aiorch_server.execution.response_counts import ResponseCounts
from aiorch_server.execution.taker import Taker
from aiorch_server.scheduling.ensemble_counters import EnsembleCounters
from aiorch_server.scheduling.ensemble_graph import EnsembleGraph, ModelKey, Stage, Step
from aiorch_server.scheduling.ensemble_run import Held, Run
from aiorch_server.scheduling.ensemble_stream import EnsembleStream
from aiorch_server.types import FINAL_RESPONSE, InferenceRequest, InferenceResponse, ModelSignature, SchedulerCounters
from aiorch_server.validation import find_correlation_id

#: What a queue of the core holds where nothing else is configured.
DEFAULT_MAX_REQUESTS = 16384


T = TypeVar("T")


class StepServable(Protocol):
    """What an ensemble needs to know of a model that serves."""

    @property
    def signature(self) -> ModelSignature:
        """What it takes and gives."""
        ...

    @property
    def ensemble(self) -> EnsembleScheduler | None:
        """Set where it is an ensemble itself."""
        ...


class StepHost(Protocol[Held]):
    """Who runs requests: the data plane."""

    def acquire(self, name: str, version: str, correlation_id: int | str) -> contextlib.AbstractContextManager[Held]:
        """A lease on a model that is ready, for a step of a request of that sequence (0: none)."""
        ...

    async def infer_on(
        self,
        servable: Held,
        request: InferenceRequest,
        *,
        deadline_ns: int = 0,
        leases: Mapping[ModelKey, Held] | None = None,
    ) -> InferenceResponse:
        """Runs one request on a servable that is held, with ``leases`` on everything that its steps need."""
        ...

    def stream_on(
        self,
        servable: Held,
        request: InferenceRequest,
        taker: Taker,
        *,
        deadline_ns: int = 0,
        leases: Mapping[ModelKey, Held] | None = None,
    ) -> AsyncGenerator[InferenceResponse, None]:
        """The same for a decoupled one, for ``taker``; a last answer that is none is left out."""
        ...


class EnsembleScheduler:
    """One version of an ensemble: takes requests as a scheduler does, but has neither queue nor instances.

    ``max_requests`` (0: the bound of a queue) bounds those under way; each step's ``max_inflight_requests`` is shared
    by all of them. ``decoupled`` are those of its models that are: if there are any, so is the ensemble.
    """

    def __init__(
        self,
        name: str,
        version: int,
        config: ModelConfig,
        signature: ModelSignature,
        max_requests: int,
        decoupled: Collection[ModelKey] = (),
    ) -> None:
        assert config.ensemble_scheduling is not None
        self.name = name
        self.graph = EnsembleGraph(config, decoupled)
        self.ended: Future[str] = Future()  # resolved when it is closed and nothing is under way
        self.ended.set_running_or_notify_cancel()
        self._version = str(version)
        self._signature = signature
        self._max_requests = max_requests or DEFAULT_MAX_REQUESTS
        self._counters = EnsembleCounters()
        self.responses = ResponseCounts()
        self._requests: dict[asyncio.Task[object], int] = {}
        self._abandoned: set[asyncio.Task[object]] = set()
        self._refusal: AiorchError = InternalError("never abandoned")
        self._is_closed = False
        self._in_flight = 0
        limit = self._max_inflight = config.ensemble_scheduling.max_inflight_requests
        self._places = [asyncio.Semaphore(limit) if limit else None for _ in self.graph.steps]

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return self._in_flight

    @property
    def pending(self) -> int:
        """Requests that wait in a queue of the ensemble's own: never any."""
        return 0

    @property
    def alive(self) -> int:
        """Instances of its own: none, its steps have theirs."""
        return 0

    def counters(self) -> SchedulerCounters:
        """Counts since load, in the form of the core's schedulers."""
        return self._counters.read(self._in_flight)

    def durations(self) -> Mapping[int, int]:
        """As Scheduler.durations."""
        return self._counters.durations()

    def close(self) -> None:
        """Nothing new comes any more; what is under way is finished."""
        self._is_closed = True
        self._maybe_end()

    def abandon(self, code: int, text: str) -> None:
        """Closes, and fails what is under way with that code and text."""
        self._refusal = error_from_code(code, text)
        for task in self._requests:
            self._abandoned.add(task)
            task.cancel()
        self.close()

    def _maybe_end(self) -> None:
        if self._is_closed and self._in_flight == 0 and not self.ended.done():
            self.ended.set_result("")

    async def run(
        self,
        request: InferenceRequest,
        host: StepHost[Held],
        *,
        deadline_ns: int = 0,
        leases: Mapping[ModelKey, Held] | None = None,
    ) -> InferenceResponse:
        """Runs the steps that ``request``, which must fit the signature, needs; the caller holds a lease.

        Raises what a step raises, with the ensemble and the step named, QueueFull above ``max_requests``, or
        DeadlineExpired. When cancelled, or when a step fails, the steps under way are cancelled and nothing is begun.
        """

        async def work(run: Run[Held]) -> InferenceResponse:
            await self.run_steps(run, run.plan.stages[0], host)
            return self.make_answer(run)

        return await self._conduct(request, host, deadline_ns, leases, work)

    async def stream(
        self,
        request: InferenceRequest,
        host: StepHost[Held],
        taker: Taker,
        *,
        deadline_ns: int = 0,
        leases: Mapping[ModelKey, Held] | None = None,
        context: contextvars.Context | None = None,
    ) -> AsyncGenerator[InferenceResponse, None]:
        """The answers of an ensemble with decoupled steps, as ``run`` otherwise; the next one waits to be asked for.

        What fails behind a decoupled step is the error of that one answer. Raises StreamStalled too. Its steps run in
        ``context``.
        """
        stream = EnsembleStream(self, host, taker, self._max_inflight)

        # A task of its own: whoever takes answers may do so on several.
        conducting = asyncio.create_task(
            self._conduct(request, host, deadline_ns, leases, stream.conduct), context=context
        )
        conducting.add_done_callback(lambda _: stream.close())
        is_over = False
        try:
            async with contextlib.aclosing(stream.follow()) as answers:
                async for answer in answers:
                    is_over = bool(answer.parameters.get(FINAL_RESPONSE))
                    yield answer
            if is_over:  # whatever comes to pass now, nothing may follow the last answer
                await asyncio.wait((conducting,))
            else:
                await conducting
        finally:
            conducting.cancel()
            await asyncio.gather(conducting, return_exceptions=True)

    async def _conduct(
        self,
        request: InferenceRequest,
        host: StepHost[Held],
        deadline_ns: int,
        leases: Mapping[ModelKey, Held] | None,
        work: Callable[[Run[Held]], Awaitable[T]],
    ) -> T:
        """Does ``work`` for one request: counted, bounded, with leases on what it needs.

        Ends with DeadlineExpired at the deadline and with the refusal when the ensemble is abandoned.
        """
        if self._in_flight >= self._max_requests:
            raise QueueFull("Exceeds maximum queue size")
        started_ns = time.monotonic_ns()
        task = asyncio.current_task()
        assert task is not None
        n_asked = task.cancelling()
        self._requests[task] = self._requests.get(task, 0) + 1
        self._in_flight += 1
        try:
            with contextlib.ExitStack() as stack:
                if leases is None:
                    leases = self._lease(host, stack, find_correlation_id(request))
                plan = self.graph.plan([output.name for output in request.outputs])
                rows = request.inputs[0].shape[0] if self._signature.max_batch_size else 0
                run = Run(request, plan, rows, deadline_ns, leases)
                run.bring(self._signature)
                if not deadline_ns:
                    result = await work(run)
                else:
                    async with asyncio.timeout_at(deadline_ns / 1e9):
                        result = await work(run)
        except BaseException as error:
            reason = self._find_reason(error, task, n_asked)
            self._counters.count_failure(reason, time.monotonic_ns() - started_ns)
            if reason is error:
                raise
            raise reason from None
        finally:
            self._abandoned.discard(task)
            self._requests[task] -= 1
            if not self._requests[task]:
                del self._requests[task]
            self._in_flight -= 1
            self._maybe_end()
        self._counters.count_success(rows or 1, run.waited_ns, time.monotonic_ns() - started_ns)
        return result

    def _find_reason(self, error: BaseException, task: asyncio.Task[object], n_asked: int) -> BaseException:
        """What ended a request in truth; ``n_asked``: how often its task was to be cancelled when it came."""
        if isinstance(error, TimeoutError):
            return DeadlineExpired("Deadline Exceeded")
        # uncancel: unless somebody else wishes it too
        if isinstance(error, asyncio.CancelledError) and task in self._abandoned and task.uncancel() <= n_asked:
            return self._refusal
        return error

    def _lease(
        self, host: StepHost[Held], stack: contextlib.ExitStack, correlation_id: int | str
    ) -> Mapping[ModelKey, Held]:
        """All models that may be needed, those of ensembles among the steps included: held before the first step."""
        leases: dict[ModelKey, Held] = {}
        open_keys = list(self.graph.models)
        while open_keys:
            key = open_keys.pop()
            if key in leases:
                continue
            try:
                leases[key] = servable = stack.enter_context(host.acquire(*key, correlation_id))
            except AiorchError as error:
                raise self.name_step(error, f"model '{key[0]}'") from error
            if servable.ensemble is not None:
                open_keys += servable.ensemble.graph.models
        return leases

    async def run_steps(self, run: Run[Held], stage: Stage, host: StepHost[Held]) -> None:
        """Runs the ordinary steps of a stage, each as soon as what it reads is there."""
        if stage.is_chain:
            for step in stage.steps:
                await self._run_step(run, step, host)
            return
        left = list(stage.steps)
        running: dict[asyncio.Task[None], Step] = {}
        try:
            while left or running:
                ready = [step for step in left if run.is_ready(step)]
                if not ready and not running:
                    raise InternalError(f"in ensemble '{self.name}', no step of {len(left)} can be made")
                left = [step for step in left if step not in ready]
                if len(ready) == 1 and not running:  # nobody beside it: no task
                    await self._run_step(run, ready[0], host)
                    continue
                for step in ready:
                    running[asyncio.create_task(self._run_step(run, step, host))] = step
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del running[task]
                    task.result()
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.gather(*running, return_exceptions=True)

    async def _run_step(self, run: Run[Held], step: Step, host: StepHost[Held]) -> None:
        try:
            request, servable = run.make_request(step), run.leases[step.model]
            if self._places[step.index] is None:
                response = await host.infer_on(servable, request, deadline_ns=run.deadline_ns, leases=run.leases)
            else:
                async with self.placed(run, step):
                    response = await host.infer_on(servable, request, deadline_ns=run.deadline_ns, leases=run.leases)
            run.release(step)
            run.take(step, response.outputs)
        except AiorchError as error:
            raise self.name_step(error, str(step)) from error

    @contextlib.asynccontextmanager
    async def placed(self, run: Run[Held], step: Step) -> AsyncIterator[None]:
        """One of the step's places, which all requests of the ensemble share."""
        place = self._places[step.index]
        if place is None:
            yield
            return
        since_ns = time.monotonic_ns()
        async with place:
            run.waited_ns += time.monotonic_ns() - since_ns
            yield

    def make_answer(self, run: Run[Held]) -> InferenceResponse:
        """The outputs that the request wants, all of which are there."""
        return run.make_answer(self.name, self._version, self._signature)

    def name_step(self, error: AiorchError, step: str) -> AiorchError:
        """The same error with the ensemble in front, as Triton words it, and the step behind."""
        text = f"in ensemble '{self.name}', {error} ({step})"
        kind = type(error)
        return error.restate(text) if kind.__module__ == AiorchError.__module__ else error_from_code(error.code, text)
