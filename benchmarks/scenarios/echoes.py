"""A load generator whose header compression is chosen: h2load never indexes `authorization`, most gRPC clients do.

One request at a time on each connection, all from one thread; what is sent is prepared, what comes is only counted.
"""

from __future__ import annotations

import select
import socket
import struct
from enum import StrEnum

from hpack import Encoder, NeverIndexedHeaderTuple

from benchmarks.peers.h2load import LoadFailed
from benchmarks.peers.wires import MODEL_INFER

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _WINDOW_UPDATE = 0, 1, 4, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_TIMEOUT_S = 60.0


class Compression(StrEnum):
    """How a client's HPACK sends a header that is the same in each request."""

    INDEXED = "indexed"  # grpc-go, grpc-java: as a number, after the first time
    PLAIN = "plain"  # grpc's C core, and with it Python's: whole, as it is
    HUFFMAN = "huffman"  # libnghttp2, and with it h2load: whole, packed


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _encode(encoder: Encoder, token: str, compression: Compression) -> bytes:
    fields = [(":method", "POST"), (":scheme", "http"), (":path", MODEL_INFER), (":authority", "127.0.0.1")]
    fields += [("content-type", "application/grpc"), ("te", "trailers")]
    block: bytes = encoder.encode(fields)
    if token and compression is Compression.INDEXED:
        block += encoder.encode([("authorization", token)])
    elif token:
        secret = NeverIndexedHeaderTuple("authorization", token)
        block += encoder.encode([secret], huffman=compression is Compression.HUFFMAN)
    return block


class _Connection:
    """One request after the other; the bytes of all but the first differ in their stream's number alone."""

    def __init__(self, port: int, payload: bytes, token: str, compression: Compression) -> None:
        encoder = Encoder()
        self._first, self._later = (_encode(encoder, token, compression) for _ in range(2))
        self._payload, self._received, self._stream = payload, b"", 1
        self.answers = self.data_bytes = 0
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        window = _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", (1 << 31) - 1 - 65535))
        self.socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, b"") + window)

    def ask(self) -> None:
        block = self._first if self._stream == 1 else self._later
        head = _frame(_HEADERS, _END_HEADERS, self._stream, block)
        self.socket.sendall(head + _frame(_DATA, _END_STREAM, self._stream, self._payload))
        self._stream += 2

    def receive(self) -> bool:
        """Whether the answer is complete."""
        received = self.socket.recv(65536)
        if not received:
            raise LoadFailed("the server closed a connection")
        received = self._received + received
        at, is_complete = 0, False
        while len(received) - at >= 9:
            size, kind, flags = int.from_bytes(received[at : at + 3], "big"), received[at + 3], received[at + 4]
            if len(received) - at < 9 + size:
                break
            at += 9 + size
            if kind == _DATA:
                self.data_bytes += size
            elif kind == _HEADERS and flags & _END_STREAM:
                self.answers += 1
                is_complete = True
            elif kind == _SETTINGS and not flags & _ACK:
                self.socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))
        self._received = received[at:]
        return is_complete


class Echoes:
    """``connections`` clients that show ``token``, or none; from ``with`` to the end of the block."""

    def __init__(self, port: int, payload: bytes, connections: int, token: str, compression: Compression) -> None:
        self._clients = [_Connection(port, payload, token, compression) for _ in range(connections)]

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
