"""gRPC sessions without sockets: the ``h2`` package plays the client, the test plays the driver."""

from __future__ import annotations

import random

import h2.config
import h2.connection
import h2.exceptions
import hyperframe.frame
import pytest
from session_pair import (
    CALL,
    EMPTY,
    FAST,
    HALF_CLOSE,
    MESSAGE,
    OVER,
    SLOW,
    WRITABLE,
    Pair,
    SessionProbe,
    frame,
    read_frames,
)

STATES = ["headers", "prefix", "message", "ready", "in flight", "answered", "call", "owned", "unread", "writing"]


def bring_to(pair: Pair, state: str) -> int:
    """A stream in one of the states of its life."""
    match state:
        case "headers":
            return pair.open(FAST, end=False, grpc_timeout="1S")
        case "prefix":
            return pair.open(FAST, b"\0\0", end=False)
        case "message":
            return pair.open(FAST, frame(b"x" * 100)[:50], end=False)
        case "ready":
            return pair.open(FAST, frame(b"x"), grpc_timeout="1S")
        case "in flight":
            stream_id = pair.open(FAST, frame(b"x"), grpc_timeout="1S")
            assert [ready[0] for ready in pair.server.take_ready()] == [stream_id]
            return stream_id
        case "answered":
            stream_id = bring_to(pair, "in flight")
            pair.acknowledges = False
            pair.server.answer(stream_id, b"y" * 100_000)
            pair.run()
        case "call":
            return pair.open(SLOW, end=False, grpc_timeout="1S")
        case _:
            stream_id = pair.open(SLOW, frame(b"a") + frame(b"b"), end=False, grpc_timeout="1S")
            assert pair.server.take_events() == [(stream_id, CALL | MESSAGE)]
            if state == "unread":
                assert pair.server.take_message(stream_id) == (b"a", False)
            elif state == "writing":
                pair.acknowledges = False
                pair.server.send_message(stream_id, b"y" * 100_000, wants_writable=True)
    return stream_id


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("end", ["reset", "lost", "expired"])
def test_a_stream_ends_at_any_moment(state: str, end: str) -> None:
    pair = Pair(window=65535)
    stream_id = bring_to(pair, state)
    is_owned = state in ("owned", "unread", "writing")
    if end == "reset":
        pair.reset(stream_id)
    elif end == "lost":
        pair.server.close()
    else:
        expected = [] if state in ("prefix", "message", "answered") else [stream_id]
        assert pair.server.expire(2_000_000_000) == expected
        pair.run()
        if expected and state != "writing":
            assert pair.status(stream_id) == (4, "Deadline Exceeded")
        else:  # has no deadline (any more), or bytes that the client does not take
            pair.reset(stream_id)
    assert pair.server.take_ready() == []
    assert pair.server.take_events() == ([(stream_id, OVER)] if is_owned else [])
    assert pair.server.take_events() == []
    assert pair.server.books == EMPTY
    if end != "lost":
        pair.client.increment_flow_control_window(65535)
        pair.check_next_call()


def test_a_stream_that_is_over_takes_no_answer() -> None:
    pair = Pair()
    stream_id = pair.open(FAST, frame(b"x"), grpc_timeout="1n")
    assert pair.server.take_ready() == [(stream_id, b"x", 2)]
    assert pair.server.expire(2) == [stream_id]
    pair.server.answer(stream_id, b"late")
    pair.server.fail(stream_id, 13, b"later")
    pair.run()
    assert stream_id not in pair.data
    assert pair.status(stream_id) == (4, "Deadline Exceeded")
    pair.check_next_call()


