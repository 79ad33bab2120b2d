"""Errors as gRPC statuses: the one place where this door turns what went wrong into a code and a text."""

from __future__ import annotations

import logging
import sys
from typing import Any, Final, NoReturn

from aiorch_server.errors import AiorchError, Code
from aiorch_server.frontends.grpc.retry import describe_retry
from aiorch_server.frontends.telling import tell

logger = logging.getLogger(__name__)

#: Bound of a text in UTF-8. ``grpc-message`` percent-encodes it to at most three times that, and clients refuse header
#: lists over 8 KiB (gRPC's default): they would then show an error about metadata instead of ours.
#: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
MAX_TEXT_BYTES: Final = 2048
_CUT: Final = " [...]"


def describe_error(error: Exception) -> tuple[Any, str]:
    """The status (see ``to_status``) and text for an error.

    What was not raised on purpose is logged and shown as "internal error".

    ``asyncio.CancelledError`` is no ``Exception``: it never gets here and must not be caught for it.
    """
    if isinstance(error, AiorchError):
        return to_status(error.code), bound_text(tell(error))
    logger.error("unexpected error in an RPC", exc_info=error)
    return to_status(Code.INTERNAL), "internal error"


async def abort_call(error: Exception, context: Any) -> NoReturn:
    """Ends the call with the status and text of ``error``, and the time after which to retry where it is known."""
    code, text = describe_error(error)
    retry = describe_retry(error, text)
    # What abort is given takes the place of what was set before.
    await context.abort(code, text, (*(context.trailing_metadata() or ()), *retry) if retry else ())
    raise AssertionError("abort returned")


def to_status(code: Code) -> Any:
    """``grpc.StatusCode`` of this number where the grpc package is loaded, else the code itself.

    The native door takes either and needs no grpc; grpc's own server reads numbers above 15 as UNKNOWN.
    """
    statuses = getattr(sys.modules.get("grpc"), "StatusCode", ())
    return next((status for status in statuses if status.value[0] == code), code)


def bound_text(text: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """``text`` as valid Unicode of at most ``max_bytes``, with a mark at its end where it was cut."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= max_bytes:
        return encoded.decode("utf-8")
    return encoded[: max_bytes - len(_CUT)].decode("utf-8", "ignore") + _CUT
