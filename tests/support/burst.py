"""Many ModelInfer calls on one connection, as fast as a Python client gets them out; which version answered each."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable

from hpack import Decoder
from http2_peer import ACK, END_HEADERS, END_STREAM, PREFACE, Kind, data, fields_of, frame, headers, prefixed, settings
from running_site import INFER, TIMEOUT_S, encode_values

from aiorch_server._core import decode_response

#: Calls that are open at a time.
OPEN = 200
FRAME_BYTES = 1 << 14
_WINDOW = (1 << 31) - 1
_ROOM = frame(Kind.WINDOW_UPDATE, 0, (_WINDOW - 65_535).to_bytes(4, "big"))


class Burst:
    """One connection; its streams are dispatched in the order of their ids.

    ``explains``: what failed is told in words, which takes much longer.
    """

    def __init__(self, port: int, body: bytes | None = None, *, explains: bool = False) -> None:
        self._body = prefixed(encode_values([1.0])) if body is None else body
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        greeting = PREFACE + settings(INITIAL_WINDOW_SIZE=_WINDOW, MAX_CONCURRENT_STREAMS=0)
        self._socket.sendall(greeting + _ROOM)
        self._next_id = 1
        self._decoder = Decoder() if explains else None
        self._received = b""
        self._parts: dict[int, bytes] = {}
        self._open: set[int] = set()
        self.answers: dict[int, int | str] = {}
        self._is_greeted = False
        while not self._is_greeted:  # before, a stream has little room
            self._receive()

    def __enter__(self) -> Burst:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, keys: Iterable[str]) -> list[int]:
        """Begins a call for each route key ("": without), and gives the ids of their streams."""
        ids: list[int] = []
        parts: list[bytes] = []
        for key in keys:
            fields = fields_of(INFER, ("aiorch-route-key", key)) if key else fields_of()
            parts.append(headers(self._next_id, fields) + self._frame_body())
            ids.append(self._next_id)
            self._next_id += 2
        self._open.update(ids)
        self._socket.sendall(b"".join(parts))
        return ids

    def _frame_body(self) -> bytes:
        last = max(0, len(self._body) - 1) // FRAME_BYTES * FRAME_BYTES
        return b"".join(
            data(self._next_id, self._body[at : at + FRAME_BYTES], END_STREAM if at == last else 0)
            for at in range(0, last + 1, FRAME_BYTES)
        )

    def read(self, most_open: int = 0) -> None:
        """Reads until no more calls are open."""
        while len(self._open) > most_open:
            self._receive()

    def ask(self, count: int, key_of: Callable[[int], str] = lambda index: "") -> list[int | str]:
        """The version that answered each of so many calls, or why it failed; in the order of sending."""
        ids: list[int] = []
        for start in range(0, count, OPEN):
            self.read(OPEN)
            ids += self.send(map(key_of, range(start, min(count, start + OPEN))))
        self.read()
        return [self.answers.pop(id) for id in ids]

    def _receive(self) -> None:
        piece = self._socket.recv(1 << 18)
        assert piece, "the connection was closed"
        self._received += piece
        at, received = 0, self._received
        while len(received) - at >= 9:
            size = int.from_bytes(received[at : at + 3], "big")
            if len(received) - at < 9 + size:
                break
            kind, flags = received[at + 3], received[at + 4]
            stream = int.from_bytes(received[at + 5 : at + 9], "big")
            payload = received[at + 9 : at + 9 + size]
            at += 9 + size
            if kind == Kind.DATA:
                self._parts[stream] = self._parts.get(stream, b"") + payload
            elif kind == Kind.HEADERS and self._decoder is not None:
                payload = str(self._decoder.decode(payload)).encode()
            elif kind == Kind.SETTINGS and not flags & ACK:
                self._is_greeted = True
                self._socket.sendall(frame(Kind.SETTINGS, 0, flags=ACK))
            elif kind == Kind.GOAWAY:
                raise AssertionError(f"GOAWAY: {payload!r}")
            if stream and (flags & END_STREAM or kind == Kind.RST_STREAM):
                assert flags & END_HEADERS or kind != Kind.HEADERS
                self._open.discard(stream)
                message = self._parts.pop(stream, b"")
                self.answers[stream] = (
                    int(decode_response(message[5:])[1]) if message else f"failed: {payload.decode(errors='replace')}"
                )
        self._received = received[at:]
