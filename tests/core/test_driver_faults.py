"""One connection's accident, or an order to exit, costs no other connection its turn."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import hpack
import pytest
from hyperframe.frame import DataFrame, Frame, HeadersFrame, PingFrame, SettingsFrame

from aiorch_server import _core

TIMEOUT_S = 20
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize()


def write_call(path: str, stream_id: int, encoder: hpack.Encoder) -> bytes:
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"), ("te", "trailers")]
    head = HeadersFrame(stream_id, encoder.encode([*fields, ("content-type", "application/grpc")]))
    head.flags.add("END_HEADERS")
    body = DataFrame(stream_id, b"\0\0\0\0\0")
    body.flags.add("END_STREAM")
    return bytes(head.serialize() + body.serialize())


def read_frames(data: bytes) -> Iterator[Frame]:
    while len(data) >= 9:
        frame, size = Frame.parse_frame_header(memoryview(data[:9]))
        frame.parse_body(memoryview(data[9 : 9 + size]))
        yield frame
        data = data[9 + size :]


class FakeTransport:
    """Keeps what is written; or fails, once it is told to."""

    def __init__(self) -> None:
        self.written = b""
        self.fails = False
        self.is_aborted = False

    def write(self, data: bytes) -> None:
        if self.fails:
            raise MemoryError("no room for more")
        self.written += data

    def abort(self) -> None:
        self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_aborted

    def get_extra_info(self, name: str) -> None:
        return None

    def set_write_buffer_limits(self, high: int) -> None:
        pass


class Loop(asyncio.SelectorEventLoop):
    """Goes on where somebody has asked to exit, and counts that."""

    exits = 0

    def run_on(self, is_done: Callable[[], bool]) -> None:
        end = time.monotonic() + TIMEOUT_S
        while not is_done():
            assert time.monotonic() < end, "the state was not reached"
            self.call_later(0.01, self.stop)
            try:
                self.run_forever()
            except SystemExit:
                self.exits += 1


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def greet(server: Any) -> tuple[Any, FakeTransport]:
    protocol, transport = server.make_protocol(), FakeTransport()
    protocol.connection_made(transport)
    return protocol, transport


def receive(protocol: Any, data: bytes) -> None:
    protocol.get_buffer(-1)[: len(data)] = data
    protocol.buffer_updated(len(data))


def test_a_connection_that_cannot_write_leaves_the_others_their_turn(loop: Loop) -> None:
    assert _core.NativeServer is not None
    errors: list[Any] = []
    loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
    server = _core.NativeServer(loop, lambda call: call.finish(0, ""))
    peers = [greet(server) for _ in range(3)]
    peers[0][1].fails = True
    for protocol, _ in peers:
        receive(protocol, GREETING + PingFrame(0, b"are you?").serialize())
    loop.run_on(lambda: bool(errors))
    assert [type(error) for error in errors] == [MemoryError]
    assert [transport.is_aborted for _, transport in peers] == [True, False, False]
    for _, transport in peers[1:]:
        assert any(isinstance(frame, PingFrame) for frame in read_frames(transport.written))
    for protocol, _ in peers:
        protocol.connection_lost(None)
    server.close()


def exit_or_answer(call: Any) -> None:
    if call.path == "/x/Exit":
        raise SystemExit(3)
    call.finish(0, "")


def count_ends(data: bytes) -> int:
    return sum(isinstance(frame, HeadersFrame) and "END_STREAM" in frame.flags for frame in read_frames(data))


def test_an_order_to_exit_leaves_the_loops_calls_answered(loop: Loop) -> None:
    assert _core.NativeServer is not None
    server = _core.NativeServer(loop, exit_or_answer)
    peers = [greet(server) for _ in range(3)]
    for number, (protocol, _) in enumerate(peers):
        encoder = hpack.Encoder()
        calls = write_call("/x/Exit" if number == 0 else "/x/Call", 1, encoder) + write_call("/x/Call", 3, encoder)
        try:
            receive(protocol, GREETING + calls)
        except SystemExit:
            loop.exits += 1
    loop.run_on(lambda: all(count_ends(transport.written) == 2 for _, transport in peers))
    assert loop.exits == 1
    for protocol, _ in peers:
        protocol.connection_lost(None)
    server.close()


def test_an_order_to_exit_leaves_the_threads_calls_answered(loop: Loop) -> None:
    assert _core.IoThread is not None
    listener = socket.create_server(("127.0.0.1", 0))
    thread = _core.IoThread(loop, exit_or_answer)
    thread.listen(listener.fileno())
    thread.start()
    client = socket.create_connection(listener.getsockname(), TIMEOUT_S)
    encoder = hpack.Encoder()
    paths = ["/x/Call", "/x/Exit", "/x/Call", "/x/Call"]
    client.sendall(GREETING + b"".join(write_call(path, 2 * at + 1, encoder) for at, path in enumerate(paths)))
    client.setblocking(False)
    received = b""

    def is_answered() -> bool:
        nonlocal received
        with contextlib.suppress(BlockingIOError):
            received += client.recv(65536)
        return count_ends(received) == len(paths)

    try:
        loop.run_on(is_answered)
        assert loop.exits == 1
    finally:
        client.close()
        listener.close()
        thread.close()
