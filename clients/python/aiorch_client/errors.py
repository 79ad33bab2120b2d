"""What the SDK raises, sorted by whose move it is next.

::

    ClientError
    |- RequestError        change the call: names, dtypes, shapes, rights; sending it again unchanged cannot help
    |- NotFoundError       name a model or version that the server has
    |- UnavailableError    try again later (``retryable`` tells whether at once is sensible)
    |  `- UnreachableError    nothing answers at that address: start the server or correct the address
    `- ServerError         the model's owner or the server's operator must act

Status codes: https://grpc.io/docs/guides/status-codes/. No error is told apart by its text.
"""

from __future__ import annotations

import grpc

#: Trailing metadata by which a server says when (milliseconds) or whether (negative: no) to try again, from
#: https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback
PUSHBACK_KEY = "grpc-retry-pushback-ms"
#: Trailing metadata with a google.rpc.Status, whose details say more: https://google.aip.dev/193
DETAILS_KEY = "grpc-status-details-bin"
_MOST_DIGITS = 18


class ClientError(Exception):
    """Root of all errors that the SDK raises on purpose.

    ``code`` is the gRPC status, ``details`` the text (the server's own where it answered), ``request_id`` the id of the
    request where the server named one. ``retryable`` is true where the same call may succeed a moment later;
    ``retry_after_s`` is the pause the server asked for, None where it asked for none. ``reason`` is the server's word
    for this kind of failure, such as PRECONDITION_FAILED, empty where it gave none (only the admin API does).
    """

    def __init__(
        self,
        details: str,
        *,
        code: grpc.StatusCode,
        retryable: bool = False,
        retry_after_s: float | None = None,
        request_id: str = "",
        reason: str = "",
    ) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.reason = reason


class RequestError(ClientError):
    """The call is wrong or not allowed; it has to be changed."""

    def __init__(
        self,
        details: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT,
        retryable: bool = False,
        retry_after_s: float | None = None,
        request_id: str = "",
        reason: str = "",
    ) -> None:
        super().__init__(
            details,
            code=code,
            retryable=retryable,
            retry_after_s=retry_after_s,
            request_id=request_id,
            reason=reason,
        )


class NotFoundError(ClientError):
    """The server has no such model, version or method argument."""


class UnavailableError(ClientError):
    """The server cannot take the call now, or did not answer in time."""


class UnreachableError(UnavailableError):
    """No server answers at that address."""


class ServerError(ClientError):
    """The model or the server failed; the caller did nothing wrong."""


_CLASSES: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.CANCELLED: RequestError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: RequestError,
    grpc.StatusCode.PERMISSION_DENIED: RequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RequestError,
    grpc.StatusCode.FAILED_PRECONDITION: RequestError,
    grpc.StatusCode.ABORTED: UnavailableError,
    grpc.StatusCode.OUT_OF_RANGE: RequestError,
    grpc.StatusCode.UNIMPLEMENTED: RequestError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: ServerError,
    grpc.StatusCode.UNAUTHENTICATED: RequestError,
}


def from_rpc_error(error: grpc.RpcError) -> ClientError:
    """The SDK's error for a failed RPC of ``grpc`` or ``grpc.aio``."""
    return from_status(error.code(), error.details(), error.trailing_metadata())


def from_status(code: grpc.StatusCode, details: str | None, trailing_metadata: object) -> ClientError:
    """The SDK's error for the status of a call.

    UNAVAILABLE is retryable unless the server says no; RESOURCE_EXHAUSTED (a message over a limit, as a rule) only
    where the server names a pause in the way of gRPC.
    """
    pushback_ms = _read_pushback_ms(trailing_metadata)
    if code is grpc.StatusCode.UNAVAILABLE:
        retryable = pushback_ms is None or pushback_ms >= 0
    else:
        retryable = code is grpc.StatusCode.RESOURCE_EXHAUSTED and pushback_ms is not None and pushback_ms >= 0
    error_class = UnavailableError if retryable else _CLASSES[code]
    reason, delay_s = _read_details(trailing_metadata)
    return error_class(
        details or "the server gave no reason",
        code=code,
        retryable=retryable,
        retry_after_s=(delay_s if pushback_ms is None else pushback_ms / 1000) if retryable else None,
        reason=reason,
    )


def _read_details(metadata: object) -> tuple[str, float | None]:
    """The reason in google.rpc.ErrorInfo and the pause in RetryInfo, where the trailing metadata have them."""
    packed = next((value for key, value in metadata or () if key == DETAILS_KEY), None)  # type: ignore[attr-defined]
    if not isinstance(packed, bytes):
        return "", None
    # imported here: most calls succeed, and most servers send none
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2, status_pb2

    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    delay_s: float | None = None
    try:
        for detail in status_pb2.Status.FromString(packed).details:
            detail.Unpack(info)
            if detail.Unpack(retry):
                delay_s = max(0.0, retry.retry_delay.ToNanoseconds() / 1e9)
    except DecodeError:  # not ours to judge: the status itself stands
        pass
    return info.reason, delay_s


def _read_pushback_ms(metadata: object) -> int | None:
    """The pause in the trailing metadata; -1 (do not retry) where it is no number, as the gRPC proposal rules."""
    if metadata is None:
        return None
    for key, value in metadata:  # type: ignore[attr-defined]
        if key == PUSHBACK_KEY:
            text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
            # longer ones say nothing that a clock could wait for
            return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else -1
    return None
