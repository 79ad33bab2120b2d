"""Messages received straight into their place are the ones that a linear reader sees, whatever comes between."""

from __future__ import annotations

import importlib
import random
from dataclasses import dataclass
from typing import Any

import hpack
import hyperframe.frame
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

SessionProbe: Any = importlib.import_module("aiorch_server._core.h2_probe").SessionProbe
read_copied_bytes: Any = importlib.import_module("aiorch_server._core.buffers").read_copied_bytes

FAST, SLOW = "/fast/Call", "/slow/Call"
LIMITS = {"max_message_bytes": 1 << 26, "stream_window_bytes": 1 << 27, "connection_window_bytes": 1 << 28}
HEAD_BYTES = 9
FRAME_BYTES = 16384


def frame(message: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(message).to_bytes(4, "big") + message


class Client:
    """Writes what a client sends, frame by frame."""

    def __init__(self) -> None:
        self.encoder = hpack.Encoder()
        self.sent: list[bytes] = []

    def open(self, stream_id: int, path: str = FAST) -> None:
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"), ("te", "trailers")]
        head = hyperframe.frame.HeadersFrame(
            stream_id, self.encoder.encode([*fields, ("content-type", "application/grpc")])
        )
        head.flags.add("END_HEADERS")
        self.sent.append(head.serialize())

    def data(self, stream_id: int, payload: bytes, *, end: bool = False, padding: int = -1) -> None:
        part = hyperframe.frame.DataFrame(stream_id, payload, pad_length=max(padding, 0))
        if end:
            part.flags.add("END_STREAM")
        if padding >= 0:
            part.flags.add("PADDED")
        self.sent.append(part.serialize())

    def body(self, stream_id: int, body: bytes, frame_bytes: int = FRAME_BYTES) -> None:
        for at in range(0, len(body), frame_bytes):
            self.data(stream_id, body[at : at + frame_bytes], end=at + frame_bytes >= len(body))

    def ping(self) -> None:
        self.sent.append(hyperframe.frame.PingFrame(0, b"12345678").serialize())

    def reset(self, stream_id: int) -> None:
        self.sent.append(hyperframe.frame.RstStreamFrame(stream_id, 8).serialize())


def greet(**options: Any) -> Any:
    """A session after the greeting, with wide windows."""
    server = SessionProbe(**LIMITS, **options)
    assert server.feed(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + hyperframe.frame.SettingsFrame(0).serialize())
    server.collect()
    settings = hyperframe.frame.SettingsFrame(0)
    settings.flags.add("ACK")
    assert server.feed(settings.serialize())
    return server


def seen(server: Any) -> list[Any]:
    """All that a driver finds in a session, and what it sends."""
    found: list[Any] = [server.take_ready()]
    for stream_id, bits in server.take_events():
        messages = []
        while not bits & 16 and (message := server.take_message(stream_id)) is not None:
            messages.append(message)
        found.append((stream_id, bits, messages))
    return [*found, without_windows(server.collect()), server.books, server.is_over]


def without_windows(sent: bytes | None) -> list[bytes] | None:
    """The frames but for WINDOW_UPDATE: when half a window is reached depends on the cuts."""
    frames = []
    while sent:
        size = HEAD_BYTES + int.from_bytes(sent[:3], "big")
        if sent[3] != 8:
            frames.append(sent[:size])
        sent = sent[size:]
    return None if sent is None else frames


def receive(wire: bytes, cuts: list[int], rest_at: int = 0, **how: Any) -> list[Any]:
    """What a session has seen when all came in pieces of these sizes, in turn; None and nothing more once it broke."""
    server = greet(rest_at=rest_at)
    result: list[Any] = []
    at = turn = 0
    while at < len(wire):
        piece = wire[at : at + cuts[turn % len(cuts)]]
        at += len(piece)
        turn += 1
        if server.land(piece, **how) is False:
            return [*result, None]
        result.append(seen(server))
    return result


def receive_linear(wire: bytes, cuts: list[int]) -> list[Any]:
    server = greet()
    result: list[Any] = []
    at = turn = 0
    while at < len(wire):
        piece = wire[at : at + cuts[turn % len(cuts)]]
        at += len(piece)
        turn += 1
        if not server.feed(piece):
            return [*result, None]
        result.append(seen(server))
    return result


# ------------------------------------------------------------------------------------------ the same as read linearly
@dataclass(frozen=True)
class Body:
    path: str
    sizes: list[int]
    frame_bytes: int
    padding: int
    is_end_apart: bool
    ends: str  # "end", "reset", "open", "short"


bodies = st.builds(
    Body,
    path=st.sampled_from([FAST, FAST, SLOW]),
    sizes=st.lists(st.sampled_from([0, 10, 4090, 5000, 16384 - 5, 40_000, 150_000, 400_000]), min_size=1, max_size=2),
    frame_bytes=st.sampled_from([700, 4096, 9000, FRAME_BYTES, FRAME_BYTES, FRAME_BYTES]),
    padding=st.sampled_from([-1, -1, -1, 0, 7]),
    is_end_apart=st.booleans(),
    ends=st.sampled_from(["end", "end", "end", "reset", "open", "short"]),
)


def write(plans: list[Body], rng: random.Random, turns: str, noise: float) -> bytes:
    """Frames of all bodies: one after the other, in turn, or in any order; now and then something between them."""
    client = Client()
    queues: dict[int, list[tuple[bytes, bool]]] = {}
    for number, plan in enumerate(plans):
        stream_id = 2 * number + 1
        client.open(stream_id, plan.path)
        whole = b"".join(frame(rng.randbytes(size)) for size in plan.sizes)
        whole = whole[: len(whole) * 2 // 3] if plan.ends in ("short", "reset") else whole
        step = plan.frame_bytes - max(plan.padding, 0) - 1
        parts = [(whole[at : at + step], False) for at in range(0, len(whole), step)]
        if plan.ends in ("end", "short"):
            if plan.is_end_apart or not parts:
                parts.append((b"", True))
            else:
                parts[-1] = (parts[-1][0], True)
        queues[stream_id] = parts
    order = list(queues)
    while order:
        stream_id = order[0] if turns != "any" else rng.choice(order)
        plan = plans[stream_id // 2]
        if queues[stream_id]:
            payload, is_end = queues[stream_id].pop(0)
            client.data(stream_id, payload, end=is_end, padding=plan.padding)
        elif plan.ends == "reset":
            client.reset(stream_id)
        if not queues[stream_id] and (plan.ends != "reset" or client.sent[-1][3] == 3):
            order.remove(stream_id)
        elif turns == "in turn":
            order.append(order.pop(0))
        if rng.random() < noise:
            client.ping()
    return b"".join(client.sent)


@settings(max_examples=120, deadline=None)
@given(
    plans=st.lists(bodies, min_size=1, max_size=4),
    seed=st.integers(0, 1 << 32),
    turns=st.sampled_from(["in turn", "in turn", "after each other", "any"]),
    noise=st.sampled_from([0.0, 0.0, 0.1]),
    cuts=st.lists(st.sampled_from([1, 9, 100, 5000, 70_000, 300_000, 1 << 20]), min_size=1, max_size=3).filter(
        lambda cuts: sum(cuts) / len(cuts) > 2000
    ),
    linear_bytes=st.sampled_from([16, 512, FRAME_BYTES]),
    is_guessing=st.booleans(),
    broken_at=st.one_of(st.none(), st.none(), st.floats(0, 1)),
    rest_at=st.sampled_from([0, 0, 1, 60, 600]),
)
@example(  # a read that ends with a header that was not guessed, while another was to come
    plans=[Body(FAST, [0], 700, -1, False, "end"), Body(FAST, [150_000], 9000, -1, True, "short")],
    seed=0,
    turns="in turn",
    noise=0.0,
    cuts=[5000],
    linear_bytes=16,
    is_guessing=True,
    broken_at=None,
    rest_at=0,
)
def test_the_same_messages_in_any_cut(
    plans: list[Body],
    seed: int,
    turns: str,
    noise: float,
    cuts: list[int],
    linear_bytes: int,
    is_guessing: bool,
    broken_at: float | None,
    rest_at: int,
) -> None:
    """Where the end of a big message has a place of its own (`rest_at`), too."""
    rng = random.Random(seed)
    wire = write(plans, rng, turns, noise)
    if broken_at is not None:  # from there on the bytes are no frames, or other ones
        place = int(broken_at * len(wire))
        wire = wire[:place] + rng.randbytes(40) + wire[place:]
    landed = receive(wire, cuts, rest_at, linear_bytes=linear_bytes, is_guessing=is_guessing)
    assert landed == receive_linear(wire, cuts)


# ------------------------------------------------------------------------------------------ what lands is not copied
def count_received(wire: bytes, cuts: list[int], **how: Any) -> int:
    before = read_copied_bytes()["received"]
    assert receive(wire, cuts, **how)[-1] is not None
    return int(read_copied_bytes()["received"] - before)


def write_image(streams: int = 1, size: int = 602_154) -> bytes:
    client = Client()
    message = random.Random(5).randbytes(size)
    for number in range(streams):
        client.open(2 * number + 1)
    for at in range(0, size + 5, FRAME_BYTES):
        for number in range(streams):
            body = frame(message)
            client.data(2 * number + 1, body[at : at + FRAME_BYTES], end=at + FRAME_BYTES >= len(body))
    return b"".join(client.sent)


def test_a_big_message_is_copied_as_far_as_it_came_with_its_head() -> None:
    wire = write_image()
    head_bytes = wire.index(frame(b"")[:1] + (602_154).to_bytes(4, "big")) + 5
    copied = count_received(wire, [1 << 20], linear_bytes=FRAME_BYTES)
    assert copied == FRAME_BYTES - head_bytes
    # the last bytes of a message that is cut there are not worth a landing
    assert count_received(wire, [100_000], linear_bytes=FRAME_BYTES) < copied + 4096


@pytest.mark.parametrize("is_guessing", [True, False])
def test_messages_in_turn_land_too(is_guessing: bool) -> None:
    """Round robin is what HTTP/2 clients do with streams of one weight; who follows whom is learned once."""
    wire = write_image(streams=4)
    copied = count_received(wire, [1 << 20], linear_bytes=FRAME_BYTES, is_guessing=is_guessing)
    assert copied < 0.1 * len(wire)


def test_a_landing_outlives_its_stream() -> None:
    """The frame that ends a request too early frees its message while guessed bytes lie in it."""
    client = Client()
    client.open(1)
    body = frame(bytes(600_000))
    client.data(1, body[:FRAME_BYTES])
    client.data(1, body[FRAME_BYTES : 2 * FRAME_BYTES], end=True)
    client.open(3)
    client.body(3, frame(b"y" * 100_000))
    wire = b"".join(client.sent)
    assert receive(wire, [1 << 20]) == receive_linear(wire, [1 << 20])
    assert receive(wire, [FRAME_BYTES + 500, 1 << 20]) == receive_linear(wire, [FRAME_BYTES + 500, 1 << 20])


def test_a_length_alone_books_little() -> None:
    server = greet()
    client = Client()
    client.open(1)
    client.data(1, b"\0" + (1 << 26).to_bytes(4, "big") + bytes(10_000))
    assert server.land(b"".join(client.sent)) is not False
    assert server.books["partial_bytes"] == 16_384


def test_64_megabytes() -> None:
    client = Client()
    message = random.Random(6).randbytes(1 << 20) * 64
    client.open(1)
    client.body(1, frame(message))
    wire = b"".join(client.sent)
    before = read_copied_bytes()["received"]
    server = greet(max_buffered_bytes=1 << 27)
    assert server.land(wire, linear_bytes=FRAME_BYTES) is not False
    assert [(ready[0], ready[1] == message) for ready in server.take_ready()] == [(1, True)]
    # it is moved as it grows from 4 to 8, 16 and 32 MB; from there on the kernel moves pages
    assert read_copied_bytes()["received"] - before < (28 << 20) + 10 * FRAME_BYTES
