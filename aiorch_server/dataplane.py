"""The desk of the control plane: prepares what the compiled path does not carry, and queues it beside the rest."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiorch_server._core import Mailbox, decode_response, encode_request
from aiorch_server.errors import CapacityError, DeadlineExpired, InternalError, NotFoundError, RequestError
from aiorch_server.exchange import Exchange, SharedRegions
from aiorch_server.types import InferenceRequest, InferenceResponse, Tensor
from aiorch_server.validation import check_request

if TYPE_CHECKING:
    from aiorch_server.lifecycle.manager import LifecycleManager
    from aiorch_server.lifecycle.servable import Servable


class DataPlane:
    """Takes neutral requests from any door, finds the version, checks, queues and awaits; used on one event loop."""

    def __init__(self, manager: LifecycleManager, mailbox: Mailbox, regions: SharedRegions | None = None) -> None:
        self._manager = manager
        self._mailbox = mailbox
        self._regions = regions or SharedRegions()

    async def infer(self, request: InferenceRequest, *, deadline_ns: int = 0) -> InferenceResponse:
        """Runs one request; ``deadline_ns`` is absolute on the monotonic clock, 0 for none.

        Raises UnknownModel, UnknownVersion, ModelNotReady, RequestError, UnsupportedRequest, CapacityError,
        DeadlineExpired, NotFoundError for an unknown shared memory region, or what the model raised. Cancelling it
        takes the request out of the queue. The response's tensors keep its memory alive; outputs that went to shared
        memory have no data.
        """
        with self._manager.acquire(request.model_name, request.model_version) as servable:
            try:
                with Exchange(self._regions, request, servable.signature) as exchange:
                    response = await self._answer(servable, await exchange.bring(), deadline_ns)
                    return await exchange.deliver(response)
            except (RequestError, CapacityError, NotFoundError) as error:
                if str(error).startswith("[request id: "):  # the queue's own refusals carry it already
                    raise
                raise type(error)(f"[request id: {request.id or '<id_unknown>'}] {error}") from error.__cause__

    async def _answer(self, servable: Servable, request: InferenceRequest, deadline_ns: int) -> InferenceResponse:
        if servable.sequencer is not None:
            terms = check_request(request, servable.name, servable.signature)
            return await servable.sequencer.infer(request, terms, self._mailbox, deadline_ns=deadline_ns)
        return _decode(await self._run(servable, request, deadline_ns), request.id)

    async def _run(self, servable: Servable, request: InferenceRequest, deadline_ns: int) -> bytes:
        scheduler = servable.plain_scheduler
        if scheduler is None:
            raise InternalError(f"model '{servable.name}' has no queue of its own")
        terms = check_request(request, servable.name, servable.signature)
        message = encode_request(
            request.model_name,
            request.model_version,
            # the compiled path takes ASCII ids only; the answer's id is set from the request anyway
            request.id if request.id.isascii() else "",
            [(tensor.name, tensor.datatype, tensor.shape, tensor.data or b"") for tensor in request.inputs],
            list(dict.fromkeys(output.name for output in request.outputs)),
        )
        loop = asyncio.get_running_loop()
        timeout = asyncio.timeout_at(deadline_ns / 1e9) if deadline_ns else asyncio.timeout(None)
        if deadline_ns and loop.time() * 1e9 >= deadline_ns:
            raise DeadlineExpired("Deadline Exceeded")
        answer = self._mailbox.submit(
            scheduler,
            message,
            priority=terms.priority,
            timeout_us=terms.timeout_us,
            deadline_ns=deadline_ns,
        )
        try:
            async with timeout:
                return await answer
        except TimeoutError:
            raise DeadlineExpired("Deadline Exceeded") from None


def _decode(answer: bytes, request_id: str) -> InferenceResponse:
    name, version, _, outputs = decode_response(answer)
    return InferenceResponse(
        model_name=name,
        model_version=version,
        outputs=[Tensor(name, datatype, shape, data) for name, datatype, shape, data in outputs],
        id=request_id,
    )
