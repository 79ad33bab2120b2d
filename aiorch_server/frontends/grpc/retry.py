"""When to come back, in the two ways that gRPC's clients understand; the compiled desk writes the same."""

from __future__ import annotations

from typing import Final

from aiorch_server.errors import CapacityError

#: gRFC A6: after how many milliseconds to retry.
_PUSHBACK: Final = "grpc-retry-pushback-ms"
#: https://google.aip.dev/193; clients read it with grpc_status.rpc_status or what their language has for it.
_DETAILS: Final = "grpc-status-details-bin"
#: Texts that are told again in the details: clients bound what they accept in trailers.
_MAX_TOLD_BYTES: Final = 1024


def describe_retry(error: Exception, text: str) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata that tell when to come back, beside the status and its ``text``; empty where nobody knows."""
    if not isinstance(error, CapacityError) or not error.retry_after_ns:
        return ()
    pushback = (_PUSHBACK, str(-(-error.retry_after_ns // 1_000_000)))
    if len(text.encode("utf-8", "replace")) > _MAX_TOLD_BYTES:
        return (pushback,)
    from google.rpc import error_details_pb2, status_pb2  # 4 MB that a server needs when it first refuses

    status = status_pb2.Status(code=error.code, message=text)
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromNanoseconds(error.retry_after_ns)
    status.details.add().Pack(retry)
    return pushback, (_DETAILS, status.SerializeToString(deterministic=True))
