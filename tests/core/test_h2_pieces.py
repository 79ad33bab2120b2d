"""Valid sessions, cut anywhere: the driver is told the same, and the client gets its answers."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import h2.config
import h2.connection
import h2.events
from hypothesis import given
from hypothesis import strategies as st

# The probe is for these tests alone, so ``_core`` does not export it.
SessionProbe: Any = importlib.import_module("aiorch_server._core.h2_probe").SessionProbe

CALL, MESSAGE, HALF_CLOSE, WRITABLE, OVER = 1, 2, 4, 8, 16
FAST, SLOW = "/fast/Call", "/slow/Call"
names = st.sampled_from(["k", "trace-bin", "x-request-id", "a-rather-long-name-for-a-header"])
values = st.text("abcXYZ019+/=", max_size=60)
messages = st.one_of(st.binary(max_size=12), st.integers(100, 20_000).map(lambda size: bytes([size % 251]) * size))


@dataclass
class Asked:
    """A call as the client makes it; DATA frames end at ``cuts``, wherever that is in a message."""

    is_fast: bool
    metadata: list[tuple[str, str]]
    messages: list[bytes]
    cuts: list[int]
    timeout: str
    is_reset: bool


@dataclass
class Told:
    """What a driver has heard of a call."""

    bits: int = 0
    metadata: list[tuple[bytes, bytes]] = field(default_factory=list)
    messages: list[bytes] = field(default_factory=list)
    deadline_ns: int = 0


@st.composite
def calls(draw: st.DrawFn) -> Asked:
    is_fast = draw(st.booleans())
    return Asked(
        is_fast,
        draw(st.lists(st.tuples(names, values), max_size=4)),
        draw(st.lists(messages, min_size=1 if is_fast else 0, max_size=1 if is_fast else 4)),
        draw(st.lists(st.integers(1, 9000), max_size=4)),
        draw(st.sampled_from(["", "1S", "250m", "3H"])),
        draw(st.sampled_from([False, False, False, True])),
    )


def frame(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def split(content: bytes, sizes: list[int]) -> list[bytes]:
    """Pieces of these sizes in turn; the rest in one. At most what a DATA frame holds."""
    pieces = []
    for size in [*sizes, *[16_384] * (len(content) // 16_384 + 1)]:
        pieces.append(content[:size])
        content = content[size:]
    return [piece for piece in pieces if piece]


def write_session(asked: list[Asked], order: list[int], client: h2.connection.H2Connection) -> bytes:
    """The client's bytes, with the frames of all calls between each other as ``order`` says."""
    steps: list[list[tuple[str, int, Any]]] = []
    for index, call in enumerate(asked):
        stream_id = 2 * index + 1
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", FAST if call.is_fast else SLOW),
            (":authority", "x"),
        ]
        fields += [("content-type", "application/grpc"), *call.metadata]
        if call.timeout:
            fields.append(("grpc-timeout", call.timeout))
        pieces = split(b"".join(map(frame, call.messages)), call.cuts)
        lines: list[tuple[str, int, Any]] = [("data", stream_id, piece) for piece in pieces]
        lines.append(("reset", stream_id, None) if call.is_reset else ("end", stream_id, None))
        steps.append(lines)
        client.send_headers(stream_id, fields)
    waiting = [lines for lines in steps if lines]
    turn = 0
    while waiting:
        lines = waiting[order[turn % len(order)] % len(waiting)]
        kind, stream_id, content = lines.pop(0)
        if kind == "data":
            client.send_data(stream_id, content)
        elif kind == "reset":
            client.reset_stream(stream_id)
        else:
            client.end_stream(stream_id)
        waiting = [lines for lines in waiting if lines]
        turn += 1
    return client.data_to_send()


def listen(server: Any, told: dict[int, Told]) -> None:
    for stream_id, bits in server.take_events():
        call = told.setdefault(stream_id, Told())
        assert not call.bits & OVER, "nothing follows the end"
        assert bool(bits & CALL) == (call.bits == 0), "a call begins once, and first"
        call.bits |= bits
        if bits & CALL:
            call.metadata = server.metadata(stream_id)
        while not bits & OVER and (message := server.take_message(stream_id)) is not None:
            call.messages.append(message[0])
    for stream_id, message, deadline_ns in server.take_ready():
        assert stream_id not in told, "a request is ready once"
        told[stream_id] = Told(MESSAGE | HALF_CLOSE, server.metadata(stream_id), [message], deadline_ns)


@given(
    st.lists(calls(), min_size=1, max_size=5), st.lists(st.integers(0, 4), min_size=1), st.lists(st.integers(1, 3000))
)
def test_pieces_change_nothing(asked: list[Asked], order: list[int], sizes: list[int]) -> None:
    server = SessionProbe(fast_path=FAST.encode())
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
    client.initiate_connection()
    client.receive_data(server.collect())
    sent = write_session(asked, order, client)
    told: dict[int, Told] = {}
    at, turn = 0, 0
    while at < len(sent):
        size = sizes[turn % len(sizes)] if sizes else len(sent)
        assert server.feed(sent[at : at + size])
        listen(server, told)
        at += size
        turn += 1
    for index, call in enumerate(asked):
        check_call(call, told.get(2 * index + 1, Told()))
    open_calls = [stream_id for index, call in enumerate(asked) if not call.is_reset for stream_id in [2 * index + 1]]
    for stream_id in open_calls:
        if asked[stream_id // 2].is_fast:
            server.answer(stream_id, b"fast %d" % stream_id)
        else:
            server.send_message(stream_id, b"slow %d" % stream_id)
            server.finish(stream_id, 0, b"")
    data: dict[int, bytes] = {}
    ended = set()
    for event in client.receive_data(server.collect()):
        if isinstance(event, h2.events.DataReceived):
            data[event.stream_id] = data.get(event.stream_id, b"") + event.data
        elif isinstance(event, h2.events.StreamEnded):
            ended.add(event.stream_id)
    assert ended == set(open_calls)
    assert data == {
        stream_id: frame(b"%s %d" % (b"fast" if asked[stream_id // 2].is_fast else b"slow", stream_id))
        for stream_id in open_calls
    }
    assert server.books["streams"] == server.books["in_flight"] == server.books["partial_bytes"] == 0


def check_call(asked: Asked, told: Told) -> None:
    """All of it, or of a call that was taken back a part, the beginning, with its end."""
    path = [] if asked.is_fast else [(b":path", SLOW.encode())]
    metadata = [*path, *((name.encode(), value.encode()) for name, value in asked.metadata)]
    if asked.is_reset:
        assert told.messages == asked.messages[: len(told.messages)]
        assert asked.is_fast or not told.bits or told.bits & OVER, "whoever has heard of a call is told of its end"
        return
    assert not told.bits & OVER
    assert told.metadata == metadata
    assert told.messages == asked.messages
    assert told.bits & HALF_CLOSE
    if asked.is_fast:
        deadlines = {"": 0, "1S": 1_000_000_001, "250m": 250_000_001, "3H": 3 * 3600 * 10**9 + 1}
        assert told.deadline_ns == deadlines[asked.timeout]