# ------------------------------------------------------------------------------------------------------- framing
@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
def test_bytes_in_pieces(piece: int) -> None:
    pair = Pair(piece=piece)
    fast = pair.open(FAST, frame(b"question"), grpc_timeout="5S")
    assert pair.server.take_ready() == [(fast, b"question", 5_000_000_001)]
    pair.server.answer(fast, b"answer")
    slow = pair.open(SLOW, frame(b"one") + frame(b"") + frame(b"three"), x_bin="AAE", user_agent="me")
    assert pair.server.take_events() == [(slow, CALL | MESSAGE | HALF_CLOSE)]
    assert pair.server.metadata(slow) == [(b":path", SLOW.encode()), (b"x-bin", b"AAE"), (b"user-agent", b"me")]
    messages = [pair.server.take_message(slow) for _ in range(4)]
    assert messages == [(b"one", False), (b"", False), (b"three", False), None]
    pair.server.send_head(slow, [(b"a", b"1"), (b"a", b"2")])
    pair.server.send_message(slow, b"first")
    pair.server.send_message(slow, b"")
    pair.server.finish(slow, 5, "nicht gefunden: 100 % ü".encode(), [(b"t-bin", b"AAE")] * 40)
    pair.run()
    assert pair.data == {fast: frame(b"answer"), slow: frame(b"first") + frame(b"")}
    assert pair.status(fast) == (0, "")
    assert pair.status(slow) == (5, "nicht gefunden: 100 %25 %C3%BC")
    assert pair.headers[slow][0]["content-type"] == "application/grpc"
    assert pair.headers[slow][1]["t-bin"] == "AAE"
    assert pair.server.books == EMPTY


def test_duplicate_metadata_keeps_its_order() -> None:
    pair = Pair()
    stream_id = pair.client.get_next_available_stream_id()
    fields = [(":method", "POST"), (":scheme", "http"), (":path", SLOW), (":authority", "x")]
    fields += [("content-type", "application/grpc+proto"), ("k", "2"), ("k", "1"), ("k", "2")]
    pair.client.send_headers(stream_id, fields, end_stream=True)
    pair.run()
    assert pair.server.take_events() == [(stream_id, CALL | HALF_CLOSE)]
    assert pair.server.metadata(stream_id)[1:] == [(b"k", b"2"), (b"k", b"1"), (b"k", b"2")]


def test_a_large_message_and_a_large_answer() -> None:
    pair = Pair(max_message_bytes=1 << 22, window=100_000)
    content = random.Random(1).randbytes(3_000_000)
    stream_id = pair.open(FAST, frame(content))
    assert pair.server.take_ready() == [(stream_id, content, 0)]
    pair.server.answer(stream_id, content)
    pair.run()
    assert pair.data[stream_id] == frame(content)
    assert pair.status(stream_id) == (0, "")
    pair.check_next_call()


def test_a_call_turned_away_keeps_its_metadata() -> None:
    pair = Pair()
    stream_id = pair.open(FAST, frame(b"odd"), who="me")
    pair.server.turn_away()
    assert pair.server.take_events() == [(stream_id, CALL | MESSAGE | HALF_CLOSE)]
    assert sorted(pair.server.metadata(stream_id)) == [(b":path", FAST.encode()), (b"who", b"me")]
    assert pair.server.take_message(stream_id) == (b"odd", False)
    pair.server.finish(stream_id, 3, b"no")
    pair.run()
    assert pair.status(stream_id) == (3, "no")
    pair.check_next_call()


def test_a_compressed_message_goes_to_python() -> None:
    pair = Pair()
    stream_id = pair.open(FAST, frame(b"zzz", flag=1), grpc_encoding="gzip")
    assert pair.server.take_ready() == []
    assert pair.server.take_events() == [(stream_id, CALL | MESSAGE | HALF_CLOSE)]
    assert pair.server.take_message(stream_id) == (b"zzz", True)
    pair.server.finish(stream_id, 0, b"")
    pair.check_next_call()


