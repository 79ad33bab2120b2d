"""A load generator whose header compression is chosen: h2load never indexes `authorization`, most gRPC clients do.

One request at a time on each connection, all from one thread; what is sent is prepared, what comes is only counted.
"""

from __future__ import annotations

import select
import ssl

from hpack import Encoder

from benchmarks.peers.h2load import LoadFailed
from benchmarks.scenarios.frames import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    SETTINGS,
    Compression,
    FrameReader,
    connect,
    encode_head,
    greet,
    make_frame,
)

_TIMEOUT_S = 60.0


class _Connection:
    """One request after the other; the bytes of all but the first differ in their stream's number alone."""

    def __init__(
        self, port: int, payload: bytes, token: str, compression: Compression, tls: ssl.SSLContext | None
    ) -> None:
        encoder = Encoder()
        self._first, self._later = (encode_head(encoder, token, compression) for _ in range(2))
        self._payload, self._reader, self._stream = payload, FrameReader(), 1
        self.answers = self.data_bytes = 0
        plain = connect(port, _TIMEOUT_S)
        self.socket = plain if tls is None else tls.wrap_socket(plain, server_hostname="127.0.0.1")
        self.socket.sendall(greet())

    def ask(self) -> None:
        block = self._first if self._stream == 1 else self._later
        head = make_frame(HEADERS, END_HEADERS, self._stream, block)
        self.socket.sendall(head + make_frame(DATA, END_STREAM, self._stream, self._payload))
        self._stream += 2

    def receive(self) -> bool:
        """Whether the answer is complete."""
        received = self.socket.recv(65536)
        if not received:
            raise LoadFailed("the server closed a connection")
        while isinstance(self.socket, ssl.SSLSocket) and self.socket.pending():
            received += self.socket.recv(65536)
        is_complete = False
        for kind, flags, _, payload in self._reader.read(received):
            if kind == DATA:
                self.data_bytes += len(payload)
            elif kind == HEADERS and flags & END_STREAM:
                self.answers += 1
                is_complete = True
            elif kind == SETTINGS and not flags & ACK:
                self.socket.sendall(make_frame(SETTINGS, ACK, 0, b""))
        return is_complete


class Echoes:
    """``connections`` clients that show ``token``, or none; ``close`` ends them."""

    def __init__(
        self,
        port: int,
        payload: bytes,
        connections: int,
        *,
        token: str = "",
        compression: Compression = Compression.INDEXED,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._clients = [_Connection(port, payload, token, compression, tls) for _ in range(connections)]

    def run(self, requests: int, response_bytes: int) -> None:
        """``requests`` calls, as equal shares; LoadFailed unless each got so many bytes of DATA."""
        share = requests // len(self._clients)
        poll = select.epoll()
        by_descriptor = {client.socket.fileno(): client for client in self._clients}
        ends = {client: client.answers + share for client in self._clients}
        before = sum(client.data_bytes for client in self._clients)
        for client in self._clients:
            poll.register(client.socket.fileno(), select.EPOLLIN)
            client.ask()
        open_ = len(ends)
        while open_:
            ready = poll.poll(_TIMEOUT_S)
            if not ready:
                raise LoadFailed(f"no answer for {_TIMEOUT_S:g} s")
            for descriptor, _ in ready:
                client = by_descriptor[descriptor]
                if client.receive():
                    if client.answers < ends[client]:
                        client.ask()
                    else:
                        poll.unregister(descriptor)
                        open_ -= 1
        poll.close()
        received = sum(client.data_bytes for client in self._clients) - before
        if received != share * len(self._clients) * response_bytes:
            raise LoadFailed(f"{share * len(self._clients)} answers carried {received} bytes of DATA")

    def close(self) -> None:
        """Ends the connections."""
        for client in self._clients:
            client.socket.close()
