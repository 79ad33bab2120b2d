"""Keep-alive, age, idleness, noise and shared memory of sessions without sockets or clocks: the test tells the time."""

from __future__ import annotations

from typing import Any

import hpack
import hyperframe.frame as hf
import pytest
from session_pair import FAST, SLOW, Pair, frame, read_frames

from aiorch_server._core import ConnectionRules, ServerLedger

S = 1_000_000_000
MS = S // 1000
QUIET: dict[str, Any] = {
    "keepalive_time_s": 0,
    "keepalive_timeout_s": 1,
    "max_ping_strikes": 0,
    "stall_timeout_s": 0,
}


def make_pair(ledger: ServerLedger | None = None, **rules: Any) -> Pair:
    sizes = {name: rules.pop(name) for name in list(rules) if name.endswith(("_bytes", "_streams"))}
    return Pair(rules=ConnectionRules(**{**QUIET, **rules}), ledger=ledger, **sizes)


def tend(pair: Pair, now_ns: int) -> list[hf.Frame]:
    """What the server says at that time by itself."""
    pair.now_ns = now_ns
    pair.server.tend(now_ns)
    return read_frames(pair.server.collect() or b"")


def kinds(frames: list[hf.Frame]) -> list[type]:
    return [type(each) for each in frames]


# ------------------------------------------------------------------------------------------------------- keep-alive
def test_a_silent_client_is_pinged_and_closed() -> None:
    pair = make_pair(keepalive_time_s=10, keepalive_timeout_s=2)
    pair.open(SLOW)
    assert tend(pair, 9 * S) == []
    (ping,) = tend(pair, 10 * S + 1)
    assert isinstance(ping, hf.PingFrame) and "ACK" not in ping.flags
    assert tend(pair, 12 * S) == [] and not pair.server.is_over
    tend(pair, 12 * S + 1)  # late, but the driver may have been late itself
    assert not pair.server.is_over
    tend(pair, 12 * S + 30 * MS)
    assert pair.server.is_over and pair.server.collect() is None


@pytest.mark.parametrize("answer", ["ack", "other bytes", "ack at the last look"])
def test_any_byte_keeps_a_client(answer: str) -> None:
    pair = make_pair(keepalive_time_s=10, keepalive_timeout_s=2)
    pair.open(SLOW)
    (ping,) = tend(pair, 11 * S)
    assert isinstance(ping, hf.PingFrame)
    if answer == "ack at the last look":
        tend(pair, 13 * S + 1)
    data = hf.WindowUpdateFrame(0, window_increment=1) if answer == "other bytes" else ping
    if isinstance(data, hf.PingFrame):
        data.flags.add("ACK")
    now = 13 * S + 10 * MS if answer == "ack at the last look" else 12 * S
    assert pair.server.feed(data.serialize(), now)
    for later in range(13, 22):
        assert tend(pair, later * S + 15 * MS) == []
    assert not pair.server.is_over
    assert kinds(tend(pair, now + 10 * S + 1)) == [hf.PingFrame]


@pytest.mark.parametrize("is_permitted", [False, True])
def test_pings_without_calls_need_permission(is_permitted: bool) -> None:
    pair = make_pair(keepalive_time_s=10, keepalive_timeout_s=2, keepalive_permit_without_calls=is_permitted)
    assert kinds(tend(pair, 11 * S)) == ([hf.PingFrame] if is_permitted else [])
    tend(pair, 14 * S)
    tend(pair, 15 * S)
    assert pair.server.is_over == is_permitted


