"""What a gRPC server allows its clients: how long connections live and how noisy they may be, and bounds over all.

Names and defaults are those of gRPC's channel arguments, https://grpc.github.io/grpc/core/group__grpc__arg__keys.html.
"""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from aiorch_server import _core

if TYPE_CHECKING:
    from aiorch_server._core import ConnectionRules, ServerLedger

MAX_BUFFERED_BYTES: Final = 1 << 30
MAX_CONNECTIONS: Final = 10_000
#: What grpc takes for "never", in milliseconds.
_NEVER_MS: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds of one client connection; a client that wants more is refused or slowed down, nobody else is.

    ``max_buffered_bytes`` bounds the messages under assembly and, apart from that, those no servicer has read yet;
    ``max_outbound_bytes`` the answers the client does not take; above ``high_water_bytes`` a streaming servicer's
    ``write`` waits. A client must speak HTTP/2 within ``greeting_timeout_s`` and take bytes within ``write_timeout_s``.
    """

    max_concurrent_streams: int = 1024
    max_header_list_bytes: int = 16 << 10
    stream_window_bytes: int = 8 << 20
    connection_window_bytes: int = 16 << 20
    max_buffered_bytes: int = 256 << 20
    max_outbound_bytes: int = 256 << 20
    high_water_bytes: int = 1 << 20
    greeting_timeout_s: float = 20.0
    write_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class ConnectionLife:
    """How long a connection lives, and how both sides find out that the other is gone; seconds, 0 is never.

    A client is sent a PING after ``keepalive_time_s`` in which nothing came from it, and is disconnected when nothing
    comes for ``keepalive_timeout_s`` more; without calls only with ``keepalive_permit_without_calls``. A client that
    sends PINGs closer than ``min_ping_interval_s`` (2 hours without calls, unless those are permitted) although
    nothing was sent to it in between is disconnected at the one after ``max_ping_strikes`` (0: any number).

    After ``max_connection_age_s``, give or take a tenth, or ``max_connection_idle_s`` without calls, a client is told
    to open no more streams; what is in flight is answered, but no later than ``max_connection_age_grace_s`` after its
    age. Complete answers of the fast path may wait ``stall_timeout_s`` for the client's windows; those of other calls
    may wait for longer, unless the server is short of memory.
    """

    keepalive_time_s: float = 7200.0
    keepalive_timeout_s: float = 20.0
    keepalive_permit_without_calls: bool = False
    min_ping_interval_s: float = 300.0
    max_ping_strikes: int = 2
    max_connection_idle_s: float = 0.0
    max_connection_age_s: float = 0.0
    max_connection_age_grace_s: float = 0.0
    stall_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0:
                raise ValueError(f"{field.name} is {value}; expected 0 or more")
        if self.keepalive_time_s and not self.keepalive_timeout_s:
            raise ValueError("keepalive_timeout_s is 0; a client needs some time to answer a PING")


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds of all connections of a server together; 0 is none.

    Above ``max_buffered_bytes`` of request messages that no queue has yet and answers that no client took, new messages
    are refused with RESOURCE_EXHAUSTED; what is complete is answered. Above ``max_connections`` a client is
    disconnected at once.
    """

    max_buffered_bytes: int = MAX_BUFFERED_BYTES
    max_connections: int = MAX_CONNECTIONS


def make_rules(life: ConnectionLife) -> ConnectionRules:
    """The same for the compiled core."""
    assert _core.ConnectionRules is not None
    return _core.ConnectionRules(**asdict(life), seed=secrets.randbits(63) | 1)


def make_ledger(limits: ServerLimits) -> ServerLedger:
    """The record in which all drivers of a server keep to the limits."""
    assert _core.ServerLedger is not None
    return _core.ServerLedger(max_bytes=limits.max_buffered_bytes, max_connections=limits.max_connections)


def list_channel_arguments(life: ConnectionLife) -> list[tuple[str, Any]]:
    """The same for grpcio, which has no ``stall_timeout_s``."""

    def milliseconds(seconds: float) -> int:
        return min(int(seconds * 1000), _NEVER_MS) if seconds else _NEVER_MS

    return [
        ("grpc.keepalive_time_ms", milliseconds(life.keepalive_time_s)),
        ("grpc.keepalive_timeout_ms", milliseconds(life.keepalive_timeout_s)),
        ("grpc.keepalive_permit_without_calls", int(life.keepalive_permit_without_calls)),
        ("grpc.http2.min_ping_interval_without_data_ms", int(min(life.min_ping_interval_s * 1000, _NEVER_MS))),
        ("grpc.http2.max_ping_strikes", life.max_ping_strikes),
        ("grpc.max_connection_idle_ms", milliseconds(life.max_connection_idle_s)),
        ("grpc.max_connection_age_ms", milliseconds(life.max_connection_age_s)),
        ("grpc.max_connection_age_grace_ms", milliseconds(life.max_connection_age_grace_s)),
    ]
