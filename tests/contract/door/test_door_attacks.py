"""Clients that mean harm, on raw sockets: the server stays up, and the next call of somebody else is right."""

from __future__ import annotations

import contextlib
import gzip
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

import h2.config
import h2.connection
import h2.errors
import h2.events
import hpack
import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from aiorch_server.frontends.grpc import ConnectionLife, ConnectionLimits
from aiorch_server.frontends.unpacking import UnpackBudget

from .conftest import NATIVE, SERVICE, TIMEOUT_S, Door, wait_until

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ECHO = f"/{SERVICE}/Echo"
WAIT = f"/{SERVICE}/Wait"


def fields_of(path: str, **more: str) -> list[tuple[str, str]]:
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"), ("te", "trailers")]
    return [*fields, ("content-type", "application/grpc"), *more.items()]


def headers(stream_id: int, path: str, *flags: str, **more: str) -> bytes:
    """A HEADERS frame that needs no compression state: all literals."""
    block = hpack.Encoder().encode([hpack.NeverIndexedHeaderTuple(*pair) for pair in fields_of(path, **more)])
    return bytes(HeadersFrame(stream_id, block, flags=[*flags]).serialize())


def message(content: bytes) -> bytes:
    return b"\0" + len(content).to_bytes(4, "big") + content


