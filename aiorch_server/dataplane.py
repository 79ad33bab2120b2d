"""The desk of the control plane: prepares what the compiled path does not carry, and queues it beside the rest."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import AbstractContextManager, aclosing, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Final

from aiorch_server._core import Mailbox, decode_response
from aiorch_server.errors import (
    CapacityError,
    DeadlineExpired,
    InternalError,
    ModelNotReady,
    NotFoundError,
    RequestError,
    UnsupportedRequest,
)
from aiorch_server.exchange import Exchange, SharedRegions
from aiorch_server.execution.callers import check_callers, current_callers
from aiorch_server.execution.request_details import RequestDetails
from aiorch_server.execution.response_channel import ResponseChannel
from aiorch_server.execution.submission import submit
from aiorch_server.execution.taker import Taker
from aiorch_server.observability.tracer import Tracer
from aiorch_server.routing import Samples
from aiorch_server.scheduling import find_queue_timeout_us
from aiorch_server.security import current_access, permit, sees
from aiorch_server.tracing import Run, current_incoming, current_run, find_trace
from aiorch_server.types import FINAL_RESPONSE, InferenceRequest, InferenceResponse, Parameter, Tensor
from aiorch_server.validation import QueueTerms, check_request, find_correlation_id

if TYPE_CHECKING:
    from aiorch_server.lifecycle.manager import LifecycleManager
    from aiorch_server.lifecycle.servable import Servable, ServableHandle
    from aiorch_server.scheduling.ensemble_graph import ModelKey

_MOST_LOADS: Final = 5
_UNWATCHED: Final = nullcontext()
DECOUPLED_TEXT: Final = "ModelInfer RPC doesn't support models with decoupled transaction policy"


class DataPlane:
    """Takes neutral requests from any door, finds the version, checks, queues and awaits; used on one event loop."""

    def __init__(
        self,
        manager: LifecycleManager,
        mailbox: Mailbox,
        regions: SharedRegions | None = None,
        tracer: Tracer | None = None,
        *,
        stream_stall_s: float = 0.0,
    ) -> None:
        self._manager = manager
        self._mailbox = mailbox
        self._tracer = tracer or Tracer()
        self._regions = regions or SharedRegions()
        self._patience_s = stream_stall_s or math.inf
        #: Who gets to see a sample of the requests.
        self.samples = Samples(self._replay)

    def is_decoupled(self, model_name: str, model_version: str) -> bool:
        """Whether requests to that version may have any number of answers; False where there is no such version."""
        if not sees(model_name):
            return False
        return any(each.signature.is_decoupled for each in self._manager.list_choices(model_name, model_version))

    async def infer(self, request: InferenceRequest, *, deadline_ns: int = 0) -> InferenceResponse:
        """Runs one request; ``deadline_ns`` is absolute on the monotonic clock, 0 for none.

        Raises UnknownModel, UnknownVersion, ModelNotReady, RequestError, UnsupportedRequest, CapacityError,
        DeadlineExpired, NotFoundError for an unknown shared memory region, PermissionDenied, or what the model raised.
        A model that the caller may not see is unknown. Cancelling it takes the request out of the queue. The response's
        tensors keep its memory alive; outputs that went to shared memory have no data.
        """
        handle, is_sampled = await self._lease(request, deadline_ns)
        with handle as servable, _count(servable, request):
            if servable.signature.is_decoupled:
                raise UnsupportedRequest(DECOUPLED_TEXT)
            with self._tracer.watch(servable):
                return await self._infer(servable, request, deadline_ns, is_sampled=is_sampled)

    async def stream(
        self, request: InferenceRequest, *, deadline_ns: int = 0
    ) -> AsyncGenerator[InferenceResponse, None]:
        """Runs one request and yields its answers as they come; only the last has ``FINAL_RESPONSE`` True.

        An ordinary model gives one. A decoupled one may end without a last answer: the final one has no outputs then.
        Answers with ``error`` set do not end the stream. Raises what ``infer`` raises, at any time. Leaving it (use
        ``contextlib.aclosing``) cancels the request; while nobody takes its answers, the model has to wait. After
        ``stream_stall_s`` it need not any more: what comes next is StreamStalled.
        """
        handle, is_sampled = await self._lease(request, deadline_ns)
        with handle as servable, _count(servable, request):
            if not servable.signature.is_decoupled:
                with self._tracer.watch(servable):
                    answer = await self._infer(servable, request, deadline_ns, is_sampled=is_sampled)
                yield dataclasses.replace(answer, parameters={**answer.parameters, FINAL_RESPONSE: True})
                return
            name, version = servable.name, str(servable.version)
            is_final = False
            taker = Taker(self._patience_s, servable.instances.responses.add_stalled)
            # A model that calls is busy between two answers: it has the call's timeout instead.
            away = nullcontext if current_callers.get() else taker.away
            with _NamedRefusals(request), Exchange(self._regions, request, servable.signature) as exchange:
                brought = await exchange.bring()
                async with aclosing(self.stream_on(servable, brought, taker, deadline_ns=deadline_ns)) as answers:
                    async for answer in answers:
                        is_final = bool(answer.parameters.get(FINAL_RESPONSE))
                        answer = await exchange.deliver(
                            dataclasses.replace(answer, model_name=name, model_version=version, id=request.id)
                        )
                        with away():
                            yield answer
            if not is_final:
                yield InferenceResponse(name, version, (), request.id, {FINAL_RESPONSE: True})

    async def _infer(
        self, servable: Servable, request: InferenceRequest, deadline_ns: int, *, is_sampled: bool
    ) -> InferenceResponse:
        since_ns = time.monotonic_ns() if is_sampled else 0
        with _NamedRefusals(request), Exchange(self._regions, request, servable.signature) as exchange:
            brought = await exchange.bring()
            is_sampled = is_sampled and servable.sequencer is None  # who would replay a step of a sequence?
            taking = self.samples.take(servable, brought, since_ns) if is_sampled else None
            if taking is None:
                response = await self.infer_on(servable, brought, deadline_ns=deadline_ns)
            else:
                with taking:
                    response = taking.answer = await self.infer_on(servable, brought, deadline_ns=deadline_ns)
            return await exchange.deliver(response)

    async def _lease(self, request: InferenceRequest, deadline_ns: int) -> tuple[ServableHandle, bool]:
        """A lease on the version that a request is for, and whether it is in the sample; loads it on demand."""
        name, version = request.model_name, request.model_version
        if not permit(name):
            raise self._manager.explain_unknown(name, version)
        for _ in range(_MOST_LOADS):
            try:
                servable, is_sampled = self._choose(request)
                break
            except (NotFoundError, ModelNotReady):
                if not await self._manager.bring(name, version, deadline_ns):
                    raise
        else:  # it died as often as it was loaded
            servable, is_sampled = self._choose(request)
        return servable.acquire(), is_sampled

    def _choose(self, request: InferenceRequest) -> tuple[Servable, bool]:
        """The version that a request is for, and whether it is in the sample."""
        if request.model_version:
            return self._manager.find(request.model_name, request.model_version), False
        incoming = current_incoming.get()
        key, chosen = b"", None
        if incoming is not None:
            key, chosen, incoming.choice = incoming.route_key, incoming.choice, None
        return self._manager.choose(
            request.model_name, key=key, correlation_id=find_correlation_id(request), chosen=chosen
        )

    async def _replay(self, request: InferenceRequest, version: int, *, deadline_ns: int = 0) -> InferenceResponse:
        """As ``routing.Replay``."""
        with self._manager.find(request.model_name, str(version)).acquire() as servable:
            batching = servable.config.dynamic_batching
            parameters = dict(request.parameters)
            parameters.pop("priority", None)
            if batching is not None and batching.priority_levels:
                parameters["priority"] = batching.priority_levels
            request = dataclasses.replace(request, model_version=str(version), parameters=parameters)
            return await self.infer_on(servable, request, deadline_ns=deadline_ns)

    def acquire(self, name: str, version: str, correlation_id: int | str = 0) -> ServableHandle:
        """A lease on a version that is ready, for one step of a request; see LifecycleManager.choose."""
        incoming = current_incoming.get()
        key = incoming.route_key if incoming is not None else b""
        return self._manager.choose(name, version, key=key, correlation_id=correlation_id)[0].acquire()

    async def infer_on(
        self,
        servable: Servable,
        request: InferenceRequest,
        *,
        deadline_ns: int = 0,
        leases: Mapping[ModelKey, Servable] | None = None,
    ) -> InferenceResponse:
        """Runs one request on a servable that the caller holds a lease on; ``leases``: and what its steps need."""
        entered = _UNWATCHED if current_run.get() is None else self._tracer.enter(servable, request.id)
        with _NamedRefusals(request), entered:
            terms = check_request(request, servable.name, servable.signature)
            if servable.cache is not None:

                def run() -> Awaitable[InferenceResponse]:
                    return self._run(servable, request, terms, deadline_ns, leases)

                return await servable.cache.infer(
                    request,
                    terms.sequence,
                    run,
                    deadline_ns=deadline_ns,
                    is_called=bool(current_callers.get()),
                    find_timeout_us=lambda: find_queue_timeout_us(
                        servable.config.dynamic_batching, terms.priority, terms.timeout_us
                    ),
                )
            return await self._run(servable, request, terms, deadline_ns, leases)

    async def stream_on(
        self,
        servable: Servable,
        request: InferenceRequest,
        taker: Taker,
        *,
        deadline_ns: int = 0,
        leases: Mapping[ModelKey, Servable] | None = None,
    ) -> AsyncGenerator[InferenceResponse, None]:
        """Runs one request on a decoupled servable that the caller holds a lease on, for ``taker``; ``leases``: and
        what its steps need.

        Yields what the model answers; a last answer that is none is left out.
        """
        watched = self._tracer.watch_stream(servable, request.id, is_whole=leases is None)
        with _NamedRefusals(request), watched as run:
            terms = check_request(request, servable.name, servable.signature)
            end: asyncio.Future[memoryview] | None = None
            if servable.ensemble is not None:
                following = servable.ensemble.stream(
                    request, self, taker, deadline_ns=deadline_ns, leases=leases, context=_make_context(run)
                )
            else:
                check_callers(servable.name, servable.instances.alive)
                channel = ResponseChannel(asyncio.get_running_loop(), taker)
                details = RequestDetails.of(
                    request, terms.sequence, timeout_us=terms.timeout_us, channel=channel, run=run
                )
                end = self._submit(servable, request, terms, deadline_ns, details)
                following = channel.follow(end, deadline_ns)
            async with aclosing(following) as answers:
                async for answer in answers:
                    if run is not None:
                        run.note_response(is_error=answer.error is not None)
                        if end is not None and answer.parameters.get(FINAL_RESPONSE):
                            await asyncio.wait((end,))  # it is being settled: its phases can be told with this answer
                    yield answer

    async def _run(
        self,
        servable: Servable,
        request: InferenceRequest,
        terms: QueueTerms,
        deadline_ns: int,
        leases: Mapping[ModelKey, Servable] | None,
    ) -> InferenceResponse:
        """Runs a checked request on whatever the servable is."""
        if servable.signature.is_decoupled:
            raise UnsupportedRequest(f"model '{servable.name}' is decoupled: it does not give exactly one answer")
        if servable.ensemble is not None:
            return await servable.ensemble.run(request, self, deadline_ns=deadline_ns, leases=leases)
        if servable.sequencer is not None:
            check_callers(servable.name, servable.instances.alive)
            return await servable.sequencer.infer(request, terms, self._mailbox, deadline_ns=deadline_ns)
        check_callers(servable.name, servable.instances.alive)
        run = current_run.get()
        details = RequestDetails.of(request, terms.sequence, timeout_us=terms.timeout_us, run=run)
        answer = self._submit(servable, request, terms, deadline_ns, details)
        if not deadline_ns:
            return _decode(await answer, request.id, details.answer_parameters)
        try:
            async with asyncio.timeout_at(deadline_ns / 1e9):
                return _decode(await answer, request.id, details.answer_parameters)
        except TimeoutError:
            raise DeadlineExpired("Deadline Exceeded") from None

    def _submit(
        self,
        servable: Servable,
        request: InferenceRequest,
        terms: QueueTerms,
        deadline_ns: int,
        details: RequestDetails,
    ) -> asyncio.Future[memoryview]:
        scheduler = servable.plain_scheduler
        if scheduler is None:
            raise InternalError(f"model '{servable.name}' has no queue of its own")
        if deadline_ns and asyncio.get_running_loop().time() * 1e9 >= deadline_ns:
            raise DeadlineExpired("Deadline Exceeded")
        run = details.run
        if run is not None:
            run.is_queued = True
        return submit(
            self._mailbox,
            scheduler,
            request,
            request.inputs,
            dict.fromkeys(output.name for output in request.outputs),
            details,
            priority=terms.priority,
            timeout_us=terms.timeout_us,
            deadline_ns=deadline_ns,
            stamps=None if run is None else run.stamps,
            trace=(None if run is None else run.trace) or find_trace(),
            tenant=current_access.get().share,
        )


def _count(servable: Servable, request: InferenceRequest) -> AbstractContextManager[object]:
    """Counts a request to its tenant's quota while it is under way; QuotaExceeded."""
    quota = current_access.get().quota
    if quota is None:
        return _UNWATCHED
    has_rows = servable.signature.max_batch_size > 0 and request.inputs and request.inputs[0].shape
    rows = request.inputs[0].shape[0] if has_rows else 1
    return quota.admit(max(0, rows), time.monotonic_ns())


class _NamedRefusals:
    """A refusal begins with the request's id; those of the queue and of an ensemble's steps carry it already.

    A class, because each step of an ensemble passes here.
    """

    __slots__ = ("_request",)

    def __init__(self, request: InferenceRequest) -> None:
        self._request = request

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, RequestError | CapacityError | NotFoundError):
            return
        if not str(error).startswith(("[request id: ", "in ensemble '")):
            text = f"[request id: {self._request.id or '<id_unknown>'}] {error}"
            raise error.restate(text) from error.__cause__


def _decode(answer: memoryview, request_id: str, parameters: Mapping[str, Parameter]) -> InferenceResponse:
    name, version, _, outputs = decode_response(answer)
    return InferenceResponse(
        model_name=name,
        model_version=version,
        outputs=[Tensor(name, datatype, shape, data) for name, datatype, shape, data in outputs],
        id=request_id,
        parameters=parameters,
    )


def _make_context(run: Run | None) -> contextvars.Context:
    """Where tasks work for ``run``: a generator cannot set it for itself."""
    context = contextvars.copy_context()
    context.run(current_run.set, run)
    return context
