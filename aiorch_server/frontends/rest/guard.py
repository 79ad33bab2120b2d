"""The gate before every request of an HTTP door.

Which models a request may touch is asked by the planes, of the access that is set here for the task of the request.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final

from aiorch_server.errors import NotAuthenticated
from aiorch_server.frontends.rest.body import Receive, Send
from aiorch_server.frontends.rest.connection import PEER_CERTIFICATE
from aiorch_server.frontends.rest.infer import JSON, describe_failure, respond
from aiorch_server.frontends.rest.status import error_body
from aiorch_server.security.access import Access, current_access
from aiorch_server.security.authenticator import Credentials
from aiorch_server.security.gate import NOBODY, Gate
from aiorch_server.security.identity import current_principal
from aiorch_server.security.permissions import TABLE, Permission, Scope

_METHODS: Final = ("GET", "POST")
_PARAMETERS: Final[Mapping[str, str]] = {"version": "[0-9]+"}
_SERVING: Final = "/v1/"
#: Paths whose calls are remembered: how many, and how long they may be.
_FOUND: Final = 1024
_SHORT: Final = 300
#: For the time until the gate has decided; and where it forgets to.
_NOTHING: Final = Permission("nothing", Scope.KNOWN)
Application = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]


class RestGuard:
    """``app`` behind ``gate``, as an ASGI application; requests that no route is for get no further."""

    def __init__(self, app: Application, gate: Gate) -> None:
        self._app = app
        self._gate = gate
        calls = [call for call in TABLE if call.partition(" ")[0] in _METHODS]
        # The fewer parameters, the closer: /v2/models/stats is no model.
        self._routes = [(call, _compile(call)) for call in sorted(calls, key=lambda call: call.count("{"))]
        self._find_short = lru_cache(_FOUND)(self._find_call)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answers what may not pass, and hands the rest on."""
        # A connection's tasks inherit what the one before has set.
        access = Access(NOBODY, _NOTHING)
        _set(access)
        call, methods = self._find(scope)
        credentials = read_credentials(scope)
        try:
            if call is None:
                await self._gate.identify(credentials)
            else:
                access = await self._gate.enter(call, credentials)
        except Exception as error:
            status, body, headers = describe_failure(error)
            if isinstance(error, NotAuthenticated):
                headers.append((b"www-authenticate", _challenge(credentials)))
            await respond(send, status, headers, body)
            return
        if call is None:
            await _refuse_path(send, methods)
            return
        _set(access)
        await self._app(scope, receive, _Held(send, access))

    def _find(self, scope: Mapping[str, Any]) -> tuple[str | None, list[str]]:
        """The call that a request is, or the methods that there are at its path."""
        raw = scope["raw_path"].decode("latin-1")
        path = raw if raw.lower().startswith(_SERVING) else scope["path"]
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        return (self._find_short if len(path) <= _SHORT else self._find_call)(method, path)

    def _find_call(self, method: str, path: str) -> tuple[str | None, list[str]]:
        found = set()
        for call, pattern in self._routes:
            if pattern.fullmatch(path) is not None:
                wanted = call.partition(" ")[0]
                if wanted == method:
                    return call, []
                found.add(wanted)
        return None, sorted(found)


class _Held:
    """``send``, which holds back what was answered without a question what the caller may see."""

    def __init__(self, send: Send, access: Access) -> None:
        self._send = send
        self._access = access
        self._is_held = False

    async def __call__(self, message: Any) -> None:
        if self._is_held:
            return
        is_start = message["type"] == "http.response.start"
        if is_start and message["status"] < HTTPStatus.BAD_REQUEST and not self._access.is_complete:
            self._is_held = True
            await respond(
                self._send,
                HTTPStatus.INTERNAL_SERVER_ERROR,
                [JSON],
                error_body("the request did not ask what its caller may do, so its answer was held back"),
            )
            return
        await self._send(message)


def read_credentials(scope: Mapping[str, Any]) -> Credentials:
    """What a request shows: its Authorization headers, and the certificate that its connection has proved."""
    values = tuple(value for name, value in scope["headers"] if name == b"authorization")
    return Credentials(values, scope.get("state", {}).get(PEER_CERTIFICATE) or b"")


def _set(access: Access) -> None:
    current_access.set(access)
    current_principal.set(access.principal)


def _challenge(credentials: Credentials) -> bytes:
    """RFC 6750, section 3: no error for who has shown nothing."""
    return b'Bearer realm="aiorchestrator"' + (b', error="invalid_token"' if credentials.authorizations else b"")


async def _refuse_path(send: Send, methods: list[str]) -> None:
    status = HTTPStatus.METHOD_NOT_ALLOWED if methods else HTTPStatus.NOT_FOUND
    headers = [JSON, (b"allow", ", ".join(methods).encode("ascii"))] if methods else [JSON]
    await respond(send, status, headers, error_body(status.phrase))


def _compile(call: str) -> re.Pattern[str]:
    template = call.partition(" ")[2]
    is_serving = template.startswith(_SERVING)
    segment = "[^/:]+" if is_serving else "[^/]+"
    parts = re.split(r"{(\w+)}", template)
    texts = [re.escape(part) if index % 2 == 0 else _PARAMETERS.get(part, segment) for index, part in enumerate(parts)]
    return re.compile("".join(texts), re.IGNORECASE if is_serving else 0)
