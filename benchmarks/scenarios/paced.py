"""An open loop of requests at a steady rate, each answer kept and judged: a process of its own, ended by its stdin.

Requests come at random times of a fixed mean rate, as from independent callers, whatever the server does. Each carries
a number, and models here answer ``input + version`` (rollout_models.py), so that an answer tells whose it is and which
version gave it. Unlike the generators of the client package it leaves most of its CPU idle at some thousand requests/s,
so that what else happens beside it does not look like a slow server.

Writes an .npz with a row for each request: ``due_ns``, ``sent_ns``, ``answered_ns`` (0: lost) by the monotonic clock,
``version`` (0: none) and ``code``: gRPC's status, or WRONG.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import struct
import sys
import time
from array import array
from collections import Counter
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from aiorch_proto.v2 import inference_pb2 as pb
from hpack import Decoder, Encoder

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.scenarios.frames import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
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

#: An OK answer that is not that of the version which it names; and a stream that the server broke.
WRONG, BROKEN = 100, 101
#: Inputs are multiples of this and versions stay below it, so that their sum tells both, exactly in FP32.
STEP, NUMBERS = 1024, 8192
_DRAIN_S = 10.0
_NS_PER_S = 1_000_000_000


class Log:
    """What became of each request, by its number."""

    def __init__(self) -> None:
        self.due_ns, self.sent_ns, self.answered_ns = array("q"), array("q"), array("q")
        self.versions, self.codes = array("h"), array("h")
        self.errors: Counter[str] = Counter()

    def open(self, due_ns: int) -> int:
        """A request's number."""
        self.due_ns.append(due_ns)
        self.sent_ns.append(0)
        self.answered_ns.append(0)
        self.versions.append(0)
        self.codes.append(0)
        return len(self.codes) - 1

    def judge(self, number: int, message: bytes) -> None:
        """Keeps the version of an answer, and WRONG where it is not what that version makes of that request."""
        answer = pb.ModelInferResponse.FromString(message)
        version = int(answer.model_version or 0)
        self.versions[number] = version
        expected = struct.pack("<f", number % NUMBERS * STEP + version) * 4
        if list(answer.raw_output_contents) != [expected]:
            self.codes[number] = WRONG


class Connection:
    """One of the callers' connections, any number of requests at once."""

    def __init__(self, port: int, model: str, log: Log) -> None:
        self._log = log
        self._encoder, self._decoder, self._reader = Encoder(), Decoder(), FrameReader()
        self._stream = 1
        self._open: dict[int, tuple[int, bytearray]] = {}
        request = pb.ModelInferRequest(model_name=model)
        request.inputs.add(name="INPUT0", datatype="FP32", shape=(1, 4))
        request.raw_input_contents.append(bytes(16))
        self._message = request.SerializeToString()[:-16]
        self.socket = connect(port, _DRAIN_S)
        self.socket.sendall(greet())

    @property
    def n_open(self) -> int:
        """Requests without an answer."""
        return len(self._open)

    def ask(self, number: int) -> None:
        """Sends the request of that number."""
        message = self._message + struct.pack("<f", number % NUMBERS * STEP) * 4
        data = struct.pack(">BI", 0, len(message)) + message
        head = make_frame(HEADERS, END_HEADERS, self._stream, encode_head(self._encoder))
        self._open[self._stream] = number, bytearray()
        self._log.sent_ns[number] = time.monotonic_ns()
        self.socket.sendall(head + make_frame(DATA, END_STREAM, self._stream, data))
        self._stream += 2

    def receive(self) -> bool:
        """Takes what has come; False where the server closed the connection."""
        received = self.socket.recv(1 << 16)
        now_ns = time.monotonic_ns()
        for kind, flags, stream, payload in self._reader.read(received):
            if kind == DATA:
                self._open[stream][1].extend(payload)
            elif kind == HEADERS:
                fields = dict(self._decoder.decode(payload))
                if flags & END_STREAM:
                    self._finish(stream, now_ns, int(fields["grpc-status"]), fields.get("grpc-message", ""))
            elif kind == RST_STREAM:
                self._finish(stream, now_ns, BROKEN, "the server broke the stream")
            elif kind == SETTINGS and not flags & ACK:
                self.socket.sendall(make_frame(SETTINGS, ACK, 0, b""))
            elif kind == PING and not flags & ACK:
                self.socket.sendall(make_frame(PING, ACK, 0, payload))
            elif kind == GOAWAY:
                self._log.errors["the server said goodbye"] += 1
        return bool(received)

    def _finish(self, stream: int, now_ns: int, code: int, text: str) -> None:
        number, data = self._open.pop(stream)
        log = self._log
        log.answered_ns[number], log.codes[number] = now_ns, code
        if code == 0:
            log.judge(number, bytes(data[5:]))
        else:
            log.errors[f"{code}: {unquote(text)}"] += 1


def raise_precedence() -> bool:
    """Lets this process run whenever it wants to; False where the system does not allow it."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return False
    return True


def drive(connections: list[Connection], log: Log, rate: float, limit: int) -> None:
    """Sends requests until stdin ends or ``limit`` of them are sent, and waits for the answers."""
    chance = random.Random(7)
    by_descriptor = {each.socket.fileno(): each for each in connections}
    stdin = sys.stdin.fileno()
    due_ns = time.monotonic_ns()
    end_ns = 0
    while not end_ns or (any(each.n_open for each in connections) and time.monotonic_ns() < end_ns):
        now_ns = time.monotonic_ns()
        while not end_ns and due_ns <= now_ns:
            number = log.open(due_ns)
            connections[number % len(connections)].ask(number)
            due_ns += round(chance.expovariate(rate) * _NS_PER_S)
            if number + 1 == limit:
                end_ns = now_ns + int(_DRAIN_S * _NS_PER_S)
        wait_s = _DRAIN_S / 10 if end_ns else max(0, due_ns - time.monotonic_ns()) / _NS_PER_S
        ready = select.select([*by_descriptor, *([] if end_ns else [stdin])], (), (), wait_s)[0]
        for descriptor in ready:
            if descriptor == stdin:
                end_ns = time.monotonic_ns() + int(_DRAIN_S * _NS_PER_S)
            elif not by_descriptor[descriptor].receive():
                log.errors["the server closed a connection"] += 1
                del by_descriptor[descriptor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rate", type=float, default=2000.0, help="mean requests/s")
    parser.add_argument("--limit", type=int, default=0, help="end after so many requests; 0: with stdin")
    parser.add_argument("--connections", type=int, default=8)
    options = parser.parse_args()
    log = Log()
    connections = [Connection(options.port, options.model, log) for _ in range(options.connections)]
    has_precedence = raise_precedence()
    print("ready", flush=True)
    with suppress(KeyboardInterrupt):
        drive(connections, log, options.rate, options.limit)
    np.savez(
        options.output,
        due_ns=np.frombuffer(log.due_ns, np.int64),
        sent_ns=np.frombuffer(log.sent_ns, np.int64),
        answered_ns=np.frombuffer(log.answered_ns, np.int64),
        version=np.frombuffer(log.versions, np.int16),
        code=np.frombuffer(log.codes, np.int16),
        errors=np.array([f"{count} x {text}" for text, count in log.errors.items()], np.str_),
        has_precedence=np.array(has_precedence),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
