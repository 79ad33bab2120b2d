"""HTTP/2 as the load generators here speak it: frames made and taken apart, gRPC's request headers."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from enum import StrEnum

from hpack import Encoder, NeverIndexedHeaderTuple

from benchmarks.peers.wires import MODEL_INFER

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Compression(StrEnum):
    """How a client's HPACK sends a header that is the same in each request."""

    INDEXED = "indexed"  # grpc-go, grpc-java: as a number, after the first time
    PLAIN = "plain"  # grpc's C core, and with it Python's: whole, as it is
    HUFFMAN = "huffman"  # libnghttp2, and with it h2load: whole, packed


def make_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame as it is sent."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def encode_head(encoder: Encoder, token: str = "", compression: Compression = Compression.INDEXED) -> bytes:
    """The header block of a ModelInfer; ``token`` is its ``authorization``, if any."""
    fields = [(":method", "POST"), (":scheme", "http"), (":path", MODEL_INFER), (":authority", "127.0.0.1")]
    fields += [("content-type", "application/grpc"), ("te", "trailers")]
    block: bytes = encoder.encode(fields)
    if token and compression is Compression.INDEXED:
        block += encoder.encode([("authorization", token)])
    elif token:
        secret = NeverIndexedHeaderTuple("authorization", token)
        block += encoder.encode([secret], huffman=compression is Compression.HUFFMAN)
    return block


def connect(port: int, timeout_s: float) -> socket.socket:
    """A connection without delays."""
    made = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def greet() -> bytes:
    """What a client sends first: no settings of its own, and a window for the connection that never closes."""
    window = make_frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", (1 << 31) - 1 - 65535))
    return _PREFACE + make_frame(SETTINGS, 0, 0, b"") + window


class FrameReader:
    """Takes received bytes apart; what is not whole yet is kept."""

    def __init__(self) -> None:
        self._rest = b""

    def read(self, received: bytes) -> Iterator[tuple[int, int, int, bytes]]:
        """Kind, flags, stream and payload of each frame that is whole by now."""
        received = self._rest + received
        at = 0
        while len(received) - at >= 9:
            size = int.from_bytes(received[at : at + 3], "big")
            if len(received) - at < 9 + size:
                break
            kind, flags = received[at + 3], received[at + 4]
            stream = int.from_bytes(received[at + 5 : at + 9], "big")
            yield kind, flags, stream, received[at + 9 : at + 9 + size]
            at += 9 + size
        self._rest = received[at:]