def test_long_texts_are_cut_between_characters() -> None:
    pair = Pair()
    stream_id = pair.open(SLOW)
    pair.server.take_events()
    pair.server.finish(stream_id, 2, b"." + "ü".encode() * 5000)
    pair.run()
    text = pair.status(stream_id)[1]
    assert 6000 < len(text) <= 6144
    assert text == "." + "%C3%BC" * ((len(text) - 1) // 6)


# ---------------------------------------------------------------------------------------------------- bad requests
@pytest.mark.parametrize(
    ("path", "body", "headers", "code", "text"),
    [
        (FAST, b"", {}, 12, "exactly one request message, received none"),
        (FAST, frame(b"a") + frame(b"b"), {}, 12, "exactly one request message, received more"),
        (FAST, frame(b"abc")[:-1], {}, 13, "ended in the middle of a message"),
        (SLOW, frame(b"abc")[:3], {}, 13, "ended in the middle of a message"),
        (FAST, b"\x02\0\0\0\0", {}, 13, "compressed flag is neither 0 nor 1"),
        (SLOW, frame(b"a", flag=1), {}, 13, "grpc-encoding names no compression"),
        (SLOW, frame(b"a", flag=1), {"grpc_encoding": "identity"}, 13, "grpc-encoding names no compression"),
        (FAST, frame(b"a"), {"grpc_encoding": "snappy"}, 12, "use identity, deflate or gzip"),
        (FAST, frame(b"a"), {"grpc_timeout": "1s"}, 3, "Malformed grpc-timeout"),
        (FAST, frame(b"a"), {"grpc_timeout": "123456789S"}, 3, "Malformed grpc-timeout"),
        (FAST, frame(b"a"), {"grpc_timeout": "-1S"}, 3, "Malformed grpc-timeout"),
        (FAST, frame(b"a"), {"grpc_timeout": "S"}, 3, "Malformed grpc-timeout"),
        (FAST, frame(b"a"), {"grpc_timeout": ""}, 3, "Malformed grpc-timeout"),
        (FAST, frame(bytes(1001)), {}, 8, "Received message larger than max (1001 vs. 1000)"),
        (SLOW, b"\0\xff\xff\xff\xff", {}, 8, "Received message larger than max (4294967295 vs. 1000)"),
        (SLOW, frame(b"a"), {"big": "x" * 20000}, 8, "Received metadata larger than max"),
    ],
)
def test_bad_requests(path: str, body: bytes, headers: dict[str, str], code: int, text: str) -> None:
    pair = Pair(max_message_bytes=1000)
    stream_id = pair.open(path, body, **headers)
    actual = pair.status(stream_id)
    assert (actual[0], text in actual[1]) == (code, True), actual
    assert pair.headers[stream_id][-1]["grpc-accept-encoding"] == "identity,deflate,gzip"
    assert pair.server.take_ready() == []
    assert pair.server.take_events() == []
    pair.check_next_call()


@pytest.mark.parametrize(
    ("headers", "http_status"),
    [
        ({"method": "GET"}, "405"),
        ({"content_type": "application/json"}, "415"),
        ({"content_type": "application/grpc-web"}, "415"),
    ],
)
def test_what_is_no_grpc_call(headers: dict[str, str], http_status: str) -> None:
    pair = Pair()
    stream_id = pair.open(FAST, frame(b"a"), **headers)
    assert pair.headers[stream_id] == [{":status": http_status}]
    assert stream_id in pair.ended
    pair.check_next_call()


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc+proto", "application/grpc;x=y"])
def test_content_types_of_grpc(content_type: str) -> None:
    pair = Pair()
    stream_id = pair.open(FAST, frame(b"a"), content_type=content_type)
    assert pair.server.take_ready() == [(stream_id, b"a", 0)]


def test_the_longest_timeout_does_not_overflow() -> None:
    pair = Pair()
    stream_id = pair.open(FAST, frame(b"a"), grpc_timeout="99999999H")
    assert pair.server.take_ready() == [(stream_id, b"a", 10**18 + 1)]


def test_an_early_answer_ends_the_upload() -> None:
    pair = Pair(max_message_bytes=1000)
    stream_id = pair.open(FAST, frame(bytes(5000))[:2000], end=False)
    assert pair.status(stream_id)[0] == 8
    assert pair.resets == {stream_id: 0}
    pair.check_next_call()


def test_messages_under_assembly_are_bounded() -> None:
    pair = Pair(max_message_bytes=1 << 20, max_buffered_bytes=600_000)
    first = pair.open(FAST, frame(bytes(1 << 20))[:300_000], end=False)
    second = pair.open(FAST, frame(bytes(1 << 20))[:300_000], end=False)
    assert pair.status(second)[0] == 8
    assert "Unfinished messages on this connection larger than max" in pair.status(second)[1]
    assert first not in pair.ended
    assert 0 < pair.server.books["partial_bytes"] <= 600_000
    pair.reset(first)
    pair.check_next_call()


def test_clients_that_do_not_read_get_no_more_calls() -> None:
    pair = Pair(window=1000, max_outbound_bytes=5000)
    pair.acknowledges = False
    first = pair.open(FAST, frame(b"a"))
    pair.server.take_ready()
    pair.server.answer(first, bytes(10_000))
    pair.run()
    second = pair.open(FAST, frame(b"a"))
    assert pair.status(second)[0] == 8
    assert "not being read" in pair.status(second)[1]
    pair.reset(first)
    assert pair.server.books == EMPTY


def test_concurrent_streams_are_bounded() -> None:
    pair = Pair(max_concurrent_streams=3)
    streams = [pair.open(FAST, frame(b"a"), end=False) for _ in range(3)]
    with pytest.raises(h2.exceptions.TooManyStreamsError):
        pair.open(FAST, frame(b"a"))
    pair.reset(streams[0])
    pair.open(FAST, frame(b"a"))


# ---------------------------------------------------------------------------------------------------- flow control
def test_a_reader_that_is_slow_stops_the_client_but_not_its_neighbours() -> None:
    pair = Pair(stream_window_bytes=65535, connection_window_bytes=1 << 20)
    stream_id = pair.open(SLOW, end=False)
    assert pair.server.take_events() == [(stream_id, CALL)]
    sent = 0
    while pair.client.local_flow_control_window(stream_id) >= 10_005:
        pair.client.send_data(stream_id, frame(bytes(10_000)))
        sent += 1
        pair.run()
        assert sent < 100, "the window never closes"
    assert sent == 6
    neighbour = pair.open(FAST, frame(bytes(200_000)))
    assert pair.server.take_ready() == [(neighbour, bytes(200_000), 0)]
    for _ in range(sent):
        assert pair.server.take_message(stream_id) == (bytes(10_000), False)
    pair.run()
    assert pair.client.local_flow_control_window(stream_id) > 40_000
    assert pair.server.books["unread_bytes"] == 0


def test_a_message_larger_than_the_window_gets_through() -> None:
    pair = Pair(stream_window_bytes=65535, connection_window_bytes=65535)
    stream_id = pair.open(SLOW, frame(b"small"), end=False)
    assert pair.server.take_events() == [(stream_id, CALL | MESSAGE)]
    big = frame(bytes(500_000))
    pair.client.send_data(stream_id, big[:16_000])
    pair.run()
    assert pair.server.take_message(stream_id) == (b"small", False)
    pair.run()
    pair.send(stream_id, big[16_000:], end=True)
    assert pair.server.take_message(stream_id) == (bytes(500_000), False)


def test_unread_messages_hold_the_connection_back_in_the_end() -> None:
    pair = Pair(stream_window_bytes=1 << 20, connection_window_bytes=1 << 20, max_buffered_bytes=300_000)
    streams = [pair.open(SLOW, end=False) for _ in range(3)]
    sent = 0
    while sent < 400:
        if min(pair.client.local_flow_control_window(stream_id) for stream_id in streams) < 5005:
            break
        pair.client.send_data(streams[sent % 3], frame(bytes(5000)))
        pair.run()
        sent += 1
    assert 200 < sent < 400
    books = pair.server.books
    assert books["unread_bytes"] < 300_000 + (1 << 20) + 100_000
    assert books["withheld_bytes"] > 0
    taken = 0
    for stream_id in streams:
        while pair.server.take_message(stream_id) is not None:
            taken += 1
    assert taken == sent
    pair.run()
    assert pair.client.outbound_flow_control_window > 500_000
    assert pair.server.books["withheld_bytes"] == 0


def test_a_writer_is_told_when_it_may_go_on() -> None:
    pair = Pair(window=65535, high_water_bytes=100_000)
    pair.acknowledges = False
    stream_id = pair.open(SLOW)
    pair.server.take_events()
    assert pair.server.send_message(stream_id, bytes(300_000), wants_writable=True) == 300_005
    pair.run()
    assert pair.server.take_events() == []
    for _ in range(4):
        pair.client.increment_flow_control_window(60_000)
        pair.client.increment_flow_control_window(60_000, stream_id)
        pair.run()
    assert pair.server.take_events() == [(stream_id, WRITABLE)]
    pair.acknowledges = True
    pair.client.increment_flow_control_window(60_000)
    pair.client.increment_flow_control_window(60_000, stream_id)
    pair.server.finish(stream_id, 0, b"")
    pair.run()
    assert pair.data[stream_id] == frame(bytes(300_000))
    assert pair.server.books == EMPTY


@pytest.mark.parametrize("capacity", [32768, 32769, 50_000])
def test_small_buffers_lose_nothing(capacity: int) -> None:
    pair = Pair()
    content = random.Random(2).randbytes(200_000)
    streams = [pair.open(FAST, frame(b"a")) for _ in range(5)]
    pair.server.take_ready()
    for stream_id in streams:
        pair.server.answer(stream_id, content)
    for event in pair.client.receive_data(pair.server.collect(capacity)):
        pair._note(event)
    pair.run()
    assert all(pair.data[stream_id] == frame(content) for stream_id in streams)
    assert all(pair.status(stream_id) == (0, "") for stream_id in streams)


# ------------------------------------------------------------------------------------------------- end and attacks
def test_going_away_in_two_steps() -> None:
    pair = Pair()
    first = pair.open(FAST, frame(b"a"))
    fields = [(":method", "POST"), (":scheme", "http"), (":path", FAST), (":authority", "x")]
    pair.client.send_headers(3, [*fields, ("content-type", "application/grpc")])
    pair.client.send_data(3, frame(b"b"), end_stream=True)
    pair.server.drain()
    notice, ping = read_frames(pair.server.collect())
    assert isinstance(notice, hyperframe.frame.GoAwayFrame) and notice.last_stream_id == 2**31 - 1
    assert isinstance(ping, hyperframe.frame.PingFrame)
    # a request that crosses the notice on its way is still taken; the client's answer comes after it
    pair.server.feed(pair.client.data_to_send())
    assert read_frames(pair.server.collect()) == []
    pair.server.feed(hyperframe.frame.PingFrame(0, ping.opaque_data, flags=["ACK"]).serialize())
    (final,) = read_frames(pair.server.collect())
    assert isinstance(final, hyperframe.frame.GoAwayFrame) and final.last_stream_id == 3
    assert [ready[0] for ready in pair.server.take_ready()] == [first, 3]
    pair.server.answer(first, b"1")
    assert not pair.server.is_over
    pair.server.answer(3, b"2")
    answers = read_frames(pair.server.collect())
    data = {item.stream_id: item.data for item in answers if isinstance(item, hyperframe.frame.DataFrame)}
    assert data == {first: frame(b"1"), 3: frame(b"2")}
    assert pair.server.is_over


def test_going_away_does_not_wait_for_a_silent_client() -> None:
    server = SessionProbe()
    server.collect()
    server.drain()
    server.collect()
    assert not server.is_over
    server.finish_drain()
    server.collect()
    assert server.is_over


def test_http1_is_refused() -> None:
    server = SessionProbe()
    assert server.feed(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") is False
    assert server.is_over
    assert server.collect() is None


@pytest.mark.parametrize("seed", range(40))
def test_random_bytes_never_break_more_than_their_session(seed: int) -> None:
    chance = random.Random(seed)
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    fields = [(":method", "POST"), (":scheme", "http"), (":path", chance.choice([FAST, SLOW])), (":authority", "x")]
    client.send_headers(1, [*fields, ("content-type", "application/grpc"), ("grpc-timeout", "5S")])
    client.send_data(1, frame(b"abc"), end_stream=chance.random() < 0.5)
    good = bytearray(client.data_to_send())
    for _ in range(chance.randrange(1, 12)):
        good[chance.randrange(len(good))] = chance.randrange(256)
    server = SessionProbe()
    for at in range(0, len(good), 5):
        if not server.feed(bytes(good[at : at + 5])):
            break
        server.collect()
        server.take_events()
        server.take_ready()
    server.feed(chance.randbytes(2000))
    server.close()
    server.take_events()
    assert server.books == EMPTY
