"""/v1/models/...: TensorFlow Serving's REST protocol as a bare ASGI application."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from aiorch_server.config.restriction import Group
from aiorch_server.errors import RequestError
from aiorch_server.frontends.rest.body import (
    ClientGone,
    Receive,
    Send,
    choose_coding,
    encode_body,
    find_header,
    receive_body,
)
from aiorch_server.frontends.rest.infer import (
    InferRoute,
    add_timing,
    describe_failure,
    parse_apart,
    respond,
    watch_headers,
)
from aiorch_server.frontends.rest.infer_json import parse_document
from aiorch_server.frontends.rest.planes import RestLimits
from aiorch_server.frontends.restriction import AccessRules
from aiorch_server.frontends.tfserving import examples, json_answer, json_request
from aiorch_server.frontends.tfserving.information import find_status
from aiorch_server.frontends.tfserving.models import (
    Infer,
    ModelCatalogue,
    Wanted,
    find_example_model,
    find_model,
    is_known_signature,
)
from aiorch_server.frontends.unpacking import UnpackBudget
from aiorch_server.types import InferenceRequest, InferenceResponse

#: Where the paths of this protocol begin.
PREFIX: Final = "/v1/models"
_VERSION: Final = r"(?:/versions/([0-9]+)|/labels/([^/:]+))?"
_CALL: Final = re.compile(rf"{PREFIX}/([^/:]+){_VERSION}:(predict|classify|regress)", re.IGNORECASE)
_QUESTION: Final = re.compile(rf"{PREFIX}(?:/([^/:]+))?{_VERSION}(/metadata)?", re.IGNORECASE)
#: No version has more digits; longer ones are told apart from versions before they are counted.
_MOST_DIGITS: Final = 19
#: Above, requests are packed and answers written on a thread.
_LARGEST_INLINE_BYTES: Final = 64 * 1024
_Result = TypeVar("_Result")


class ServingRoute:
    """Answers the paths below PREFIX; every request is answered once, unless its client went away."""

    def __init__(
        self,
        catalogue: ModelCatalogue,
        route: InferRoute,
        limits: RestLimits,
        budget: UnpackBudget,
        access: AccessRules,
    ) -> None:
        self._catalogue = catalogue
        self._route = route
        self._limits = limits
        self._budget = budget
        self._access = access

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Reads the request, answers it or sends the error document."""
        headers: list[tuple[bytes, bytes]] = [(b"content-type", b"application/json")]
        status: int = HTTPStatus.OK
        with watch_headers(scope) as incoming:
            try:
                body = await self._answer(scope, receive)
                body, coding = await encode_body(body, choose_coding(find_header(scope["headers"], b"accept-encoding")))
                if coding is not None:
                    headers.append((b"content-encoding", coding.encode("ascii")))
            except ClientGone:
                return
            except Exception as error:
                status, body, headers = describe_failure(error)
        add_timing(headers, incoming)
        await respond(send, status, headers, body)

    async def _answer(self, scope: Mapping[str, Any], receive: Receive) -> bytes:
        method, path = scope["method"], scope["raw_path"].decode("latin-1")
        if method == "POST" and (matched := _CALL.fullmatch(path)) is not None:
            self._access.check((Group.INFERENCE,), scope["headers"])
            wanted = _read_target(*matched.groups()[:3])
            async with receive_body(receive, scope["headers"], self._limits, self._budget) as body:
                return await self._call(matched[4].lower(), wanted, body, receive)
        if method == "GET" and (matched := _QUESTION.fullmatch(path)) is not None:
            groups = (Group.METADATA,) if matched[4] else (Group.HEALTH, Group.METADATA)
            self._access.check(groups, scope["headers"])
            if not matched[1]:
                raise RequestError("Missing model name in request.")
            wanted = _read_target(*matched.groups()[:3])
            if matched[4]:
                return json_answer.render_metadata(await find_model(self._catalogue, wanted, is_run=False))
            return json_answer.render_status(find_status(self._catalogue, wanted))
        raise RequestError(f"Malformed request: {method} {path}")

    async def _call(self, method: str, wanted: Wanted, body: bytes, receive: Receive) -> bytes:
        if not body:
            raise RequestError("JSON Parse error: The document is empty")
        document = await parse_apart(len(body), parse_document, body, self._limits.max_json_bytes)
        wanted = replace(wanted, signature=json_request.read_signature_name(document))

        async def infer(request: InferenceRequest) -> InferenceResponse:
            return await self._route.infer(request, receive)

        if method == "predict":
            return await self._predict(wanted, document, len(body), infer)
        rows = await _run_sized(len(body), json_request.read_examples, document, method)
        model = await find_example_model(self._catalogue, wanted)
        if method == "classify":
            classes = await examples.classify(model, rows, infer)
            return await _run_sized(classes.ByteSize(), json_answer.render_classes, classes)
        values = await examples.regress(model, rows, infer)
        return await _run_sized(values.ByteSize(), json_answer.render_values, values)

    async def _predict(self, wanted: Wanted, document: Mapping[str, Any], body_bytes: int, infer: Infer) -> bytes:
        model = await find_model(self._catalogue, wanted)
        if not is_known_signature(wanted):
            raise RequestError(f'Serving signature name: "{wanted.signature}" not found in signature def')
        call = await _run_sized(body_bytes, json_request.read_predict, document, model.signature)
        outputs = (await model.run(infer, call.inputs)).outputs
        size = sum(len(output.data or b"") for output in outputs)
        return await _run_sized(size, partial(json_answer.render_predict, is_by_rows=call.is_by_rows), outputs)


async def _run_sized(size: int, work: Callable[..., _Result], *arguments: Any) -> _Result:
    """The result of ``work`` on ``size`` bytes; on another thread if they are many."""
    return work(*arguments) if size <= _LARGEST_INLINE_BYTES else await asyncio.to_thread(work, *arguments)


def _read_target(name: str, version: str | None, label: str | None) -> Wanted:
    """What the parts of a path name; they are percent-encoded."""
    number = None if version is None else int(version[: _MOST_DIGITS + 1])
    return Wanted(unquote(name), number, unquote(label or ""))
