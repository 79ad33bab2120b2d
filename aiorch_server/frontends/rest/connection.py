"""One HTTP/1.1 connection whose client must not keep the server waiting for ever."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Where the scope's state has the certificate in DER that a client has proved; None without one, missing without TLS.
PEER_CERTIFICATE: Final = "peer_certificate"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a client may take, and how much of a request's head is kept while it is incomplete.

    ``head_timeout_s`` is for a whole head, from the connection or from the head's first byte; ``keep_alive_s`` for the
    silence between an answer and the next request; ``write_timeout_s`` for taking no byte of an answer.
    """

    head_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    write_timeout_s: float = 60.0
    max_head_bytes: int = 16 * 1024


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with the ends that it lacks: to heads that do not come and answers that are not taken.

    Bodies are timed where they are read. Connections beyond the limit get 503 from uvicorn once they ask something;
    beyond twice the limit they are closed at once, because those that never ask are not worth a descriptor.
    """

    def __init__(self, *args: Any, patience: Patience, **named: Any) -> None:
        super().__init__(*args, **named)
        self.timeout_keep_alive = patience.keep_alive_s  # type: ignore[assignment]
        self._patience = patience
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unsent_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client is there; its first head is awaited from now on."""
        super().connection_made(transport)
        ssl_object = transport.get_extra_info("ssl_object")
        if ssl_object is not None:
            self.app_state = {**self.app_state, PEER_CERTIFICATE: ssl_object.getpeercert(binary_form=True)}
        if self.limit_concurrency is not None and len(self.connections) > 2 * self.limit_concurrency:
            transport.abort()
        else:
            self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end; no timer is left."""
        super().connection_lost(exc)
        self._stop_head_timer()
        self._stop_write_timer()
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Bytes of a head or a body."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._time_head()

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        super().pause_writing()
        self._time_write()

    def resume_writing(self) -> None:
        """The client has taken nearly all."""
        super().resume_writing()
        self._stop_write_timer()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP, unless the answer before it was to be the last; the application's goes nowhere."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.transport.close()

    def _time_head(self) -> None:
        self._head_timer = self.loop.call_later(self._patience.head_timeout_s, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _time_write(self) -> None:
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self._patience.write_timeout_s, self._look_at_write)

    def _look_at_write(self) -> None:
        if self.transport.get_write_buffer_size() >= self._unsent_bytes:
            self.transport.abort()
        else:
            self._time_write()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
