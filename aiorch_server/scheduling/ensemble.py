"""Runs ensembles: each step is a request of its own to its model's queue, begun as soon as its tensors are there.

Tensors are never copied on the way: a step's answer is one piece of memory, and the next request's tensors are views
of it. All methods are for the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import AiorchError, DeadlineExpired, InternalError, QueueFull, RequestError, error_from_code
from aiorch_server.execution.response_counts import ResponseCounts
from aiorch_server.scheduling.ensemble_counters import EnsembleCounters
from aiorch_server.scheduling.ensemble_graph import EnsembleGraph, ModelKey, Plan, Step, convert_shape
from aiorch_server.types import (
    InferenceRequest,
    InferenceResponse,
    ModelSignature,
    RequestedOutput,
    SchedulerCounters,
    Tensor,
)

#: What a queue of the core holds where nothing else is configured.
DEFAULT_MAX_REQUESTS = 16384


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


Held = TypeVar("Held", bound=StepServable)


class StepHost(Protocol[Held]):
    """Who runs requests: the data plane."""

    def acquire(self, name: str, version: str) -> contextlib.AbstractContextManager[Held]:
        """A lease on a model that is ready."""
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


@dataclass(frozen=True, slots=True)
class _Value:
    """A tensor on its way; ``rows`` is the batch size of whoever made it, 0 if it does not batch."""

    tensor: Tensor
    rows: int


class _Run(Generic[Held]):
    """One request under way: the tensors so far, None where an optional one was left out or nobody needs it now."""

    def __init__(
        self, request: InferenceRequest, plan: Plan, rows: int, deadline_ns: int, leases: Mapping[ModelKey, Held]
    ) -> None:
        self.request = request
        self.plan = plan
        self.rows = rows
        self.deadline_ns = deadline_ns
        self.leases = leases
        self.waited_ns = 0
        self.values: dict[str, _Value | None] = {}
        self._readers = dict(plan.readers)

    def share(self, name: str, tensor: Tensor, rows: int) -> _Value:
        """``tensor`` as the ensemble's tensor of that name."""
        data = tensor.data
        if self.plan.readers.get(name, 0) > 1 and isinstance(data, memoryview):
            data = data.toreadonly()  # no reader may find what another has written into it
        return _Value(Tensor(name, tensor.datatype, tensor.shape, data), rows)

    def release(self, step: Step) -> None:
        """Lets go of the tensors that ``step`` was the last to read: in a long chain only few are held at a time."""
        for name in step.inputs.values():
            self._readers[name] -= 1
            if not self._readers[name]:
                self.values[name] = None


