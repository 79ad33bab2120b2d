"""A gRPC session and a client joined by memory: the ``h2`` package plays the client, the test plays the driver."""

from __future__ import annotations

import importlib
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import hyperframe.frame

# The probe is for these tests alone, so ``_core`` does not export it.
SessionProbe: Any = importlib.import_module("aiorch_server._core.h2_probe").SessionProbe

CALL, MESSAGE, HALF_CLOSE, WRITABLE, OVER = 1, 2, 4, 8, 16
FAST, SLOW = "/fast/Call", "/slow/Call"
EMPTY = {
    "streams": 0,
    "in_flight": 0,
    "partial_bytes": 0,
    "unread_bytes": 0,
    "withheld_bytes": 0,
    "outbound_bytes": 0,
    "next_deadline_ns": 0,
}


def frame(message: bytes, *, flag: int = 0) -> bytes:
    return bytes([flag]) + len(message).to_bytes(4, "big") + message


class Pair:
    """A server session and a client, joined by memory; ``piece`` is how many bytes travel at once."""

    def __init__(self, *, piece: int = 1 << 20, window: int = 1 << 24, **options: Any) -> None:
        self.server = SessionProbe(fast_path=FAST.encode(), **options)
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.client.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.client.initiate_connection()
        if window > 65535:
            self.client.increment_flow_control_window(window)
        self.piece = piece
        self.now_ns = 1
        self.headers: dict[int, list[dict[str, str]]] = {}
        self.data: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.resets: dict[int, int] = {}
        self.acknowledges = True
        self.run()

    def run(self) -> None:
        """Moves bytes both ways until nobody has any."""
        while True:
            sent = self.client.data_to_send()
            for at in range(0, len(sent), self.piece):
                self.server.feed(sent[at : at + self.piece], self.now_ns)
            answered = self.server.collect() or b""
            if not sent and not answered:
                return
            for event in self.client.receive_data(answered):
                self._note(event)

    def _note(self, event: Any) -> None:
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            self.headers.setdefault(event.stream_id, []).append(dict(event.headers))
        elif isinstance(event, h2.events.DataReceived):
            self.data[event.stream_id] = self.data.get(event.stream_id, b"") + event.data
            if self.acknowledges and event.flow_controlled_length:
                self.client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self.ended.add(event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            self.resets[event.stream_id] = event.error_code

    def open(self, path: str, body: bytes | None = None, *, end: bool = True, **headers: str) -> int:
        """A request; ``headers`` replace or add to the usual ones, with _ for -."""
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
        fields["content-type"] = "application/grpc"
        for name, value in headers.items():
            fields[":method" if name == "method" else name.replace("_", "-")] = value
        stream_id = self.client.get_next_available_stream_id()
        self.client.send_headers(stream_id, list(fields.items()), end_stream=end and body is None)
        self.run()
        if body is not None:
            self.send(stream_id, body, end=end)
        return stream_id

    def send(self, stream_id: int, body: bytes, *, end: bool = False) -> None:
        while True:
            self.run()
            if stream_id in self.ended:  # an early answer makes the rest unwanted
                return
            room = min(self.client.local_flow_control_window(stream_id), self.client.max_outbound_frame_size)
            head, body = body[:room], body[room:]
            self.client.send_data(stream_id, head, end_stream=end and not body)
            if not body:
                break
            assert room, "the server does not open its window"
        self.run()

    def reset(self, stream_id: int) -> None:
        self.client.reset_stream(stream_id, 8)
        self.run()

    def status(self, stream_id: int) -> tuple[int, str]:
        """Status and (still encoded) message of an ended stream."""
        assert stream_id in self.ended, f"stream {stream_id} has not ended"
        last = self.headers[stream_id][-1]
        return int(last["grpc-status"]), last.get("grpc-message", "")

    def check_next_call(self) -> None:
        """Whatever happened, the next call is right and the books are clear."""
        stream_id = self.open(FAST, frame(b"ping"))
        assert self.server.take_ready() == [(stream_id, b"ping", 0)]
        self.server.answer(stream_id, b"pong")
        self.run()
        assert self.data[stream_id] == frame(b"pong")
        assert self.status(stream_id) == (0, "")
        assert self.server.books == EMPTY


# --------------------------------------------------------------------------------------- cancelled at any moment


def read_frames(data: bytes | None) -> list[hyperframe.frame.Frame]:
    assert data is not None
    frames = []
    while data:
        header, size = hyperframe.frame.Frame.parse_frame_header(memoryview(data[:9]))
        header.parse_body(memoryview(data[9 : 9 + size]))
        frames.append(header)
        data = data[9 + size :]
    return frames
