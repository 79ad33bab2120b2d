"""Errors with google.rpc details, in the trailing metadata ``grpc-status-details-bin``.

https://google.aip.dev/193; clients read them with grpc_status.rpc_status or what their language has for it.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from google.protobuf.message import Message
from google.rpc import error_details_pb2 as rpc
from google.rpc import status_pb2

from aiorch_server.errors import (
    AiorchError,
    AlreadyExists,
    CapacityError,
    Code,
    Conflict,
    NotFoundError,
    PreconditionFailed,
    QuotaExceeded,
    RequestError,
)
from aiorch_server.frontends.admin.fields import InvalidField
from aiorch_server.frontends.grpc.status import bound_text, describe_error, to_status

DOMAIN: Final = "aiorch.dev"
KEY: Final = "grpc-status-details-bin"
#: Clients refuse header lists over 8 KiB; the text is among them twice, once percent-encoded, and these are in base64.
MAX_TEXT_BYTES: Final = 1024
MAX_DETAILS_BYTES: Final = 2560
_RETRY_NS: Final = 1_000_000_000
_WORD: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Failure(NamedTuple):
    """What an RPC is aborted with."""

    code: Any
    text: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def describe_failure(error: Exception, model: str = "") -> Failure:
    """The status, text and details of ``error``, which a call that names ``model`` ended with.

    What was not raised on purpose is logged and shown as "internal error".
    """
    _, text = describe_error(error)
    text = bound_text(text, MAX_TEXT_BYTES)
    code = find_code(error)
    status = status_pb2.Status(code=code, message=text)
    info = rpc.ErrorInfo(reason=name_reason(error), domain=DOMAIN)
    if model:
        info.metadata["model"] = bound_text(model, 255)
    status.details.add().Pack(info)
    for detail in _list_details(error, text, model):
        status.details.add().Pack(detail)
    if status.ByteSize() > MAX_DETAILS_BYTES:
        del status.details[1:]
    return Failure(to_status(code), text, ((KEY, status.SerializeToString(deterministic=True)),))


def find_code(error: Exception) -> Code:
    """The code that the admin API answers with; it says NOT_FOUND where Triton's says INVALID_ARGUMENT."""
    if isinstance(error, NotFoundError):
        return Code.NOT_FOUND
    return error.code if isinstance(error, AiorchError) else Code.INTERNAL


def name_reason(error: Exception) -> str:
    """The error's class in upper snake case, such as PRECONDITION_FAILED."""
    kind = type(error) if isinstance(error, AiorchError) else AiorchError
    return "INTERNAL_ERROR" if kind is AiorchError else _WORD.sub("_", kind.__name__).upper()


def _list_details(error: Exception, text: str, model: str) -> list[Message]:
    """What the error's class has to say beside its reason."""
    details: list[Message] = []
    if isinstance(error, InvalidField):
        violation = rpc.BadRequest.FieldViolation(field=bound_text(error.field, 255), description=error.problem)
        details.append(rpc.BadRequest(field_violations=[violation]))
    elif isinstance(error, NotFoundError | AlreadyExists):
        details.append(rpc.ResourceInfo(resource_type="model", resource_name=bound_text(model, 255), description=text))
    elif isinstance(error, PreconditionFailed | Conflict):
        violation = rpc.PreconditionFailure.Violation(type=name_reason(error), subject=model, description=text)
        details.append(rpc.PreconditionFailure(violations=[violation]))
    elif isinstance(error, QuotaExceeded):
        details.append(rpc.QuotaFailure(violations=[rpc.QuotaFailure.Violation(subject=model, description=text)]))
    elif isinstance(error, RequestError) and error.code == Code.INVALID_ARGUMENT:
        details.append(rpc.BadRequest(field_violations=[rpc.BadRequest.FieldViolation(description=text)]))
    if isinstance(error, CapacityError) and error.retryable:
        retry = rpc.RetryInfo()
        known_ns = error.retry_after_ns
        retry.retry_delay.FromNanoseconds(known_ns or _RETRY_NS)
        details.append(retry)
    return details


def find_model(request: Any) -> str:
    """The name of the model that a request is about, empty where it is about none."""
    for name in ("model", "name"):
        found = getattr(request, name, "")
        if isinstance(found, str) and found:
            return found
        if found := getattr(found, "name", ""):  # UpdateModelRequest has the model itself
            return str(found)
    return str(getattr(getattr(request, "objective", None), "model", ""))
