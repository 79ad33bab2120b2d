"""The one way of a checked request into a queue of the core, whoever prepared it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final

from aiorch_server._core import Mailbox, Scheduler, encode_request
from aiorch_server.execution.request_details import RequestDetails
from aiorch_server.types import InferenceRequest, PhaseStamps, Tensor

#: From here on tensors stay where they are; below, putting them into the message costs less than holding them.
_CONTENTS_FROM_BYTES: Final = 16384


def submit(
    mailbox: Mailbox,
    scheduler: Scheduler,
    request: InferenceRequest,
    tensors: Sequence[Tensor],
    outputs: Iterable[str],
    details: RequestDetails,
    *,
    priority: int = 0,
    timeout_us: int = 0,
    deadline_ns: int = 0,
    stamps: PhaseStamps | None = None,
    trace: bytes | None = None,
    tenant: tuple[int, float] = (0, 1.0),
) -> asyncio.Future[memoryview]:
    """Queues ``request`` with ``tensors`` as its inputs and gives the future of its serialized answer.

    ``tenant`` is the number of whose it is, 0 for nobody's, and the weight of its share. Tensors that stay where they
    are have to keep until the request is settled. Raises what ``Mailbox.submit`` raises.
    """
    contents = [tensor.data or b"" for tensor in tensors]
    is_big = sum(map(count_bytes, contents)) >= _CONTENTS_FROM_BYTES
    message = encode_request(
        request.model_name,
        request.model_version,
        # the compiled path takes ASCII ids only; the answer's id is set from the request anyway
        request.id if request.id.isascii() else "",
        [
            (tensor.name, tensor.datatype, tensor.shape, b"" if is_big else data)
            for tensor, data in zip(tensors, contents, strict=True)
        ],
        list(outputs),
    )
    return mailbox.submit(
        scheduler,
        message,
        contents if is_big else None,
        priority=priority,
        timeout_us=timeout_us,
        deadline_ns=deadline_ns,
        attachment=details,
        stamps=stamps,
        trace=trace,
        tenant=tenant[0],
        weight=tenant[1],
    )


def count_bytes(data: bytes | memoryview) -> int:
    """The size of a tensor's data."""
    return data.nbytes if isinstance(data, memoryview) else len(data)
