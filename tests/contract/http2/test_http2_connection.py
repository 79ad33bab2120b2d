"""RFC 9113, sections 3 to 5: prefaces, frames, header blocks, streams and their states, errors, extensions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from http2_peer import (
    ACK,
    END_HEADERS,
    END_STREAM,
    GREETING,
    PREFACE,
    SETTINGS,
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
)
from hyperframe.frame import GoAwayFrame, SettingsFrame
from running_site import Site

from .conftest import MAX_STREAMS

Connect = Callable[..., Peer]
RESET_1 = frame(Kind.RST_STREAM, 1, Error.CANCEL.to_bytes(4, "big"))
UPDATE = (1).to_bytes(4, "big")
BLOCK = encode_fields(fields_of())


def in_queue(stream_id: int = 1) -> bytes:
    """A call that is half-closed by the client and stays unanswered."""
    return call(stream_id, body=infer_message("gate"))


# --------------------------------------------------------------------------------------------- 3.4 connection preface
@pytest.mark.parametrize(
    "greeting",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        PREFACE[:-1] + b"x" + SETTINGS,
        PREFACE + frame(Kind.PING, 0, bytes(8)),
        PREFACE + headers(1),
        PREFACE + frame(Kind.SETTINGS, 0, flags=ACK),
    ],
    ids=["HTTP/1.1", "its last octet", "PING first", "HEADERS first", "settings acknowledged first"],
)
def test_3_4_a_wrong_preface_ends_the_connection(connect: Connect, greeting: bytes) -> None:
    peer = connect(greeting, is_eager=True)
    peer.read_to_end()
    said = [each.error_code for each in peer.frames if isinstance(each, GoAwayFrame)]
    assert said in ([], [Error.PROTOCOL]), peer.frames


def test_3_4_the_server_greets_with_settings(peer: Peer) -> None:
    first = peer.frames[0]
    assert isinstance(first, SettingsFrame) and "ACK" not in first.flags
    assert first.settings[SettingsFrame.MAX_CONCURRENT_STREAMS] == MAX_STREAMS
    assert first.settings.get(SettingsFrame.ENABLE_PUSH, 0) == 0
    peer.expect_alive()


def test_3_4_a_client_need_not_wait(connect: Connect) -> None:
    peer = connect(GREETING + call(1), is_eager=True)
    peer.read_answer().check()


def test_3_4_octets_one_by_one(connect: Connect) -> None:
    peer = connect(PREFACE[:1], is_eager=True)
    for octet in PREFACE[1:] + SETTINGS + call(1):
        peer.send(bytes([octet]))
    peer.read_answer().check()


# ------------------------------------------------------------------------------------------------------- 4.1 to 4.3
IGNORED = {
    "4.1 unknown frame type": frame(0xBB, 0, b"any") + frame(0xBB, 1, b"any", 0xFF),
    "4.1 unknown flags": frame(Kind.PING, 0, b"12345678", 0x16) + frame(Kind.SETTINGS, 0, flags=0xFE),
    "4.1 reserved bit": frame(Kind.PING, 1 << 31, b"12345678"),
    "5.1 PRIORITY on an idle stream": frame(Kind.PRIORITY, 99, bytes(4) + b"\x10"),
    "5.5 unknown setting": frame(Kind.SETTINGS, 0, b"\x0f\xff" + bytes(4)),
    "6.5 empty settings": SETTINGS * 3,
    "6.7 an answer nobody asked for": frame(Kind.PING, 0, bytes(8), ACK),
    "6.8 reason": frame(0xC, 0, bytes(4)),
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_has_no_meaning_is_ignored(peer: Peer, name: str) -> None:
    peer.send(IGNORED[name])
    peer.expect_alive()


CONNECTION_ERRORS: dict[str, tuple[bytes, Error]] = {
    "4.2 DATA too long": (headers(1) + frame(Kind.DATA, 1, bytes(16385)), Error.FRAME_SIZE),
    "4.2 HEADERS too long": (frame(Kind.HEADERS, 1, bytes(16385), END_HEADERS), Error.FRAME_SIZE),
    "4.2 PING too long": (frame(Kind.PING, 0, bytes(16385)), Error.FRAME_SIZE),
    "4.3 broken block": (frame(Kind.HEADERS, 1, b"\xff\xff\xff\xff\xff\xff", END_HEADERS), Error.COMPRESSION),
    "4.3 cut block": (frame(Kind.HEADERS, 1, BLOCK[:-3], END_HEADERS), Error.COMPRESSION),
    "4.3 PRIORITY inside a block": (
        headers(1, flags=0) + frame(Kind.PRIORITY, 1, bytes(5)),
        Error.PROTOCOL,
    ),
    "4.3 another stream inside a block": (headers(1, flags=0) + headers(3), Error.PROTOCOL),
    "4.3 another stream's CONTINUATION": (
        headers(1, flags=0) + frame(Kind.CONTINUATION, 3, BLOCK, END_HEADERS),
        Error.PROTOCOL,
    ),
    "5.1 DATA on an idle stream": (data(1, b"x"), Error.PROTOCOL),
    "5.1 RST_STREAM on an idle stream": (RESET_1, Error.PROTOCOL),
    "5.1 WINDOW_UPDATE on an idle stream": (frame(Kind.WINDOW_UPDATE, 1, UPDATE), Error.PROTOCOL),
    "5.1 CONTINUATION on an idle stream": (frame(Kind.CONTINUATION, 1, BLOCK, END_HEADERS), Error.PROTOCOL),
    "5.1 CONTINUATION when half-closed": (
        in_queue() + frame(Kind.CONTINUATION, 1, b"", END_HEADERS),
        Error.PROTOCOL,
    ),
    "5.1.1 even stream": (headers(2), Error.PROTOCOL),
    "5.5 extension frame inside a block": (
        headers(1, flags=0) + frame(0xBB, 1, b"any") + frame(Kind.CONTINUATION, 1, b"", END_HEADERS),
        Error.PROTOCOL,
    ),
}


@pytest.mark.parametrize("name", CONNECTION_ERRORS)
def test_connection_errors(peer: Peer, name: str) -> None:
    octets, code = CONNECTION_ERRORS[name]
    peer.send(octets)
    peer.expect_goaway(code)


def test_4_2_a_frame_of_full_length(peer: Peer) -> None:
    """16,384 octets must be taken; here padding fills them up."""
    message = infer_message()
    pad = 255
    content = bytes([pad]) + message + bytes(pad)
    peer.send(headers(1), frame(Kind.DATA, 1, content, END_STREAM | 0x8))
    peer.read_answer().check()
    fields = fields_of(_path="/a/b", x_fill="x" * 15_000)
    size = len(encode_fields(fields))
    fields = fields_of(_path="/a/b", x_fill="x" * (15_000 + 16_384 - size))
    assert len(encode_fields(fields)) == 16_384
    peer.send(headers(3, fields, END_HEADERS | END_STREAM))
    assert peer.read_answer(3).is_ended
    peer.expect_alive()


# ------------------------------------------------------------------------------------------------- 5.1 stream states
# RFC 9113 lets a peer take many stream errors for connection errors (5.4.1), so either is right, but the call must not
# be answered, and never as if nothing had happened.
CLOSED: dict[str, tuple[bytes, bytes]] = {
    "half-closed, DATA": (in_queue(), data(1, b"x")),
    "half-closed, HEADERS": (in_queue(), headers(1, flags=END_HEADERS | END_STREAM)),
    "reset, DATA": (headers(1) + RESET_1, data(1, b"x")),
    "reset, HEADERS": (headers(1) + RESET_1, headers(1, flags=END_HEADERS | END_STREAM)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_5_1_frames_on_closed_streams(peer: Peer, name: str) -> None:
    before, after = CLOSED[name]
    peer.send(before, after, frame(Kind.PING, 0, b"reached?"))
    pings = lambda: [each for each in peer.frames if getattr(each, "opaque_data", None) == b"reached?"]  # noqa: E731
    peer.read_until(lambda: peer.is_closed or pings())
    answer = peer.answers.get(1)
    assert answer is None or (answer.blocks == [] and answer.reset in (None, Error.STREAM_CLOSED)), peer.frames
    if answer is None or answer.reset is None:
        codes = [each.error_code for each in peer.frames if isinstance(each, GoAwayFrame)]
        assert codes in ([Error.STREAM_CLOSED], []), peer.frames
        assert codes or name.startswith("reset"), "a frame on a half-closed stream was ignored"


def test_5_1_frames_that_closed_and_half_closed_streams_still_take(peer: Peer) -> None:
    late = [
        frame(Kind.WINDOW_UPDATE, 1, UPDATE),
        frame(Kind.PRIORITY, 1, bytes(5)),
        RESET_1,
        frame(Kind.WINDOW_UPDATE, 1, UPDATE),
        frame(Kind.PRIORITY, 1, bytes(5)),
        RESET_1,
    ]
    peer.send(in_queue(), *late)
    peer.expect_alive()
    assert 1 not in peer.answers


def test_5_1_1_ids_that_go_down(peer: Peer) -> None:
    """A connection error PROTOCOL_ERROR, or STREAM_CLOSED where ids that were left out pass for closed streams."""
    peer.send(call(5), call(3))
    peer.read_answer(5).check()
    peer.read_until(lambda: peer.is_closed or 3 in peer.answers)
    if peer.is_closed:
        peer.expect_goaway(Error.PROTOCOL)
    else:
        peer.expect_reset(Error.STREAM_CLOSED, stream_id=3)


def test_5_1_1_a_flood_of_ids_that_go_down(peer: Peer) -> None:
    """Each is answered with RST_STREAM; who provokes thousands and reads none of them is cut off."""
    peer.send(call(5))
    peer.read_answer(5).check()
    one = frame(Kind.HEADERS, 3, b"\x82", END_HEADERS)
    for _ in range(2000):
        if not peer.send(one * 1000):
            break
    else:
        pytest.fail("two million frames were taken")
    peer.read_to_end()


def test_5_1_1_ids_may_be_left_out(peer: Peer) -> None:
    for stream_id in (7, 9, 2**31 - 3):
        peer.send(call(stream_id))
        peer.read_answer(stream_id).check()


def test_5_1_2_streams_above_the_limit_are_refused(site: Site, peer: Peer) -> None:
    """A stream error; for a client that has acknowledged the limit a connection error is right too (5.4.2)."""
    ids = range(1, 2 * MAX_STREAMS + 1, 2)
    peer.send(*(headers(stream_id) for stream_id in ids))
    peer.expect_pong(b"12345678")
    peer.send(call(101))
    peer.read_until(lambda: peer.is_closed or 101 in peer.answers)
    if peer.is_closed:
        peer.expect_goaway(Error.PROTOCOL)
        return
    answer = peer.read_answer(101)
    assert answer.reset in (Error.REFUSED_STREAM, Error.PROTOCOL) and answer.blocks == []
    peer.send(*(data(stream_id, infer_message()) for stream_id in ids))
    for stream_id in ids:
        peer.read_answer(stream_id).check()
    peer.expect_alive()


def test_5_1_2_the_limit_itself_may_be_used_again_and_again(peer: Peer) -> None:
    for first in (1, 1 + 2 * MAX_STREAMS):
        ids = range(first, first + 2 * MAX_STREAMS, 2)
        peer.send(*(headers(stream_id) for stream_id in ids))
        peer.send(*(data(stream_id, infer_message()) for stream_id in reversed(ids)))
        for stream_id in ids:
            peer.read_answer(stream_id).check()


@pytest.mark.parametrize("kind", [Kind.PRIORITY, Kind.HEADERS])
def test_5_3_a_stream_that_depends_on_itself(peer: Peer, kind: Kind) -> None:
    """An error in RFC 7540, without a meaning in RFC 9113: refused or ignored, but the connection has one story."""
    depends = (1).to_bytes(4, "big") + b"\x0f"
    if kind is Kind.PRIORITY:
        peer.send(frame(kind, 1, depends), call(1))
    else:
        peer.send(frame(kind, 1, depends + BLOCK, END_HEADERS | 0x20), data(1, infer_message()))
    peer.read_until(lambda: peer.is_closed or (1 in peer.answers and peer.answers[1].is_over))
    if peer.is_closed:
        peer.expect_goaway(Error.PROTOCOL)
    elif peer.answers[1].reset != Error.PROTOCOL:
        peer.answers[1].check()


def test_5_4_1_goaway_names_the_last_stream(peer: Peer) -> None:
    """What was served before the error has its answer, and the client learns that nothing later was looked at."""
    peer.send(call(1), call(3))
    peer.read_answer(1).check()
    peer.read_answer(3).check()
    peer.send(data(0, b"x"), call(5))
    peer.expect_goaway(Error.PROTOCOL)
    (goaway,) = (each for each in peer.frames if isinstance(each, GoAwayFrame))
    assert goaway.last_stream_id == 3
    assert 5 not in peer.answers
