"""RFC 9113, section 6: each type of frame, what it may say, and on which streams."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from http2_peer import (
    ACK,
    END_HEADERS,
    END_STREAM,
    GREETING,
    PADDED,
    PREFACE,
    PRIORITY,
    Error,
    Kind,
    Peer,
    call,
    data,
    encode_fields,
    fields_of,
    frame,
    headers,
    infer_message,
    settings,
)
from hyperframe.frame import GoAwayFrame, PingFrame, SettingsFrame, WindowUpdateFrame
from running_site import Site, encode_values

Connect = Callable[..., Peer]
BLOCK = encode_fields(fields_of())
LARGEST_WINDOW = 2**31 - 1


def setting(number: int, value: int) -> bytes:
    return frame(Kind.SETTINGS, 0, number.to_bytes(2, "big") + value.to_bytes(4, "big"))


def update(stream_id: int, increment: int) -> bytes:
    return frame(Kind.WINDOW_UPDATE, stream_id, increment.to_bytes(4, "big"))


CONNECTION_ERRORS: dict[str, tuple[bytes, Error]] = {
    "6.1 DATA on stream 0": (data(0, b"x"), Error.PROTOCOL),
    "6.1 padding as long as the frame": (headers(1) + frame(Kind.DATA, 1, b"\x05" + bytes(4), PADDED), Error.PROTOCOL),
    "6.2 HEADERS on stream 0": (headers(0), Error.PROTOCOL),
    "6.2 padding longer than the block": (
        frame(Kind.HEADERS, 1, bytes([len(BLOCK) + 1]) + BLOCK, END_HEADERS | PADDED),
        Error.PROTOCOL,
    ),
    "6.2 priority cut short": (frame(Kind.HEADERS, 1, bytes(4), END_HEADERS | PRIORITY), Error.FRAME_SIZE),
    "6.3 PRIORITY on stream 0": (frame(Kind.PRIORITY, 0, bytes(5)), Error.PROTOCOL),
    "6.4 RST_STREAM on stream 0": (frame(Kind.RST_STREAM, 0, bytes(4)), Error.PROTOCOL),
    "6.4 RST_STREAM of 3 octets": (headers(1) + frame(Kind.RST_STREAM, 1, bytes(3)), Error.FRAME_SIZE),
    "6.5 SETTINGS on stream 1": (frame(Kind.SETTINGS, 1), Error.PROTOCOL),
    "6.5 SETTINGS of 5 octets": (frame(Kind.SETTINGS, 0, bytes(5)), Error.FRAME_SIZE),
    "6.5 acknowledgement with content": (frame(Kind.SETTINGS, 0, bytes(6), ACK), Error.FRAME_SIZE),
    "6.5.2 ENABLE_PUSH 2": (setting(SettingsFrame.ENABLE_PUSH, 2), Error.PROTOCOL),
    "6.5.2 INITIAL_WINDOW_SIZE too large": (
        setting(SettingsFrame.INITIAL_WINDOW_SIZE, LARGEST_WINDOW + 1),
        Error.FLOW_CONTROL,
    ),
    "6.5.2 MAX_FRAME_SIZE too small": (setting(SettingsFrame.MAX_FRAME_SIZE, 16_383), Error.PROTOCOL),
    "6.5.2 MAX_FRAME_SIZE too large": (setting(SettingsFrame.MAX_FRAME_SIZE, 1 << 24), Error.PROTOCOL),
    "6.6 PUSH_PROMISE from a client": (
        headers(1) + frame(Kind.PUSH_PROMISE, 1, (2).to_bytes(4, "big") + BLOCK, END_HEADERS),
        Error.PROTOCOL,
    ),
    "6.7 PING on stream 1": (frame(Kind.PING, 1, bytes(8)), Error.PROTOCOL),
    "6.7 PING of 7 octets": (frame(Kind.PING, 0, bytes(7)), Error.FRAME_SIZE),
    "6.7 PING of 9 octets": (frame(Kind.PING, 0, bytes(9)), Error.FRAME_SIZE),
    "6.8 GOAWAY on stream 1": (frame(Kind.GOAWAY, 1, bytes(8)), Error.PROTOCOL),
    "6.8 GOAWAY of 7 octets": (frame(Kind.GOAWAY, 0, bytes(7)), Error.FRAME_SIZE),
    "6.9 WINDOW_UPDATE of 3 octets": (frame(Kind.WINDOW_UPDATE, 0, bytes(3)), Error.FRAME_SIZE),
    "6.9 connection window by 0": (update(0, 0), Error.PROTOCOL),
    "6.9.1 connection window too large": (update(0, LARGEST_WINDOW), Error.FLOW_CONTROL),
    "6.10 CONTINUATION on stream 0": (
        headers(1, flags=0) + frame(Kind.CONTINUATION, 0, b"", END_HEADERS),
        Error.PROTOCOL,
    ),
    "6.10 CONTINUATION after the block's end": (
        headers(1) + frame(Kind.CONTINUATION, 1, b"", END_HEADERS),
        Error.PROTOCOL,
    ),
    "6.10 two ends of one block": (
        headers(1, flags=0) + frame(Kind.CONTINUATION, 1, b"", END_HEADERS) * 2,
        Error.PROTOCOL,
    ),
    "6.10 CONTINUATION after DATA": (
        headers(1) + data(1, b"\0", 0) + frame(Kind.CONTINUATION, 1, b"", END_HEADERS),
        Error.PROTOCOL,
    ),
    "6.10 DATA inside a block": (headers(1, flags=0) + data(1, b"x"), Error.PROTOCOL),
}


@pytest.mark.parametrize("name", CONNECTION_ERRORS)
def test_connection_errors(peer: Peer, name: str) -> None:
    octets, code = CONNECTION_ERRORS[name]
    peer.send(octets)
    peer.expect_goaway(code)


# Of these the RFC calls some stream errors and some connection errors; libnghttp2 and others draw the line elsewhere
# (5.4.2 lets them), so either is taken.
STREAM_ERRORS: dict[str, tuple[bytes, Error]] = {
    "6.3 PRIORITY of 4 octets": (headers(1) + frame(Kind.PRIORITY, 1, bytes(4)), Error.FRAME_SIZE),
    "6.9 stream window by 0": (headers(1) + update(1, 0), Error.PROTOCOL),
    "6.9.1 stream window too large": (headers(1) + update(1, LARGEST_WINDOW), Error.FLOW_CONTROL),
    "6.9.2 settings that make a window too large": (
        headers(1) + update(1, LARGEST_WINDOW - 65_535) + setting(SettingsFrame.INITIAL_WINDOW_SIZE, 65_536),
        Error.FLOW_CONTROL,
    ),
}


@pytest.mark.parametrize("name", STREAM_ERRORS)
def test_stream_errors(peer: Peer, name: str) -> None:
    octets, code = STREAM_ERRORS[name]
    peer.send(octets)
    peer.read_until(lambda: peer.is_closed or 1 in peer.answers)
    if peer.is_closed:
        peer.expect_goaway(code)
    else:
        peer.expect_reset(code)


def test_6_1_padding_without_its_length(peer: Peer) -> None:
    """Too short for what it must hold, or padding that is too long: the RFC has a code for each."""
    peer.send(headers(1), frame(Kind.DATA, 1, b"", PADDED))
    peer.expect_goaway(Error.FRAME_SIZE, Error.PROTOCOL)


# --------------------------------------------------------------------------------- what is right must be understood
MESSAGE = infer_message()
RIGHT_CALLS = {
    "6.1 padded DATA": headers(1) + frame(Kind.DATA, 1, b"\xff" + MESSAGE + bytes(255), PADDED | END_STREAM),
    "6.1 nothing but padding at the end": headers(1)
    + data(1, MESSAGE, 0)
    + frame(Kind.DATA, 1, b"\x03" + bytes(3), PADDED | END_STREAM),
    "6.1 an empty last frame": headers(1) + data(1, MESSAGE, 0) + data(1, b""),
    "6.1 a message in many frames": headers(1) + b"".join(data(1, bytes([each]), 0) for each in MESSAGE) + data(1, b""),
    "6.2 padded HEADERS": frame(Kind.HEADERS, 1, b"\x07" + BLOCK + bytes(7), END_HEADERS | PADDED) + data(1, MESSAGE),
    "6.2 HEADERS with priority": frame(Kind.HEADERS, 1, bytes(4) + b"\x0f" + BLOCK, END_HEADERS | PRIORITY)
    + data(1, MESSAGE),
    "6.2 padded HEADERS with priority": frame(
        Kind.HEADERS, 1, b"\x07" + bytes(5) + BLOCK + bytes(7), END_HEADERS | PADDED | PRIORITY
    )
    + data(1, MESSAGE),
    "6.3 PRIORITY before and between": frame(Kind.PRIORITY, 1, bytes(5))
    + headers(1)
    + frame(Kind.PRIORITY, 1, bytes(3) + b"\x05\xff")
    + data(1, MESSAGE),
    "6.5 settings between": headers(1)
    + settings(MAX_FRAME_SIZE=1 << 20, MAX_HEADER_LIST_SIZE=1 << 16)
    + data(1, MESSAGE),
    "6.9 windows between": headers(1) + update(0, 1) + update(1, 1) + data(1, MESSAGE),
    "6.9.1 the largest window": update(0, LARGEST_WINDOW - 65_535)
    + headers(1)
    + update(1, LARGEST_WINDOW - 65_535)
    + data(1, MESSAGE),
    "6.10 a block in three pieces": headers(1, [], 0)
    + frame(Kind.CONTINUATION, 1, BLOCK[:20])
    + frame(Kind.CONTINUATION, 1, BLOCK[20:], END_HEADERS)
    + data(1, MESSAGE),
    "6.10 an empty CONTINUATION": headers(1, flags=0)
    + frame(Kind.CONTINUATION, 1, b"", END_HEADERS)
    + data(1, MESSAGE),
    "7 unknown error codes": headers(3) + frame(Kind.RST_STREAM, 3, b"\xff" * 4) + call(5),
}


@pytest.mark.parametrize("name", RIGHT_CALLS)
def test_right_calls_are_answered(peer: Peer, name: str) -> None:
    peer.send(RIGHT_CALLS[name])
    peer.read_answer(5 if name.startswith("7") else 1).check()
    peer.expect_alive()


# ------------------------------------------------------------------------------------------------------ 6.5 SETTINGS
def test_6_5_3_settings_are_acknowledged(peer: Peer) -> None:
    peer.send(settings(INITIAL_WINDOW_SIZE=1 << 20), settings(HEADER_TABLE_SIZE=0))
    count = lambda: sum(isinstance(each, SettingsFrame) and "ACK" in each.flags for each in peer.frames)  # noqa: E731
    peer.read_until(lambda: count() == 3)
    peer.expect_alive()
    assert count() == 3


def test_6_5_3_values_count_in_their_order(connect: Connect) -> None:
    """Of two values for one setting the later holds: with a window of 3 octets DATA comes in threes."""
    window = SettingsFrame.INITIAL_WINDOW_SIZE.to_bytes(2, "big")
    both = frame(Kind.SETTINGS, 0, window + (70_000).to_bytes(4, "big") + window + (3).to_bytes(4, "big"))
    peer = connect(PREFACE + both + call(1))
    peer.read_until(lambda: 1 in peer.answers and len(peer.answers[1].data) == 3)
    peer.expect_pong(b"12345678")
    assert peer.answers[1].data_sizes == [3]
    peer.send(update(1, 1000))
    peer.read_answer().check()


def test_6_5_2_the_servers_frames_keep_to_the_clients_limit(connect: Connect) -> None:
    """16,384 octets is the least limit; without a word of the client none is longer."""
    peer = connect(PREFACE + settings(INITIAL_WINDOW_SIZE=1 << 20))
    peer.send(update(0, 1 << 20))
    message = encode_values([0.5] * 50_000)
    body = b"\0" + len(message).to_bytes(4, "big") + message
    pieces = [data(1, body[at : at + 16_384], 0) for at in range(0, len(body), 16_384)]
    peer.send(headers(1), *pieces, data(1, b""))
    answer = peer.read_answer()
    assert answer.status == 0 and len(answer.data) > 200_000
    assert max(answer.data_sizes) <= 16_384


# ----------------------------------------------------------------------------------------------- 6.7 PING, 6.8 GOAWAY
def test_6_7_a_ping_comes_back_as_it_was(peer: Peer) -> None:
    payloads = [bytes([each]) * 8 for each in range(20)]
    peer.send(*(frame(Kind.PING, 0, payload) for payload in payloads))
    pongs: Callable[[], list[bytes]] = lambda: [  # noqa: E731
        each.opaque_data for each in peer.frames if isinstance(each, PingFrame) and "ACK" in each.flags
    ]
    peer.read_until(lambda: len(pongs()) == len(payloads))
    assert pongs() == payloads
    peer.expect_alive()


@pytest.mark.parametrize("code", [Error.NO_ERROR, Error.PROTOCOL, 0xFFFF])
def test_6_8_a_client_that_goes_away_gets_what_it_asked_for(site: Site, peer: Peer, code: int) -> None:
    """Streams in flight end as usual, then the server closes."""
    peer.send(call(1, body=infer_message("gate")))
    peer.expect_pong(b"12345678")
    peer.send(frame(Kind.GOAWAY, 0, bytes(4) + code.to_bytes(4, "big") + b"bye"))
    with Peer(site.port) as second:
        second.send(call(1, body=infer_message("gate")))
        second.read_answer().check()
    peer.read_answer().check()
    peer.read_to_end()
    assert {each.error_code for each in peer.frames if isinstance(each, GoAwayFrame)} <= {Error.NO_ERROR}


# ------------------------------------------------------------------------------------------------- 6.9 flow control
def test_6_9_nothing_is_sent_beyond_the_streams_window(connect: Connect) -> None:
    peer = connect(PREFACE + settings(INITIAL_WINDOW_SIZE=0) + call(1))
    peer.read_until(lambda: 1 in peer.answers and peer.answers[1].blocks)
    peer.expect_pong(b"12345678")
    assert peer.answers[1].data == b""
    for count in range(1, 4):
        peer.send(update(1, 1))
        peer.read_until(lambda count=count: len(peer.answers[1].data) == count)  # type: ignore[misc]
    assert peer.answers[1].data_sizes == [1, 1, 1]
    peer.send(update(1, 1000))
    peer.read_answer().check()


def test_6_9_nothing_is_sent_beyond_the_connections_window(connect: Connect) -> None:
    peer = connect(PREFACE + settings(INITIAL_WINDOW_SIZE=1 << 20))
    message = encode_values([0.5] * 30_000)
    body = b"\0" + len(message).to_bytes(4, "big") + message
    peer.send(headers(1), *(data(1, body[at : at + 16_384], 0) for at in range(0, len(body), 16_384)), data(1, b""))
    peer.read_until(lambda: 1 in peer.answers and len(peer.answers[1].data) == 65_535)
    peer.expect_pong(b"12345678")
    assert len(peer.answers[1].data) == 65_535
    peer.send(update(0, 1 << 20))
    assert peer.read_answer().status == 0
    assert len(peer.answers[1].data) > 120_000
    peer.expect_alive()


def test_6_9_2_a_new_initial_window_holds_for_open_streams(connect: Connect) -> None:
    """It may make a window negative: then as much must be given back before anything is sent."""
    peer = connect(PREFACE + settings(INITIAL_WINDOW_SIZE=3) + call(1))
    peer.read_until(lambda: 1 in peer.answers and len(peer.answers[1].data) == 3)
    peer.send(settings(INITIAL_WINDOW_SIZE=2))
    peer.send(update(1, 1))
    peer.expect_pong(b"12345678")
    assert len(peer.answers[1].data) == 3
    peer.send(update(1, 1))
    peer.read_until(lambda: len(peer.answers[1].data) == 4)
    peer.send(settings(INITIAL_WINDOW_SIZE=65_535))
    peer.read_answer().check()


def test_6_9_the_servers_window_opens_again(connect: Connect) -> None:
    """More than the windows that the server announced gets through, because it gives them back."""
    peer = connect(GREETING)
    first = peer.frames[0]
    assert isinstance(first, SettingsFrame)
    peer.send(settings(INITIAL_WINDOW_SIZE=LARGEST_WINDOW), update(0, LARGEST_WINDOW - 65_535))
    message = encode_values([0.5] * (first.settings[SettingsFrame.INITIAL_WINDOW_SIZE] // 4 + 10_000))
    body = b"\0" + len(message).to_bytes(4, "big") + message
    stream_window, window = first.settings[SettingsFrame.INITIAL_WINDOW_SIZE], 1 << 16
    peer.send(headers(1))
    at = 0

    def room() -> int:
        updates = [each for each in peer.frames if isinstance(each, WindowUpdateFrame)]
        of_stream = stream_window + sum(each.window_increment for each in updates if each.stream_id == 1)
        of_connection = window - 1 + sum(each.window_increment for each in updates if each.stream_id == 0)
        return int(min(of_stream, of_connection)) - at

    def has_room() -> bool:
        return room() >= min(16_384, len(body) - at)

    while at < len(body):
        peer.read_until(has_room)
        peer.send(data(1, body[at : at + 16_384], 0))
        at += 16_384
    peer.send(data(1, b""))
    assert peer.read_answer().status == 0
    assert len(peer.answers[1].data) > stream_window
