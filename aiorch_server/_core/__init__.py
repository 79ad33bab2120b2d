"""The compiled core; this module is the only importer of its extensions."""

from aiorch_server._core.batch_former import BatchFormer
from aiorch_server._core.buffers import read_copied_bytes
from aiorch_server._core.collate import Batch
from aiorch_server._core.compiled import serve_compiled
from aiorch_server._core.histogram import Histogram
from aiorch_server._core.mailbox import Mailbox
from aiorch_server._core.member import Member, count_run, detach, is_unwanted, list_attachments, read_trace
from aiorch_server._core.passes import Passes
from aiorch_server._core.quota import Admission, Quota
from aiorch_server._core.routes import Router
from aiorch_server._core.scheduler import Scheduler
from aiorch_server._core.shares import Shares
from aiorch_server._core.simulation import Fate, Simulation, simulate
from aiorch_server._core.spec import ModelSpec
from aiorch_server._core.wire_messages import (
    decode_response,
    encode_parameters,
    encode_request,
    scan,
    walk_elements,
)

try:
    from aiorch_server._core.aio import NativeServer
    from aiorch_server._core.call import Call
    from aiorch_server._core.h2_ledger import ServerLedger
    from aiorch_server._core.h2_life import ConnectionRules
    from aiorch_server._core.io import IoThread
except ImportError:  # built without libnghttp2, or it is not there at run time: only the grpcio door works
    Call = ConnectionRules = IoThread = NativeServer = ServerLedger = None  # type: ignore[assignment, misc]

try:
    from aiorch_server._core.tls import TlsContext, read_names
except ImportError:  # built without OpenSSL, or it is not there at run time: the loop carries TLS, with Python's own
    TlsContext = read_names = None  # type: ignore[assignment, misc]

__all__ = [
    "Admission",
    "Batch",
    "BatchFormer",
    "Call",
    "ConnectionRules",
    "Fate",
    "Histogram",
    "IoThread",
    "Mailbox",
    "Member",
    "ModelSpec",
    "NativeServer",
    "Passes",
    "Quota",
    "Router",
    "Scheduler",
    "ServerLedger",
    "Shares",
    "Simulation",
    "TlsContext",
    "count_run",
    "decode_response",
    "detach",
    "encode_parameters",
    "encode_request",
    "is_unwanted",
    "list_attachments",
    "read_copied_bytes",
    "read_names",
    "read_trace",
    "scan",
    "serve_compiled",
    "simulate",
    "walk_elements",
]
