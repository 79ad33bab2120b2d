from asyncio import AbstractEventLoop, Future
from collections.abc import Callable

from aiorch_server._core.call import Call
from aiorch_server._core.h2_ledger import ServerLedger
from aiorch_server._core.h2_life import ConnectionRules
from aiorch_server._core.passes import Passes
from aiorch_server._core.routes import Router
from aiorch_server._core.tls import TlsContext

class IoThread:
    """One epoll thread with all its connections; sizes in bytes, bounds per connection."""

    def __init__(
        self,
        loop: AbstractEventLoop,
        on_call: Callable[[Call], None],
        router: Router | None = None,
        *,
        fast_path: str = "",
        max_message_bytes: int = ...,
        max_concurrent_streams: int = ...,
        max_header_list_bytes: int = ...,
        stream_window_bytes: int = ...,
        connection_window_bytes: int = ...,
        max_buffered_bytes: int = ...,
        max_outbound_bytes: int = ...,
        high_water_bytes: int = ...,
        greeting_timeout_s: float = ...,
        write_timeout_s: float = ...,
        rules: ConnectionRules | None = None,
        ledger: ServerLedger | None = None,
        packed_encodings: int = 0,
        passes: Passes | None = None,
    ) -> None: ...
    def listen(self, descriptor: int, tls: TlsContext | None = None) -> None: ...
    def start(self, name: str = ...) -> int: ...
    @property
    def connections(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    def drain(self) -> None: ...
    def cancel_calls(self, code: int, text: str) -> None: ...
    def abort_connections(self) -> None: ...
    def wait_disconnected(self) -> Future[None]: ...
    def close(self) -> None: ...