def test_the_answer_to_a_keepalive_does_not_end_a_drain() -> None:
    pair = make_pair(keepalive_time_s=10, keepalive_timeout_s=5)
    pair.open(SLOW)
    (alive,) = tend(pair, 11 * S)
    pair.server.drain()
    notice, leaving = read_frames(pair.server.collect())
    assert isinstance(notice, hf.GoAwayFrame) and notice.last_stream_id == 2**31 - 1
    assert alive.opaque_data != leaving.opaque_data
    for content in (alive.opaque_data, bytes(8)):
        pair.server.feed(hf.PingFrame(0, content, flags=["ACK"]).serialize(), 12 * S)
        assert read_frames(pair.server.collect()) == []
    pair.server.feed(hf.PingFrame(0, leaving.opaque_data, flags=["ACK"]).serialize(), 12 * S)
    (final,) = read_frames(pair.server.collect())
    assert isinstance(final, hf.GoAwayFrame) and final.last_stream_id == 1


# --------------------------------------------------------------------------------------------- clients that ping
def ping(pair: Pair, now_ns: int) -> list[hf.Frame]:
    pair.server.feed(hf.PingFrame(0, b"fromhere").serialize(), now_ns)
    return [each for each in read_frames(pair.server.collect()) if not isinstance(each, hf.PingFrame)]


def test_too_many_pings() -> None:
    pair = make_pair(min_ping_interval_s=300, max_ping_strikes=2)
    pair.open(SLOW)
    assert [ping(pair, now) for now in (1 * S, 2 * S, 3 * S)] == [[], [], []]
    (goaway,) = ping(pair, 4 * S)
    assert isinstance(goaway, hf.GoAwayFrame)
    assert (goaway.error_code, goaway.additional_data) == (0xB, b"too_many_pings")
    assert pair.server.is_over


def test_pings_far_apart_and_pings_between_answers_are_welcome() -> None:
    pair = make_pair(min_ping_interval_s=5, max_ping_strikes=1)
    stream_id = pair.open(SLOW, frame(b"x"), end=False)
    for second in range(0, 60, 5):
        assert ping(pair, second * S + 1) == []
    pair.server.take_events()
    for now in range(60, 80):
        pair.server.send_message(stream_id, b"answer")
        assert hf.GoAwayFrame not in kinds(ping(pair, now * S))
    assert not pair.server.is_over


def test_pings_without_calls() -> None:
    pair = make_pair(min_ping_interval_s=1, max_ping_strikes=1)
    assert ping(pair, 10 * S) == [] and ping(pair, 20 * S) == []
    assert kinds(ping(pair, 30 * S)) == [hf.GoAwayFrame]
    pair = make_pair(min_ping_interval_s=1, max_ping_strikes=1, keepalive_permit_without_calls=True)
    assert [ping(pair, now * S) for now in range(10, 20)] == [[]] * 10


# ------------------------------------------------------------------------------------------------ clients that reset
BURST = 1000  # what may be reset at once, and in a second


def open_and_reset(pair: Pair, count: int, now_ns: int, *, after_ns: int = 0, **headers: str) -> list[hf.Frame]:
    """The GOAWAYs that calls provoke which are opened one after the other and reset so much later."""
    encoder = hpack.Encoder()
    fields = {":method": "POST", ":scheme": "http", ":path": SLOW, ":authority": "x", "te": "trailers"}
    fields |= {"content-type": "application/grpc", **headers}
    block = encoder.encode([hpack.NeverIndexedHeaderTuple(*each) for each in fields.items()])
    first = pair.client.get_next_available_stream_id()
    pair.client.highest_outbound_stream_id = last = first + 2 * (count - 1)
    said = b""
    for now, make in (
        (now_ns, lambda stream_id: hf.HeadersFrame(stream_id, block, flags=["END_HEADERS"])),
        (now_ns + after_ns, lambda stream_id: hf.RstStreamFrame(stream_id, 8)),
    ):
        for stream_id in range(first, last + 1, 2):
            assert pair.server.feed(make(stream_id).serialize(), now)
            said += pair.server.collect() or b""
    pair.server.take_events()
    return [each for each in read_frames(said) if isinstance(each, hf.GoAwayFrame)]