class Attacker:
    def __init__(self, door: Door, greeting: bytes = PREFACE + SettingsFrame(0).serialize()) -> None:
        self.socket = socket.create_connection(("127.0.0.1", door.port), TIMEOUT_S)
        self.received = b""
        self.send(greeting)

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """False when the server has closed the connection."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def half_close(self) -> None:
        with contextlib.suppress(OSError):  # the server may have been quicker to close
            self.socket.shutdown(socket.SHUT_WR)

    def frames(self) -> list[Frame]:
        """All frames that have come."""
        found, data = [], self.received
        while len(data) >= 9:
            frame, size = Frame.parse_frame_header(memoryview(data[:9]))
            if len(data) < 9 + size:
                break
            frame.parse_body(memoryview(data[9 : 9 + size]))
            found.append(frame)
            data = data[9 + size :]
        return found

    def read_until(self, is_enough: Callable[[list[Frame]], bool]) -> list[Frame]:
        while not is_enough(frames := self.frames()):
            data = self.socket.recv(65536)
            assert data, f"the connection was closed after {frames}"
            self.received += data
        return frames

    def read_to_end(self) -> list[Frame]:
        """Reads until the server closes; an abrupt close counts."""
        try:
            while data := self.socket.recv(65536):
                self.received += data
        except ConnectionError:
            pass
        return self.frames()


def expect_only_this_one_is_closed(door: Door, attacker: Attacker) -> list[Frame]:
    frames = attacker.read_to_end()
    door.check_next_call()
    return frames


def test_rapid_reset(native_door: Door) -> None:
    with Attacker(native_door) as attacker:
        for stream_id in range(1, 6001, 2):
            pair = headers(stream_id, WAIT) + RstStreamFrame(stream_id, 8).serialize()
            if not attacker.send(pair):
                break
        frames = expect_only_this_one_is_closed(native_door, attacker)
        assert any(isinstance(frame, GoAwayFrame) for frame in frames) or not frames
    servicer = native_door.servicer
    wait_until(lambda: servicer.count("cancelled") == servicer.count("started"), "cancellation of what began")
    wait_until(lambda: native_door.server.calls == 0, "the end of all calls")


@pytest.mark.parametrize("content", [b"", b"\x40\x01a\x01b"])
def test_continuation_flood(native_door: Door, content: bytes) -> None:
    with Attacker(native_door) as attacker:
        attacker.send(HeadersFrame(1, hpack.Encoder().encode(fields_of(ECHO))).serialize())
        for _ in range(10_000):
            if not attacker.send(ContinuationFrame(1, content * 1000).serialize()):
                break
        else:
            pytest.fail("10,000 CONTINUATION frames were taken")
        expect_only_this_one_is_closed(native_door, attacker)


@pytest.mark.parametrize(
    "flood",
    [
        PingFrame(0, b"12345678").serialize(),
        SettingsFrame(0).serialize(),
        PriorityFrame(1, exclusive=True).serialize(),
        DataFrame(1, b"").serialize(),
        WindowUpdateFrame(0, 1).serialize(),
    ],
    ids=["ping", "settings", "priority", "empty data", "window"],
)
def test_floods_that_nobody_reads(native_door: Door, flood: bytes) -> None:
    with Attacker(native_door) as attacker:
        attacker.send(headers(1, ECHO, "END_HEADERS"))
        attacker.socket.settimeout(2)
        for _ in range(200):
            if not attacker.send(flood * 500):
                break
        native_door.check_next_call()


def test_header_list_bomb(native_door: Door) -> None:
    """One indexed header of 4 KB, named a thousand times: small on the wire, megabytes in memory."""
    encoder = hpack.Encoder()
    block = encoder.encode([*fields_of(ECHO), ("bomb", "x" * 4000)])
    bomb = block + encoder.encode([("bomb", "x" * 4000)]) * 3000
    with Attacker(native_door) as attacker:
        attacker.send(HeadersFrame(1, bomb, flags=["END_HEADERS", "END_STREAM"]).serialize())
        frames = attacker.read_until(
            lambda frames: any(isinstance(frame, HeadersFrame | GoAwayFrame) for frame in frames)
        )
        answers = [frame.data for frame in frames if isinstance(frame, HeadersFrame)]
        assert ("grpc-status", "8") in [tuple(pair) for pair in hpack.Decoder().decode(answers[0])]
        native_door.check_next_call()


def test_an_oversized_message_is_refused_before_it_comes(native_door: Door) -> None:
    with Attacker(native_door) as attacker:
        attacker.send(headers(1, ECHO, "END_HEADERS") + DataFrame(1, b"\0\xff\xff\xff\xff").serialize())
        frames = attacker.read_until(lambda frames: any(isinstance(frame, RstStreamFrame) for frame in frames))
        answer = next(frame for frame in frames if isinstance(frame, HeadersFrame))
        fields = dict(hpack.Decoder().decode(answer.data))
        assert fields["grpc-status"] == "8"
        assert fields["grpc-message"] == "Received message larger than max (4294967295 vs. 67108864)"
        assert "END_STREAM" in answer.flags
        # what the client sends on is thrown away, and does not use up the connection's window
        for _ in range(40):
            attacker.send(DataFrame(1, bytes(16384)).serialize())
        native_door.check_next_call()


def break_frames() -> dict[str, bytes]:
    good = headers(1, ECHO, "END_HEADERS") + DataFrame(1, message(b"x"), flags=["END_STREAM"]).serialize()
    return {
        "frame longer than allowed": b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(100_000),
        "data on stream 0": b"\0\0\x01\0\0\0\0\0\0x",
        "data on an idle stream": DataFrame(7, b"x").serialize(),
        "even stream id": headers(2, ECHO, "END_HEADERS", "END_STREAM"),
        "settings of odd size": b"\0\0\x05\x04\0\0\0\0\0" + bytes(5),
        "window update of 0": b"\0\0\x04\x08\0\0\0\0\0" + bytes(4),
        "window overflow": WindowUpdateFrame(0, 2**31 - 1).serialize() * 2,
        "ping of odd size": b"\0\0\x07\x06\0\0\0\0\0" + bytes(7),
        "hpack index out of range": b"\0\0\x01\x01\x05\0\0\0\x01\xff",
        "hpack garbage": HeadersFrame(1, b"\x7f\xff\xff\xff\xff\xff", flags=["END_HEADERS"]).serialize(),
        "continuation without headers": ContinuationFrame(1, b"").serialize(),
        "padding longer than the frame": b"\0\0\x01\x00\x08\0\0\0\x01\xff",
        "stream ids going down": good.replace(b"\0\0\0\x01", b"\0\0\0\x09") + good,
        "unknown frame types": b"\0\0\x04\x77\0\0\0\0\0abcd" * 50 + b"junk" * 10,
        "upper-case header": headers(1, ECHO, "END_HEADERS", Upper="x"),
        "empty path": headers(1, "", "END_HEADERS", "END_STREAM").replace(b"http", b"ftpx"),
        "http/1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    }


@pytest.mark.parametrize("name", break_frames())
def test_malformed_frames(native_door: Door, name: str) -> None:
    with Attacker(native_door) as attacker:
        attacker.send(break_frames()[name])
        attacker.half_close()
        expect_only_this_one_is_closed(native_door, attacker)
    wait_until(lambda: native_door.server.calls == 0)


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes(native_door: Door, seed: int) -> None:
    chance = random.Random(seed)
    for greeting in (b"", PREFACE, PREFACE + SettingsFrame(0).serialize()):
        with Attacker(native_door, greeting) as attacker:
            attacker.send(chance.randbytes(5000))
            attacker.half_close()
            expect_only_this_one_is_closed(native_door, attacker)


@pytest.mark.parametrize("greeting", [b"", PREFACE[:10], PREFACE])
def test_half_a_greeting(make_door: Callable[..., Door], greeting: bytes) -> None:
    for kind in NATIVE:
        door = make_door(kind, limits=ConnectionLimits(greeting_timeout_s=0.3))
        with Attacker(door, greeting) as attacker:
            door.check_next_call()
            expect_only_this_one_is_closed(door, attacker)


def test_a_client_that_takes_no_bytes_is_closed(make_door: Callable[..., Door]) -> None:
    for kind in NATIVE:
        door = make_door(kind, limits=ConnectionLimits(write_timeout_s=0.3, max_outbound_bytes=1 << 20))
        settings = SettingsFrame(0, {SettingsFrame.INITIAL_WINDOW_SIZE: 2**31 - 1}).serialize()
        with Attacker(door, PREFACE + settings + WindowUpdateFrame(0, 2**31 - 65536).serialize()) as attacker:
            flood = headers(1, f"/{SERVICE}/Flood", "END_HEADERS")
            attacker.send(flood + DataFrame(1, message(b"100000"), flags=["END_STREAM"]).serialize())
            wait_until(lambda door=door: door.server.calls == 1)  # type: ignore[misc]
            wait_until(lambda door=door: door.server.connections == 0, "the end of the connection")  # type: ignore[misc]
            wait_until(lambda door=door: door.server.calls == 0, "the end of the call")  # type: ignore[misc]
            door.check_next_call()


@pytest.mark.parametrize("kind", NATIVE)
def test_streams_above_the_limit_are_refused(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, limits=ConnectionLimits(max_concurrent_streams=10))
    with Attacker(door) as attacker:
        for stream_id in range(1, 41, 2):
            one = headers(stream_id, WAIT, "END_HEADERS")
            attacker.send(one + DataFrame(stream_id, message(b"x"), flags=["END_STREAM"]).serialize())
        frames = attacker.read_until(lambda frames: sum(isinstance(frame, RstStreamFrame) for frame in frames) >= 10)
        refused = {frame.stream_id for frame in frames if isinstance(frame, RstStreamFrame)}
        assert refused == set(range(21, 41, 2))
        wait_until(lambda: door.servicer.count("started") == 10)
        door.check_next_call()
    wait_until(lambda: door.servicer.count("cancelled") == 10)


def test_clients_that_reset_before_they_are_accepted(native_door: Door, caplog: pytest.LogCaptureFixture) -> None:
    """They have no address any more when the server looks for it."""
    is_blocked, go_on = threading.Event(), threading.Event()

    def block() -> None:
        is_blocked.set()
        go_on.wait(TIMEOUT_S)

    native_door.loop.call_soon_threadsafe(block)
    assert is_blocked.wait(TIMEOUT_S)
    for _ in range(20):
        client = socket.create_connection(("127.0.0.1", native_door.port), TIMEOUT_S)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    go_on.set()
    native_door.check_next_call()
    wait_until(lambda: native_door.server.connections <= 1, "the end of what was reset")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_metadata_that_is_not_base64(native_door: Door) -> None:
    with Attacker(native_door) as attacker:
        block = headers(1, ECHO, "END_HEADERS", **{"x-bin": "a"})
        attacker.send(block + DataFrame(1, message(b"x"), flags=["END_STREAM"]).serialize())
        frames = attacker.read_until(lambda frames: any(isinstance(frame, HeadersFrame) for frame in frames))
        answer = next(frame for frame in frames if isinstance(frame, HeadersFrame))
        assert dict(hpack.Decoder().decode(answer.data))["grpc-status"] == "3"
        native_door.check_next_call()


def test_bytes_one_by_one(native_door: Door) -> None:
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
    client.initiate_connection()
    client.send_headers(1, fields_of(ECHO))
    client.send_data(1, message(b"hello"), end_stream=True)
    with socket.create_connection(("127.0.0.1", native_door.port), TIMEOUT_S) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in client.data_to_send():
            raw.sendall(bytes([byte]))
        data, is_ended = b"", False
        while not is_ended:
            for event in client.receive_data(raw.recv(65536)):
                if isinstance(event, h2.events.DataReceived):
                    data += event.data
                is_ended = is_ended or isinstance(event, h2.events.StreamEnded)
    assert data == message(b"hello")


def test_resets_that_the_client_provokes(native_door: Door) -> None:
    """Window overflows make the server reset the streams, which the bound of rapid resets does not count."""
    overflow = (2**31 - 1).to_bytes(4, "big")
    with Attacker(native_door) as attacker:
        for stream_id in range(1, 20_001, 2):
            update = WindowUpdateFrame(stream_id, 1).serialize()[:-4] + overflow
            if not attacker.send(headers(stream_id, WAIT, "END_HEADERS") + update * 2):
                break
        else:
            pytest.fail("10,000 calls were begun and reset")
        expect_only_this_one_is_closed(native_door, attacker)
    servicer = native_door.servicer
    wait_until(lambda: native_door.server.calls == 0, "the end of all calls")
    assert servicer.count("cancelled") == servicer.count("started")


def test_callers_that_give_up_by_the_hundred_keep_their_connection(native_door: Door) -> None:
    """Deadlines that pass under load look like resets; a burst of them and another later are no attack."""
    with Attacker(native_door) as attacker:
        for burst in range(2):
            first = 1 + 2000 * burst
            for stream_id in range(first, first + 1800, 2):
                attacker.send(headers(stream_id, WAIT, "END_HEADERS") + RstStreamFrame(stream_id, 8).serialize())
            time.sleep(1.1)  # the bound refills with time
        one = headers(9001, ECHO, "END_HEADERS") + DataFrame(9001, message(b"x"), flags=["END_STREAM"]).serialize()
        attacker.send(one)
        attacker.read_until(lambda frames: any(isinstance(frame, DataFrame) for frame in frames))


@pytest.mark.alone
@pytest.mark.parametrize("kind", NATIVE)
def test_cheap_bytes_that_cost_much_do_not_hold_up_others(make_door: Callable[..., Door], kind: str) -> None:
    """Header blocks of one-byte references: 16 KB name 60 MB, and decoding them cannot be refused half-way."""
    native_door = make_door(kind, life=ConnectionLife(max_ping_strikes=0))
    encoder = hpack.Encoder()
    block = encoder.encode([*fields_of(ECHO), ("bomb", "x" * 3900)])
    first = HeadersFrame(1, block, flags=["END_HEADERS", "END_STREAM"]).serialize()
    again = encoder.encode(fields_of(ECHO)) + encoder.encode([("bomb", "x" * 3900)]) * 15_000
    stop = threading.Event()

    def bomb() -> None:
        with Attacker(native_door) as attacker:
            attacker.send(first)
            attacker.socket.setblocking(False)
            for stream_id in range(3, 2**20, 2):
                rest = HeadersFrame(stream_id, again, flags=["END_HEADERS", "END_STREAM"]).serialize()
                while rest and not stop.is_set():
                    try:
                        rest = rest[attacker.socket.send(rest) :]
                        attacker.socket.recv(1 << 20)
                    except BlockingIOError:
                        select.select([attacker.socket], [attacker.socket], [], 0.1)
                    except OSError:
                        return
                if stop.is_set():
                    return

    thread = threading.Thread(target=bomb)
    thread.start()
    try:
        with Attacker(native_door) as other:
            waits = []
            for number in range(1, 31):
                began = time.monotonic()
                other.send(PingFrame(0, number.to_bytes(8, "big")).serialize())
                other.read_until(
                    lambda frames, number=number: sum(isinstance(frame, PingFrame) for frame in frames) >= number
                )
                waits.append(time.monotonic() - began)
    finally:
        stop.set()
        thread.join()
    assert sorted(waits)[len(waits) // 2] < 0.2
    native_door.check_next_call()


@pytest.mark.parametrize("kind", NATIVE)
def test_compressed_calls_share_a_budget(make_door: Callable[..., Door], kind: str) -> None:
    """Each is within the message limit, all together unpack to far more than they are."""
    door = make_door(kind)
    budget = UnpackBudget(3 << 20, patience_s=0.5)
    door.server._unpack_budget = budget
    packed = gzip.compress(bytes(1 << 20))
    body = b"\1" + len(packed).to_bytes(4, "big") + packed
    with Attacker(door) as attacker:
        for stream_id in range(1, 41, 2):
            head = headers(stream_id, WAIT, "END_HEADERS", **{"grpc-encoding": "gzip"})
            attacker.send(head + DataFrame(stream_id, body, flags=["END_STREAM"]).serialize())
        # those that have their message hold its bytes; the others are refused when their patience ends
        frames = attacker.read_until(lambda frames: sum(isinstance(frame, HeadersFrame) for frame in frames) >= 17)
        assert door.servicer.count("started") <= 3
        assert budget.reserved_bytes <= 3 << 20
        decoder = hpack.Decoder()
        statuses = [dict(decoder.decode(frame.data)) for frame in frames if isinstance(frame, HeadersFrame)]
        assert {fields["grpc-status"] for fields in statuses} == {"8"}
        door.check_next_call()
    wait_until(lambda: door.server.calls == 0, "the end of all calls")
    assert budget.reserved_bytes == 0
