"""POST /v2/models/{model}[/versions/{version}]/infer as a bare ASGI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import Any, TypeVar

from aiorch_server.errors import AiorchError, InternalError, ServerStopping
from aiorch_server.frontends.rest.body import (
    ClientGone,
    Receive,
    Send,
    choose_coding,
    encode_body,
    find_header,
    receive_body,
)
from aiorch_server.frontends.rest.infer_json import count_json_bytes, measure_json, parse_infer, render_infer
from aiorch_server.frontends.rest.planes import InferencePlane, RestLimits
from aiorch_server.frontends.rest.status import error_body, headers_of, status_of
from aiorch_server.frontends.telling import tell
from aiorch_server.frontends.unpacking import UnpackBudget
from aiorch_server.tracing import Incoming
from aiorch_server.tracing import receive as receive_headers
from aiorch_server.types import InferenceRequest, InferenceResponse

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")
#: Above, tensors are written as JSON on a thread: a megabyte takes a fifth of a second.
LARGEST_INLINE_BYTES = 64 * 1024
#: Above, JSON is read on a thread: 16 MB take a fifth of a second, and the event loop gets its turns between the steps.
LARGEST_INLINE_JSON_BYTES = 128 * 1024


class InferRoute:
    """Answers inference requests; every request is answered once, unless its client went away."""

    def __init__(self, dataplane: InferencePlane, limits: RestLimits, budget: UnpackBudget) -> None:
        self._dataplane = dataplane
        self._limits = limits
        self._budget = budget
        self._running: set[asyncio.Future[Any]] = set()
        self._is_abandoned = False

    async def __call__(
        self, scope: Mapping[str, Any], receive: Receive, send: Send, model_name: str, model_version: str
    ) -> None:
        """Reads the request, has it inferred and sends the answer or the error document."""
        headers: list[tuple[bytes, bytes]] = [JSON]
        if scope["method"] != "POST":
            headers.append((b"allow", b"POST"))
            await respond(send, HTTPStatus.METHOD_NOT_ALLOWED, headers, error_body("Method Not Allowed"))
            return
        with watch_headers(scope) as incoming:
            try:
                body, headers = await self._answer(scope["headers"], receive, model_name, model_version)
                status: int = HTTPStatus.OK
            except ClientGone:
                return
            except Exception as error:
                status, body, headers = describe_failure(error)
        add_timing(headers, incoming)
        await respond(send, status, headers, body)

    def abandon(self) -> None:
        """Answers everything that is still running with ServerStopping; for the end of a drain's patience."""
        self._is_abandoned = True
        for inference in self._running:
            inference.cancel()

    async def _answer(
        self, headers: list[tuple[bytes, bytes]], receive: Receive, model_name: str, model_version: str
    ) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        limits = self._limits
        header_length = find_header(headers, b"inference-header-content-length")
        async with receive_body(receive, headers, limits, self._budget) as body:
            arguments = (body, header_length, model_name, model_version, limits.max_json_bytes)
            call = await parse_apart(measure_json(body, header_length), parse_infer, *arguments)
            response = await self.infer(call.request, receive)
        if count_json_bytes(response, call) > LARGEST_INLINE_BYTES:
            answer, json_bytes = await asyncio.to_thread(render_infer, response, call)
        else:
            answer, json_bytes = render_infer(response, call)
        answer, coding = await encode_body(answer, choose_coding(find_header(headers, b"accept-encoding")))
        answer_headers = [JSON if json_bytes is None else _BINARY]
        if json_bytes is not None:
            answer_headers.append((b"inference-header-content-length", b"%d" % json_bytes))
        if coding is not None:
            answer_headers.append((b"content-encoding", coding.encode("ascii")))
        return answer, answer_headers

    async def infer(self, request: InferenceRequest, receive: Receive) -> InferenceResponse:
        """Waits for the answer or for the client to go away, which takes the request back from the data plane."""
        return await self._attend(lambda: self._dataplane.infer(request), receive)

    async def _attend(self, begin: Callable[[], Coroutine[Any, Any, _T]], receive: Receive) -> _T:
        """The result of what ``begin`` begins; ends it when the client goes away or a drain's patience does."""
        if self._is_abandoned:
            raise ServerStopping("Server is stopping and has stopped accepting new inference requests")
        inference = asyncio.ensure_future(begin())
        departure = asyncio.ensure_future(_await_departure(receive))
        self._running.add(inference)
        try:
            await asyncio.wait((inference, departure), return_when=asyncio.FIRST_COMPLETED)
            # Also where there is an answer: a stream's next one may be there always, and nobody would ever notice.
            if departure.done() or not inference.done():
                raise ClientGone("the client closed the connection")
            if inference.cancelled() and self._is_abandoned:
                raise ServerStopping("Server is stopping; the request was not finished in time")
            if inference.cancelled():
                raise InternalError("the request was cancelled inside the server")
            return inference.result()
        finally:
            self._running.discard(inference)
            for task in (inference, departure):
                task.cancel()
                task.add_done_callback(_take_outcome)
            # What failed holds an error, whose traceback holds this frame: with the task in it, the request's tensors
            # would stay until the garbage collector comes by.
            del inference, departure, task


def watch_headers(scope: Mapping[str, Any]) -> AbstractContextManager[Incoming]:
    """What the request's headers ask to be watched."""
    headers = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])
    return receive_headers(headers, "http", f"{scope['method']} {scope['path']}")


def add_timing(headers: list[tuple[bytes, bytes]], incoming: Incoming) -> None:
    """Tells how long the phases of a request took, if it has asked for that."""
    if timing := incoming.server_timing():
        headers.append((b"server-timing", timing.encode("ascii")))


async def parse_apart(json_bytes: int, parse: Callable[..., _T], *arguments: Any) -> _T:
    """What ``parse`` makes of ``arguments``, on a thread if it reads much JSON; raises what it raises."""
    if json_bytes > LARGEST_INLINE_JSON_BYTES:
        return await asyncio.to_thread(parse, *arguments)
    return parse(*arguments)


async def _await_departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _take_outcome(task: asyncio.Future[Any]) -> None:
    """Reads an outcome that nobody waits for any more, so that asyncio does not report it as lost."""
    if not task.cancelled():
        task.exception()


def describe_failure(error: Exception) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    """Status, document and headers that tell a client about ``error``; a fault of ours is logged and not shown."""
    if not isinstance(error, AiorchError):
        logger.error("inference over REST failed on a fault of this server", exc_info=error)
        error = InternalError("internal error while serving the request; the server's log says more")
    more = ((key.encode("ascii"), value.encode("ascii")) for key, value in headers_of(error).items())
    return status_of(error), error_body(tell(error)), [JSON, *more]


async def respond(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    """Sends a whole answer."""
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body})
