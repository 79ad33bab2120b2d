"""Sends one request at times fixed beforehand, whatever the server does.

``timed.py PORT TIMES MESSAGE OUTPUT [DRAIN [CONNECTIONS]]``: TIMES is an .npz with ``times_ns`` from the start,
MESSAGE a serialised ModelInferRequest. OUTPUT gets, for each request, ``sent_ns`` and ``answered_ns`` on the monotonic
clock (0: never) and ``code``, gRPC's status. Answers are waited for DRAIN seconds after the last was due. A process of
its own, so that it can have a core of its own; it takes as little part in HTTP/2's header compression as it may (a
table of size 0), which makes equal headers equal bytes.
"""

from __future__ import annotations

import select
import struct
import sys
import time
from pathlib import Path

import numpy as np
from hpack import Decoder, Encoder

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.scenarios.frames import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    FrameReader,
    connect,
    encode_head,
    greet,
    make_frame,
)
from benchmarks.scenarios.paced import raise_precedence

CONNECTIONS = 8
_DRAIN_S = 10.0
_NO_TABLE = make_frame(SETTINGS, 0, 0, struct.pack(">HI", 1, 0))
_FRAME_BYTES = 16384


class Caller:
    """One connection, any number of requests at once."""

    def __init__(self, port: int, message: bytes, codes: dict[bytes, int]) -> None:
        self.socket = connect(port, _DRAIN_S)
        self.socket.sendall(greet() + _NO_TABLE)
        self._encoder, self._reader, self._codes = Encoder(), FrameReader(), codes
        self._stream = 1
        self._open: dict[int, int] = {}
        data = struct.pack(">BI", 0, len(message)) + message
        self._pieces = [data[at : at + _FRAME_BYTES] for at in range(0, len(data), _FRAME_BYTES)]

    @property
    def n_open(self) -> int:
        return len(self._open)

    def ask(self, number: int) -> None:
        last = len(self._pieces) - 1
        frames = [make_frame(HEADERS, END_HEADERS, self._stream, encode_head(self._encoder))]
        frames += [
            make_frame(DATA, END_STREAM if index == last else 0, self._stream, piece)
            for index, piece in enumerate(self._pieces)
        ]
        self._open[self._stream] = number
        self._stream += 2
        self.socket.sendall(b"".join(frames))

    def receive(self) -> list[tuple[int, int]]:
        """``(number, code)`` of each request that has ended."""
        ended = []
        for kind, flags, stream, payload in self._reader.read(self.socket.recv(1 << 18)):
            if kind == HEADERS and flags & END_STREAM:
                if payload not in self._codes:
                    fields = dict(Decoder().decode(payload))
                    self._codes[payload] = int(fields["grpc-status"])
                ended.append((self._open.pop(stream), self._codes[payload]))
            elif kind == RST_STREAM:
                ended.append((self._open.pop(stream), 100))
            elif kind in (SETTINGS, PING) and not flags & ACK:
                self.socket.sendall(make_frame(kind, ACK, 0, payload if kind == PING else b""))
        return ended


def main() -> int:
    port, times_path, message_path, output = int(sys.argv[1]), *map(Path, sys.argv[2:5])
    drain_s = float(sys.argv[5]) if len(sys.argv) > 5 else _DRAIN_S
    n_connections = int(sys.argv[6]) if len(sys.argv) > 6 else CONNECTIONS
    with np.load(times_path) as stored:
        due_ns = stored["times_ns"].tolist()
    codes: dict[bytes, int] = {}
    callers = [Caller(port, message_path.read_bytes(), codes) for _ in range(n_connections)]
    by_descriptor = {each.socket.fileno(): each for each in callers}
    sent_ns, answered_ns = np.zeros((2, len(due_ns)), np.int64)
    code = np.full(len(due_ns), -1, np.int16)
    has_precedence = raise_precedence()
    poll = select.epoll()
    for descriptor in by_descriptor:
        poll.register(descriptor, select.EPOLLIN)
    begun_ns = time.monotonic_ns() + 20_000_000
    number, end_ns = 0, 0
    while number < len(due_ns) or (any(each.n_open for each in callers) and time.monotonic_ns() < end_ns):
        while number < len(due_ns) and begun_ns + due_ns[number] <= (now_ns := time.monotonic_ns()):
            sent_ns[number] = now_ns
            callers[number % n_connections].ask(number)
            number += 1
        if number == len(due_ns):
            end_ns = end_ns or time.monotonic_ns() + int(drain_s * 1e9)
            wait_s = 0.1
        else:
            wait_s = max(0.0, (begun_ns + due_ns[number] - time.monotonic_ns()) / 1e9)
        # epoll counts in milliseconds: the last of them is spent asking again and again
        for descriptor, _ in poll.poll(max(0.0, wait_s - 0.001)):
            ended = by_descriptor[descriptor].receive()
            now_ns = time.monotonic_ns()
            for which, status in ended:
                answered_ns[which], code[which] = now_ns, status
    np.savez(
        output, due_ns=begun_ns + np.array(due_ns, np.int64), sent_ns=sent_ns, answered_ns=answered_ns, code=code,
        has_precedence=np.array(has_precedence),
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
