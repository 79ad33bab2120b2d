"""POST /v2/models/{model}[/versions/{version}]/generate and generate_stream as bare ASGI applications."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from aiorch_server.errors import UnsupportedRequest
from aiorch_server.frontends.rest.body import ClientGone, Receive, Send, receive_body
from aiorch_server.frontends.rest.generate_json import parse_generate, render_generate
from aiorch_server.frontends.rest.infer import (
    JSON,
    LARGEST_INLINE_BYTES,
    InferRoute,
    add_timing,
    describe_failure,
    parse_apart,
    respond,
    watch_headers,
)
from aiorch_server.frontends.rest.planes import InferencePlane, ManagementPlane, RestLimits
from aiorch_server.frontends.unpacking import UnpackBudget
from aiorch_server.tracing import Incoming
from aiorch_server.types import FINAL_RESPONSE, InferenceRequest, InferenceResponse

_NOT_ONE = (
    "generate expects model to produce exactly 1 response, use generate stream for model that generates various number "
    "of responses"
)
_EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")


class GenerateRoute(InferRoute):
    """One JSON document in, one out."""

    def __init__(
        self, dataplane: InferencePlane, controlplane: ManagementPlane, limits: RestLimits, budget: UnpackBudget
    ) -> None:
        super().__init__(dataplane, limits, budget)
        self._controlplane = controlplane

    async def _answer(
        self, headers: list[tuple[bytes, bytes]], receive: Receive, model_name: str, model_version: str
    ) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        request = await self._read(headers, receive, model_name, model_version)
        answer: InferenceResponse | None = None
        async with aclosing(self._follow(request, receive)) as answers:
            async for each in answers:
                if answer is not None:
                    raise UnsupportedRequest(_NOT_ONE)
                answer = each
        if answer is None:
            raise UnsupportedRequest(_NOT_ONE)
        if answer.error is not None:
            raise answer.error
        return await _render(answer), [JSON]

    async def _follow(self, request: InferenceRequest, receive: Receive) -> AsyncGenerator[InferenceResponse, None]:
        """Answers as they come, but for one that only says that it is the last."""
        async with aclosing(self._dataplane.stream(request)) as answers:
            step: asyncio.Task[InferenceResponse | None] | None = None

            async def take() -> InferenceResponse | None:
                nonlocal step
                step = asyncio.current_task()
                return await anext(answers, None)

            try:
                while (answer := await self._attend(take, receive)) is not None:
                    if answer.outputs or answer.error is not None or not answer.parameters.get(FINAL_RESPONSE):
                        yield answer
            finally:
                if step is not None:  # cancelled, if it was not over: a generator is closed when nobody runs it
                    await asyncio.wait((step,))

    async def _read(
        self, headers: list[tuple[bytes, bytes]], receive: Receive, model_name: str, model_version: str
    ) -> InferenceRequest:
        limits = self._limits
        async with receive_body(receive, headers, limits, self._budget) as body:
            await self._controlplane.bring(model_name, model_version)
            version, _ = self._controlplane.foresee(model_name, model_version)
            model = self._controlplane.model_metadata(model_name, str(version))
            return await parse_apart(len(body), parse_generate, body, model, model_version, limits.max_json_bytes)


class GenerateStreamRoute(GenerateRoute):
    """One JSON document in, a server-sent event for each answer out.

    What goes wrong before the first answer has its status; later it is an event with an ``error``.
    """

    async def __call__(
        self, scope: Mapping[str, Any], receive: Receive, send: Send, model_name: str, model_version: str
    ) -> None:
        """Reads the request and sends an event for each answer as it comes."""
        if scope["method"] != "POST":
            await super().__call__(scope, receive, send, model_name, model_version)
            return
        with watch_headers(scope) as incoming:
            await self._send_events(
                self._read(scope["headers"], receive, model_name, model_version), receive, send, incoming
            )

    async def _send_events(
        self, reading: Awaitable[InferenceRequest], receive: Receive, send: Send, incoming: Incoming
    ) -> None:
        has_begun = False
        try:
            request = await reading
            async with aclosing(self._follow(request, receive)) as answers:
                async for answer in answers:
                    body = await _render(answer) if answer.error is None else describe_failure(answer.error)[1]
                    event = b"data: " + body + b"\n\n"
                    if not has_begun:
                        has_begun = True
                        await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": [_EVENTS]})
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except ClientGone:
            return
        except Exception as error:
            status, body, headers = describe_failure(error)
            if not has_begun:
                add_timing(headers, incoming)
                await respond(send, status, headers, body)
                return
            await send({"type": "http.response.body", "body": b"data: " + body + b"\n\n", "more_body": True})
        if not has_begun:
            await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": [_EVENTS]})
        timing = incoming.server_timing()
        # A comment, which readers of events skip: the headers are sent before there is a time to tell.
        last = b": server-timing: %s\n\n" % timing.encode("ascii") if timing else b""
        await send({"type": "http.response.body", "body": last})


async def _render(response: InferenceResponse) -> bytes:
    if sum(len(tensor.data or b"") for tensor in response.outputs) > LARGEST_INLINE_BYTES:
        return await asyncio.to_thread(render_generate, response)
    return render_generate(response)
