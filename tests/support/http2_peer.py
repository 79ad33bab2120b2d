"""An HTTP/2 client made of single frames: it says what a test wants, right or wrong, and reads what comes back."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from hpack import Decoder
from hpack.hpack import encode_integer
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
)
from patience import PATIENCE
from running_site import INFER, decode_values, encode_values

LIMIT_S = 3.0 * PATIENCE
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
VALUES = [1.5, -2.0, 0.25]

Fields = Iterable[tuple[str | bytes, str | bytes]]


class Error(IntEnum):
    """RFC 9113, 7."""

    NO_ERROR = 0
    PROTOCOL = 1
    INTERNAL = 2
    FLOW_CONTROL = 3
    STREAM_CLOSED = 5
    FRAME_SIZE = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION = 9
    ENHANCE_YOUR_CALM = 11


class Kind(IntEnum):
    """RFC 9113, 6."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20


def frame(kind: int, stream_id: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """RFC 9113, 4.1; nothing is checked."""
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags])
    return head + stream_id.to_bytes(4, "big") + payload


SETTINGS = frame(Kind.SETTINGS, 0)
GREETING = PREFACE + SETTINGS


def settings(**values: int) -> bytes:
    """A SETTINGS frame; names as hyperframe has them."""
    return SettingsFrame(0, {getattr(SettingsFrame, name): value for name, value in values.items()}).serialize()


def encode_fields(fields: Fields) -> bytes:
    """Literals that are never indexed (RFC 7541, 6.2.3): no state, any octets."""
    block = b""
    for pair in fields:
        block += b"\x10"
        for text in pair:
            octets = text.encode() if isinstance(text, str) else text
            block += bytes(encode_integer(len(octets), 7)) + octets
    return block


def fields_of(path: str = INFER, *more: tuple[str | bytes, str | bytes], **replaced: str | None) -> list[Fields]:
    """What a gRPC client sends; ``replaced`` gives other values (None: leaves out), with _ for : and -."""
    fields: dict[str, str | None] = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost"}
    fields |= {"te": "trailers", "content-type": "application/grpc"}
    for name, value in replaced.items():
        fields[f":{name[1:]}" if name.startswith("_") else name.replace("_", "-")] = value
    return [*((name, value) for name, value in fields.items() if value is not None), *more]  # type: ignore[list-item]


def headers(stream_id: int, fields: Fields | None = None, flags: int = END_HEADERS) -> bytes:
    return frame(Kind.HEADERS, stream_id, encode_fields(fields_of() if fields is None else fields), flags)


def data(stream_id: int, content: bytes, flags: int = END_STREAM) -> bytes:
    return frame(Kind.DATA, stream_id, content, flags)


def prefixed(message: bytes, flag: int = 0) -> bytes:
    """A gRPC message on the wire: compressed flag, length, message."""
    return bytes([flag]) + len(message).to_bytes(4, "big") + message


def infer_message(model: str = "identity") -> bytes:
    return prefixed(encode_values(VALUES, model))


def call(stream_id: int, fields: Fields | None = None, body: bytes | None = None) -> bytes:
    """A whole request: by default a right ModelInfer."""
    return headers(stream_id, fields) + data(stream_id, infer_message() if body is None else body)


@dataclass
class Answer:
    """What came on one stream."""

    blocks: list[dict[str, str]] = field(default_factory=list)
    data: bytes = b""
    data_sizes: list[int] = field(default_factory=list)
    is_ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int:
        return int(self.blocks[-1]["grpc-status"])

    @property
    def details(self) -> str:
        """The status message, still percent-encoded."""
        return self.blocks[-1].get("grpc-message", "")

    @property
    def is_over(self) -> bool:
        return self.is_ended or self.reset is not None

    def check(self) -> None:
        """It is the right answer to infer_message()."""
        assert self.is_ended and self.reset in (None, Error.NO_ERROR), self
        assert [block.get(":status") for block in self.blocks] == ["200", None], self
        assert self.blocks[0]["content-type"].startswith("application/grpc")
        assert self.status == 0, self
        assert self.data[:5] == b"\0" + (len(self.data) - 5).to_bytes(4, "big")
        assert decode_values(self.data[5:]) == VALUES