def test_who_resets_in_floods_gets_no_more_calls_and_keeps_what_it_has() -> None:
    pair = make_pair(max_concurrent_streams=1024)
    stream_id = pair.open(SLOW, frame(b"x"))
    pair.server.take_events()
    assert open_and_reset(pair, BURST // 2, 1) == []
    assert open_and_reset(pair, BURST // 2, 1) == []
    (goaway,) = open_and_reset(pair, BURST, 1)  # once
    assert (goaway.error_code, goaway.additional_data) == (0xB, b"too_many_resets")
    pair.server.send_message(stream_id, b"answer")
    assert any(isinstance(each, hf.DataFrame) for each in read_frames(pair.server.collect()))
    assert not pair.server.is_over
    assert not open_and_reset(pair, 1, 10 * S)
    pair.server.finish(stream_id, 0, b"")
    pair.server.collect()
    assert pair.server.is_over


def test_the_bound_of_resets_refills_and_follows_the_streams_that_may_be_open() -> None:
    pair = make_pair(max_concurrent_streams=1024)
    for second in range(1, 5):
        assert open_and_reset(pair, BURST, second * S) == []
    assert open_and_reset(pair, BURST // 2, 4 * S + S // 2) == []
    assert len(open_and_reset(pair, 1 + 24, 4 * S + S // 2)) == 1  # 1024 streams may be open at a time


@pytest.mark.parametrize(
    ("timeout", "after_ns"),
    [("20S", 20 * S), ("20S", 500 * MS), ("700m", 450 * MS), ("1n", 1), ("1S", 0)],
    ids=["on time", "patient", "early", "no time", "seen late"],
)
def test_calls_whose_time_is_up_are_no_flood(timeout: str, after_ns: int) -> None:
    """Whoever ends them first: without a reset the server would have done it as well."""
    pair = make_pair(max_concurrent_streams=1024)
    for second in range(10):
        assert open_and_reset(pair, 1000, second + 1, after_ns=after_ns, **{"grpc-timeout": timeout}) == []


def test_calls_that_expire_before_they_begin_are_bounded_too() -> None:
    pair = make_pair(max_concurrent_streams=1024)
    for _ in range(16):
        assert open_and_reset(pair, 1024, 1, **{"grpc-timeout": "1n"}) == []
    assert len(open_and_reset(pair, 1, 1, **{"grpc-timeout": "1n"})) == 1


def test_calls_reset_long_before_their_time_count() -> None:
    pair = make_pair(max_concurrent_streams=1024)
    assert open_and_reset(pair, 1024, 1, after_ns=499 * MS, **{"grpc-timeout": "2S"}) == []
    assert len(open_and_reset(pair, 1, 499 * MS, **{"grpc-timeout": "2S"})) == 1


@pytest.mark.parametrize(
    "idle",
    [hf.SettingsFrame(0), hf.PriorityFrame(1, exclusive=True), hf.DataFrame(1, b""), hf.PingFrame(0, b"12345678")],
    ids=["settings", "priority", "empty data", "ping"],
)
def test_frames_that_ask_for_nothing_are_bounded(idle: hf.Frame) -> None:
    pair = make_pair()
    stream_id = pair.open(SLOW, b"\0", end=False)
    frames: list[hf.Frame] = []
    for _ in range(101):
        assert not pair.server.is_over
        pair.server.feed(idle.serialize() * 100)
        frames += read_frames(pair.server.collect())
    assert isinstance(frames[-1], hf.GoAwayFrame) and frames[-1].error_code == 0xB
    assert pair.server.is_over
    assert stream_id == 1


def test_idle_frames_among_useful_ones_are_not_counted() -> None:
    pair = make_pair()
    stream_id = pair.open(SLOW, end=False)
    for _ in range(110):
        pair.server.feed(hf.WindowUpdateFrame(0, window_increment=1).serialize() * 200)
        pair.send(stream_id, frame(b"x"))
    assert not pair.server.is_over


# -------------------------------------------------------------------------------------------------- age and idleness
def end_of_age(pair: Pair) -> int:
    """When the first GOAWAY is due."""
    return int(pair.server.tend(2))


def test_an_old_connection_is_left_in_two_steps() -> None:
    pair = make_pair(max_connection_age_s=10)
    stream_id = pair.open(FAST, frame(b"in flight"))
    pair.server.take_ready()
    due = end_of_age(pair)
    assert 9 * S <= due <= 11 * S + 1
    assert tend(pair, due - 1) == []
    notice, leaving = tend(pair, due)
    assert isinstance(notice, hf.GoAwayFrame) and notice.last_stream_id == 2**31 - 1 and notice.error_code == 0
    late = pair.client.get_next_available_stream_id()  # a request that crosses the notice
    pair.client.send_headers(late, [(":method", "POST"), (":scheme", "http"), (":path", FAST), (":authority", "x")])
    pair.client.reset_stream(late)
    pair.server.feed(pair.client.data_to_send(), due)
    leaving.flags.add("ACK")
    pair.server.feed(leaving.serialize(), due + 1)
    (final,) = [each for each in read_frames(pair.server.collect()) if isinstance(each, hf.GoAwayFrame)]
    assert final.last_stream_id == late
    assert not pair.server.is_over, "the answer is still owed"
    pair.server.answer(stream_id, b"answer")
    pair.run()
    assert pair.data[stream_id] == frame(b"answer") and pair.server.is_over


def test_a_client_that_does_not_answer_the_ping_is_left_all_the_same() -> None:
    pair = make_pair(max_connection_age_s=10)
    due = end_of_age(pair)
    assert kinds(tend(pair, due)) == [hf.GoAwayFrame, hf.PingFrame]
    assert tend(pair, due + S - 1) == []
    assert kinds(tend(pair, due + S)) == [hf.GoAwayFrame]
    assert pair.server.is_over


def test_ages_differ_by_a_tenth() -> None:
    rules = [ConnectionRules(**{**QUIET, "max_connection_age_s": 100}, seed=seed) for seed in range(1, 201)]
    ages = sorted(end_of_age(Pair(rules=each)) - 1 for each in rules)
    assert 90 * S <= ages[0] < 92 * S and 108 * S < ages[-1] <= 110 * S


def test_after_the_grace_calls_end_with_unavailable() -> None:
    pair = make_pair(max_connection_age_s=10, max_connection_age_grace_s=5)
    slow, fast = pair.open(SLOW, frame(b"x")), pair.open(FAST, frame(b"x"))
    pair.server.take_ready()
    pair.server.take_events()
    due = end_of_age(pair)
    tend(pair, due)
    pair.now_ns = due + 5 * S - 10 * MS
    pair.server.tend(pair.now_ns)
    assert hf.HeadersFrame not in kinds(read_frames(pair.server.collect()))
    pair.server.tend(due + 5 * S)
    answers = [each for each in read_frames(pair.server.collect()) if isinstance(each, hf.HeadersFrame)]
    decoder = hpack.Decoder()
    assert [each.stream_id for each in answers] == [fast, slow] and "END_STREAM" in answers[0].flags
    assert {dict(decoder.decode(each.data))["grpc-status"] for each in answers} == {"14"}
    assert (slow, 16) in pair.server.take_events()
    assert pair.server.books["in_flight"] == 0
    assert pair.server.is_over


def test_a_client_that_takes_no_status_is_closed() -> None:
    pair = Pair(window=65535, rules=ConnectionRules(**QUIET, max_connection_age_s=10, max_connection_age_grace_s=5))
    pair.acknowledges = False
    stream_id = pair.open(SLOW, frame(b"x"))
    pair.server.take_events()
    pair.server.send_message(stream_id, bytes(200_000))
    pair.run()
    due = end_of_age(pair)
    tend(pair, due)
    tend(pair, due + S)
    tend(pair, due + 5 * S)
    assert not pair.server.is_over
    tend(pair, due + 6 * S)
    assert pair.server.is_over


def test_an_idle_connection_is_left() -> None:
    pair = make_pair(max_connection_idle_s=10)
    pair.now_ns = 5 * S
    stream_id = pair.open(FAST, frame(b"x"))
    pair.server.take_ready()
    for second in range(6, 40):
        assert tend(pair, second * S) == [], "a call is running"
    pair.server.answer(stream_id, b"y")
    pair.run()
    assert tend(pair, 48 * S) == []
    assert kinds(tend(pair, 50 * S)) == [hf.GoAwayFrame, hf.PingFrame]
    tend(pair, 51 * S)
    assert pair.server.is_over


# ------------------------------------------------------------------------------------------------------------ stalls
@pytest.mark.parametrize("path", [FAST, SLOW])
def test_complete_answers_behind_closed_windows(path: str) -> None:
    pair = Pair(window=65535, rules=ConnectionRules(**{**QUIET, "stall_timeout_s": 10}))
    pair.acknowledges = False
    stream_id = pair.open(path, frame(b"x"))
    pair.server.take_ready()
    pair.server.take_events()
    pair.server.answer(stream_id, bytes(200_000))
    pair.run()
    for second in range(1, 11):
        tend(pair, second * S)
        assert not pair.server.is_over
    for second in range(11, 32):
        tend(pair, second * S)
    assert pair.server.is_over == (path == FAST), "the reader of a slow call may be slow"


def test_while_memory_is_short_no_answer_may_wait() -> None:
    ledger = ServerLedger(max_bytes=4 << 20)
    pair = Pair(window=65535, rules=ConnectionRules(**{**QUIET, "stall_timeout_s": 10}), ledger=ledger)
    pair.acknowledges = False
    stream_id = pair.open(SLOW, frame(b"x"))
    pair.server.take_events()
    pair.server.answer(stream_id, bytes(3_500_000))
    pair.run()
    for second in range(1, 22):
        tend(pair, second * S)
    assert pair.server.is_over


# ------------------------------------------------------------------------------------------------------ shared memory
def test_above_the_bound_new_messages_are_refused_and_complete_ones_answered() -> None:
    ledger = ServerLedger(max_bytes=4 << 20)
    first = make_pair(ledger, max_message_bytes=4 << 20, max_buffered_bytes=8 << 20)
    second = make_pair(ledger)
    slow = first.open(SLOW, frame(bytes(2 << 20)))
    first.open(SLOW, frame(bytes(1 << 20))[:-1], end=False)
    first.server.take_events()
    assert ledger.bytes >= 2 << 20
    refused = second.open(FAST, frame(bytes(1 << 20)))
    assert second.headers[refused][-1]["grpc-status"] == "8" and ledger.refused_messages == 1
    assert first.server.take_message(slow)[0] == bytes(2 << 20)
    first.server.finish(slow, 0, b"")
    first.run()
    assert first.headers[slow][-1]["grpc-status"] == "0"
    assert second.server.books["partial_bytes"] == 0
    taken = second.open(FAST, frame(bytes(1 << 19)))
    assert second.server.take_ready()[0][0] == taken
    for pair in (first, second):
        pair.server.close()
        pair.server.take_events()
    assert ledger.bytes == 0


def test_the_ledger_counts_answers_and_forgets_what_is_sent() -> None:
    ledger = ServerLedger(max_bytes=64 << 20)
    pair = make_pair(ledger)
    stream_id = pair.open(SLOW, frame(b"x"))
    pair.server.take_events()
    pair.server.take_message(stream_id)
    pair.server.send_message(stream_id, bytes(3 << 20))
    pair.server.feed(hf.WindowUpdateFrame(0, window_increment=1).serialize())
    assert ledger.bytes >= 3 << 20
    pair.run()
    assert ledger.bytes == 0


@pytest.mark.parametrize("path", [FAST, SLOW])
def test_above_the_bound_big_answers_are_refused(path: str) -> None:
    """Small questions with big answers, asked by clients that take none."""
    ledger = ServerLedger(max_bytes=4 << 20)
    pairs = [Pair(window=0, rules=ConnectionRules(**QUIET), ledger=ledger) for _ in range(3)]
    called = [pair.open(path, frame(b"x")) for pair in pairs]
    for pair, stream_id in zip(pairs, called, strict=True):
        if path == FAST:
            pair.server.take_ready()
            pair.server.answer(stream_id, bytes(3 << 20))
        else:
            pair.server.take_events()
            pair.server.take_message(stream_id)
            pair.server.send_message(stream_id, bytes(3 << 20))
        pair.run()
    assert 3 << 20 <= ledger.bytes <= 4 << 20 and ledger.refused_messages == 2
    for pair, stream_id in zip(pairs[1:], called[1:], strict=True):
        assert pair.headers[stream_id][-1]["grpc-status"] == "8"
    small = pairs[1].open(path, frame(b"x"))
    assert pairs[1].server.books["streams"] == 1 and small
    for pair in pairs:
        pair.server.close()
        pair.server.take_events()
    assert ledger.bytes == 0


def test_who_only_claims_memory_keeps_nobody_out() -> None:
    """A hundred bytes on the wire may announce a message of megabytes; what it takes is what has come."""
    ledger = ServerLedger(max_bytes=8 << 20)
    hog, other = make_pair(ledger), make_pair(ledger)
    for _ in range(100):
        hog.open(FAST, frame(bytes(1 << 20))[:6], end=False)
    assert hog.server.books["partial_bytes"] <= 100 * 4096 and ledger.refused_messages == 0
    taken = other.open(FAST, frame(bytes(1 << 19)))
    assert other.server.take_ready()[0][0] == taken


def test_small_messages_never_reach_the_ledger() -> None:
    ledger = ServerLedger(max_bytes=64 << 20)
    pair = make_pair(ledger)
    pair.open(SLOW, frame(bytes(100_000)))
    assert pair.server.books["unread_bytes"] > 100_000 and ledger.bytes == 0


def test_uploads_are_held_while_memory_is_short() -> None:
    ledger = ServerLedger(max_bytes=4 << 20)
    hog = make_pair(ledger)
    for _ in range(4):
        hog.open(SLOW, frame(bytes(900_000)))
    pair = make_pair(ledger, max_message_bytes=1 << 20)
    stream_id = pair.open(SLOW, end=False)
    upload = frame(bytes(400_000))
    pair.send(stream_id, upload[:300_000])
    before = pair.server.books["withheld_bytes"]
    pair.send(stream_id, upload[300_000:350_000])
    assert pair.server.books["withheld_bytes"] > before
    hog.server.close()
    hog.server.take_events()
    tend(pair, 20 * MS)
    assert pair.server.books["withheld_bytes"] == 0
    pair.send(stream_id, upload[350_000:], end=True)
    assert pair.server.take_message(stream_id)[0] == bytes(400_000)


def test_what_is_held_is_let_go_after_a_while() -> None:
    """What is short may be just what the held ones have."""
    ledger = ServerLedger(max_bytes=1 << 20)
    pair = make_pair(ledger, max_message_bytes=1 << 20)
    stream_id = pair.open(SLOW, end=False)
    upload = frame(bytes(1_000_000))
    pair.send(stream_id, upload[:900_000])
    pair.send(stream_id, upload[900_000:910_000])
    assert pair.server.books["withheld_bytes"] > 0
    for elapsed in range(10, 1100, 10):
        tend(pair, elapsed * MS)
    assert pair.server.books["withheld_bytes"] == 0


def test_places_are_counted() -> None:
    ledger = ServerLedger(max_connections=2)
    first, second = make_pair(ledger), make_pair(ledger)
    with pytest.raises(MemoryError):
        make_pair(ledger)
    assert (ledger.connections, ledger.refused_connections) == (2, 1)
    del first.server
    make_pair(ledger)
    del second


def test_bad_rules() -> None:
    with pytest.raises(ValueError, match="0 \\(never\\) or more"):
        ConnectionRules(keepalive_time_s=-1)
    with pytest.raises(ValueError, match="0 \\(none\\) or more"):
        ServerLedger(max_bytes=-1)
