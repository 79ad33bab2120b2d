"""From the errors of this package to HTTP answers."""

from __future__ import annotations

import json
from http import HTTPStatus

from aiorch_server.errors import AiorchError, CapacityError, Code, PayloadTooLarge
from aiorch_server.frontends.rest.body import BodyTimeout, UnsupportedCoding
from aiorch_server.frontends.restriction import AccessRestricted

_MOST_CHARACTERS = 4096

#: HTTP status by code. The first group is Triton's table (``HttpCodeFromError`` in server/src/http_server.cc: 500,
#: 404, 503, 501, and 400 for the rest); the second holds codes that Triton does not have, with HTTP's own meaning.
STATUS_BY_CODE: dict[Code, HTTPStatus] = {
    Code.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
    Code.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.UNIMPLEMENTED: HTTPStatus.NOT_IMPLEMENTED,
    Code.UNKNOWN: HTTPStatus.BAD_REQUEST,
    Code.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    Code.ALREADY_EXISTS: HTTPStatus.BAD_REQUEST,
    Code.CANCELLED: HTTPStatus.BAD_REQUEST,
    Code.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    Code.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    Code.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    Code.FAILED_PRECONDITION: HTTPStatus.BAD_REQUEST,
    Code.ABORTED: HTTPStatus.CONFLICT,
    Code.OUT_OF_RANGE: HTTPStatus.BAD_REQUEST,
    Code.DATA_LOSS: HTTPStatus.INTERNAL_SERVER_ERROR,
    Code.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
}

#: Errors whose code alone is too coarse. Triton answers 400 to a body over its limit; 413 is what HTTP has for it,
#: proxies and clients know it, and Triton's clients treat every status but 200 alike.
STATUS_BY_CLASS: dict[type[AiorchError], HTTPStatus] = {
    PayloadTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    BodyTimeout: HTTPStatus.REQUEST_TIMEOUT,
    AccessRestricted: HTTPStatus.FORBIDDEN,
}

#: Headers that say more about an error: what would be read, and that the rest of a body is not waited for.
_HEADERS_BY_CLASS: dict[type[AiorchError], dict[str, str]] = {
    UnsupportedCoding: {"accept-encoding": "gzip, deflate"},
    BodyTimeout: {"connection": "close"},
}


def status_of(error: AiorchError) -> int:
    """The HTTP status that tells a client about ``error``."""
    for kind in type(error).__mro__:
        if kind in STATUS_BY_CLASS:
            return STATUS_BY_CLASS[kind].value
    return STATUS_BY_CODE[error.code].value


def headers_of(error: AiorchError) -> dict[str, str]:
    """Headers of the answer besides its content type."""
    if isinstance(error, CapacityError) and error.retry_after_ns:
        return {"retry-after": str(-(-error.retry_after_ns // 10**9))}
    return _HEADERS_BY_CLASS.get(type(error), {})


def error_body(text: str) -> bytes:
    """The error document of the V2 protocol, ``{"error": text}``; an endless text (names of a client's) is cut."""
    if len(text) > _MOST_CHARACTERS:
        text = text[:_MOST_CHARACTERS] + " [...]"
    return json.dumps({"error": text}, separators=(",", ":")).encode("ascii")