class Peer:
    """One connection. Acknowledges the server's settings; everything else is the test's to say."""

    def __init__(self, port: int, greeting: bytes = GREETING, *, is_eager: bool = False) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), LIMIT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.until = time.monotonic() + LIMIT_S
        self.frames: list[Frame] = []
        self.answers: dict[int, Answer] = {}
        self.decoder = Decoder()
        self.is_closed = False
        self._received = b""
        self._block = b""
        self.send(greeting)
        if not is_eager:
            self.read_until(lambda: any(isinstance(each, SettingsFrame) for each in self.frames))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *parts: bytes) -> bool:
        """False where the server has closed the connection already."""
        try:
            self.socket.sendall(b"".join(parts))
        except ConnectionError:
            return False
        return True

    def read_until(self, is_enough: Callable[[], object]) -> None:
        """Reads on; fails at the deadline, and when the connection is closed before."""
        while not is_enough():
            assert not self.is_closed, f"the connection was closed after {self.frames}"
            self._read()

    def read_to_end(self) -> None:
        while not self.is_closed:
            self._read()

    def _read(self) -> None:
        left_s = self.until - time.monotonic()
        assert left_s > 0, f"nothing more within {LIMIT_S} s after {self.frames}"
        self.socket.settimeout(left_s)
        try:
            received = self.socket.recv(1 << 18)
        except ConnectionError:
            received = b""
        except TimeoutError:
            raise AssertionError(f"the server is silent after {self.frames}") from None
        self.is_closed = not received
        self._received += received
        at = 0
        while len(self._received) - at >= 9:
            view = memoryview(self._received)[at:]
            parsed, size = Frame.parse_frame_header(view[:9])
            if len(view) < 9 + size:
                break
            parsed.parse_body(view[9 : 9 + size])
            at += 9 + size
            self._take(parsed)
        self._received = self._received[at:]

    def _take(self, parsed: Frame) -> None:
        self.frames.append(parsed)
        answer = self.answers.setdefault(parsed.stream_id, Answer())
        match parsed:
            case SettingsFrame() if "ACK" not in parsed.flags:
                self.send(frame(Kind.SETTINGS, 0, flags=ACK))
            case HeadersFrame() | ContinuationFrame():
                self._block += parsed.data
                if "END_HEADERS" in parsed.flags:
                    answer.blocks.append({str(name): str(value) for name, value in self.decoder.decode(self._block)})
                    self._block = b""
            case DataFrame():
                answer.data += parsed.data
                answer.data_sizes.append(len(parsed.data))
            case RstStreamFrame():
                answer.reset = parsed.error_code
        answer.is_ended = answer.is_ended or "END_STREAM" in parsed.flags

    # ------------------------------------------------------------------------------------------------- what is awaited

    def ping_until(self, is_true: Callable[[], object]) -> None:
        """Asks again and again, one round trip of the connection apart; fails at the deadline."""
        count = 0
        while not is_true():
            count += 1
            self.expect_pong(count.to_bytes(8, "big"))

    def read_answer(self, stream_id: int = 1) -> Answer:
        """The stream's answer, when it has ended or was reset."""
        self.read_until(lambda: stream_id in self.answers and self.answers[stream_id].is_over)
        return self.answers[stream_id]

    def expect_alive(self) -> None:
        """The connection goes on: a PING comes back, and a stream with the highest id is answered rightly."""
        self.expect_pong(b"alive???")
        self.send(call(2**31 - 1))
        self.read_answer(2**31 - 1).check()

    def expect_pong(self, payload: bytes) -> None:
        self.send(frame(Kind.PING, 0, payload))
        self.read_until(
            lambda: any(isinstance(each, PingFrame) and each.opaque_data == payload for each in self.frames)
        )

    def expect_goaway(self, *codes: int) -> None:
        """A connection error (RFC 9113, 5.4.1): GOAWAY with one of the codes, then the end."""
        self.read_to_end()
        said = [each.error_code for each in self.frames if isinstance(each, GoAwayFrame)]
        assert said and said[-1] in codes, f"expected GOAWAY with {codes}, got {self.frames}"

    def expect_reset(self, *codes: int, stream_id: int = 1) -> None:
        """A stream error (RFC 9113, 5.4.2): RST_STREAM with one of the codes; the connection goes on."""
        answer = self.read_answer(stream_id)
        assert answer.reset in codes, f"expected RST_STREAM with {codes}, got {self.frames}"
        assert answer.blocks == [], f"the call was answered too: {answer}"
        self.expect_alive()
