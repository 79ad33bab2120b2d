"""Errors as gRPC statuses: the one place where this door turns what went wrong into a code and a text."""

from __future__ import annotations

import logging
from typing import Final

import grpc

from aiorch_server.errors import AiorchError, Code

logger = logging.getLogger(__name__)

#: The status for each code of an error; both sides number them as gRPC does.
STATUS: Final[dict[Code, grpc.StatusCode]] = {
    Code.OK: grpc.StatusCode.OK,
    Code.CANCELLED: grpc.StatusCode.CANCELLED,
    Code.UNKNOWN: grpc.StatusCode.UNKNOWN,
    Code.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Code.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Code.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Code.ALREADY_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Code.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Code.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Code.ABORTED: grpc.StatusCode.ABORTED,
    Code.OUT_OF_RANGE: grpc.StatusCode.OUT_OF_RANGE,
    Code.UNIMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    Code.INTERNAL: grpc.StatusCode.INTERNAL,
    Code.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Code.DATA_LOSS: grpc.StatusCode.DATA_LOSS,
    Code.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
}

#: Bound of a text in UTF-8. ``grpc-message`` percent-encodes it to at most three times that, and clients refuse header
#: lists over 8 KiB (gRPC's default): they would then show an error about metadata instead of ours.
#: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
MAX_TEXT_BYTES: Final = 2048
_CUT: Final = " [...]"


def describe_error(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status and text for an error; what was not raised on purpose is logged and shown as "internal error".

    ``asyncio.CancelledError`` is no ``Exception``: it never gets here and must not be caught for it.
    """
    if isinstance(error, AiorchError):
        return STATUS[error.code], bound_text(str(error))
    logger.error("unexpected error in an RPC", exc_info=error)
    return grpc.StatusCode.INTERNAL, "internal error"


def bound_text(text: str) -> str:
    """``text`` as valid Unicode of at most MAX_TEXT_BYTES, with a mark at its end where it was cut."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= MAX_TEXT_BYTES:
        return encoded.decode("utf-8")
    return encoded[: MAX_TEXT_BYTES - len(_CUT)].decode("utf-8", "ignore") + _CUT