class EnsembleScheduler:
    """One version of an ensemble: takes requests as a scheduler does, but has neither queue nor instances.

    ``max_requests`` (0: the bound of a queue) bounds those under way; each step's ``max_inflight_requests`` is shared
    by all of them.
    """

    def __init__(
        self, name: str, version: int, config: ModelConfig, signature: ModelSignature, max_requests: int
    ) -> None:
        assert config.ensemble_scheduling is not None
        self.name = name
        self.graph = EnsembleGraph(config)
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
        limit = config.ensemble_scheduling.max_inflight_requests
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
        if self._in_flight >= self._max_requests:
            raise QueueFull("Exceeds maximum queue size")
        started_ns = time.monotonic_ns()
        self._in_flight += 1
        try:
            async with self._interruptible(deadline_ns):
                with contextlib.ExitStack() as stack:
                    if leases is None:
                        leases = self._lease(host, stack)
                    plan = self.graph.plan([output.name for output in request.outputs])
                    rows = request.inputs[0].shape[0] if self._signature.max_batch_size else 0
                    run = _Run(request, plan, rows, deadline_ns, leases)
                    await self._run_steps(run, host)
                    response = self._answer(run)
        except BaseException as error:
            self._counters.count_failure(error, time.monotonic_ns() - started_ns)
            raise
        finally:
            self._in_flight -= 1
            self._maybe_end()
        self._counters.count_success(rows or 1, run.waited_ns, time.monotonic_ns() - started_ns)
        return response

    @contextlib.asynccontextmanager
    async def _interruptible(self, deadline_ns: int) -> AsyncIterator[None]:
        """Ends with DeadlineExpired at the deadline and with the refusal when the ensemble is abandoned."""
        task = asyncio.current_task()
        assert task is not None
        asked = task.cancelling()
        self._requests[task] = self._requests.get(task, 0) + 1
        try:
            async with asyncio.timeout_at(deadline_ns / 1e9 if deadline_ns else None):
                yield
        except TimeoutError:
            raise DeadlineExpired("Deadline Exceeded") from None
        except asyncio.CancelledError:
            if task not in self._abandoned or task.uncancel() > asked:  # somebody else's wish
                raise
            raise self._refusal from None
        finally:
            self._abandoned.discard(task)
            self._requests[task] -= 1
            if not self._requests[task]:
                del self._requests[task]

    def _lease(self, host: StepHost[Held], stack: contextlib.ExitStack) -> Mapping[ModelKey, Held]:
        """All models that may be needed, those of ensembles among the steps included: held before the first step."""
        leases: dict[ModelKey, Held] = {}
        open_keys = list(self.graph.models)
        while open_keys:
            key = open_keys.pop()
            if key in leases:
                continue
            try:
                leases[key] = servable = stack.enter_context(host.acquire(*key))
            except AiorchError as error:
                raise self._name_step(error, f"model '{key[0]}'") from error
            if servable.ensemble is not None:
                open_keys += servable.ensemble.graph.models
        return leases

    async def _run_steps(self, run: _Run[Held], host: StepHost[Held]) -> None:
        given = {tensor.name: tensor for tensor in run.request.inputs}
        for spec in self._signature.inputs:
            tensor = given.get(spec.name)
            run.values[spec.name] = None if tensor is None else run.share(spec.name, tensor, run.rows)
        left = list(run.plan.steps)
        running: dict[asyncio.Task[None], Step] = {}
        try:
            while left or running:
                ready = [step for step in left if all(tensor in run.values for tensor in step.inputs.values())]
                if not ready and not running:
                    raise InternalError(f"in ensemble '{self.name}', no step of {len(left)} can be made")
                left = [step for step in left if step not in ready]
                if len(ready) == 1 and not running:  # a chain needs no task
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

    async def _run_step(self, run: _Run[Held], step: Step, host: StepHost[Held]) -> None:
        servable = run.leases[step.model]
        is_batching = servable.signature.max_batch_size > 0
        inputs = self._gather(run, step, servable.signature, is_batching)
        wanted = {given: tensor for given, tensor in step.outputs.items() if tensor in run.plan.readers}
        request = replace(
            run.request,
            model_name=step.model[0],
            model_version=step.model[1],
            inputs=inputs,
            outputs=[RequestedOutput(given) for given in wanted],
        )
        try:
            async with self._placed(run, step):
                response = await host.infer_on(servable, request, deadline_ns=run.deadline_ns, leases=run.leases)
        except AiorchError as error:
            raise self._name_step(error, str(step)) from error
        run.release(step)
        rows = inputs[0].shape[0] if is_batching else 0
        for tensor in response.outputs:
            name = wanted[tensor.name]
            run.values[name] = run.share(name, tensor, rows)

    def _gather(self, run: _Run[Held], step: Step, signature: ModelSignature, is_batching: bool) -> Sequence[Tensor]:
        inputs = []
        for given, name in step.inputs.items():
            value = run.values[name]
            if value is None:  # optional, and not given: the step decides whether it can do without
                continue
            shape = value.tensor.shape
            if is_batching != bool(value.rows):
                dims = next((spec.shape for spec in signature.inputs if spec.name == given), ())
                shape = convert_shape(dims, is_batching, value.rows, shape)
            inputs.append(Tensor(given, value.tensor.datatype, shape, value.tensor.data))
        if not inputs:
            raise RequestError(f"in ensemble '{self.name}', none of the inputs of {step} was given")
        return inputs

    @contextlib.asynccontextmanager
    async def _placed(self, run: _Run[Held], step: Step) -> AsyncIterator[None]:
        """One of the step's places, which all requests of the ensemble share."""
        place = self._places[step.index]
        if place is None:
            yield
            return
        since_ns = time.monotonic_ns()
        async with place:
            run.waited_ns += time.monotonic_ns() - since_ns
            yield

    def _answer(self, run: _Run[Held]) -> InferenceResponse:
        wanted = {output.name for output in run.request.outputs}
        outputs = []
        for spec in self._signature.outputs:
            if wanted and spec.name not in wanted:
                continue
            value = run.values[spec.name]
            assert value is not None
            shape = convert_shape(spec.shape, run.rows > 0, value.rows, value.tensor.shape)
            outputs.append(replace(value.tensor, shape=shape))
        return InferenceResponse(self.name, self._version, outputs, run.request.id)

    def _name_step(self, error: AiorchError, step: str) -> AiorchError:
        """The same error with the ensemble in front, as Triton words it, and the step behind."""
        text = f"in ensemble '{self.name}', {error} ({step})"
        kind = type(error)
        return kind(text) if kind.__module__ == AiorchError.__module__ else error_from_code(error.code, text)
