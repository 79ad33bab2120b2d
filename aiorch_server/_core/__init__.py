"""The compiled core; this module is the only importer of its extensions."""

from aiorch_server._core.batch_former import BatchFormer
from aiorch_server._core.collate import Batch
from aiorch_server._core.histogram import Histogram
from aiorch_server._core.mailbox import Mailbox
from aiorch_server._core.routes import Router
from aiorch_server._core.scheduler import Scheduler
from aiorch_server._core.spec import ModelSpec
from aiorch_server._core.wire import decode_response, encode_request, scan

__all__ = [
    "Batch",
    "BatchFormer",
    "Histogram",
    "Mailbox",
    "ModelSpec",
    "Router",
    "Scheduler",
    "decode_response",
    "encode_request",
    "scan",
]
