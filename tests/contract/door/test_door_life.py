"""How long connections live and how noisy they may be: on every driver, and, where the rule is gRPC's, on grpcio."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import hpack
import pytest
from hand_driven import message as infer_message
from hand_driven import values_of
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from aiorch_server.frontends.grpc import FAST_PATH, ConnectionLife, ConnectionLimits

from .conftest import NATIVE, NATIVE_AND_TWO_THREADS, SERVICE, TIMEOUT_S, Door, wait_until
from .test_door_attacks import PREFACE, WAIT, Attacker, headers, message
from .test_door_threads import Instance, instance, route_to

__all__ = ["instance"]


#: grpcio waits for it, and without it sends no PINGs.
ACKNOWLEDGED = SettingsFrame(0, flags=["ACK"]).serialize()


def wait_call() -> bytes:
    """Settings are acknowledged, and a call begins that goes on until the servicer is released."""
    body = DataFrame(1, message(b"x"), flags=["END_STREAM"]).serialize()
    return ACKNOWLEDGED + headers(1, WAIT, "END_HEADERS") + body


def pings_of(frames: list[Frame]) -> list[PingFrame]:
    return [frame for frame in frames if isinstance(frame, PingFrame) and "ACK" not in frame.flags]


def read_answering(attacker: Attacker, is_enough: Callable[[list[Frame]], bool]) -> list[Frame]:
    """Reads until it is enough, and answers PINGs."""
    answered = 0
    while True:
        frames = attacker.read_until(lambda frames, n=answered: is_enough(frames) or len(pings_of(frames)) > n)  # type: ignore[misc]
        for ping in pings_of(frames)[answered:]:
            attacker.send(PingFrame(0, ping.opaque_data, flags=["ACK"]).serialize())
        answered = len(pings_of(frames))
        if is_enough(frames):
            return frames


def goaways_of(frames: list[Frame]) -> list[GoAwayFrame]:
    return [frame for frame in frames if isinstance(frame, GoAwayFrame)]


# ------------------------------------------------------------------------------------------------------- keep-alive
@pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)
def test_a_client_that_went_silent_is_closed(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, life=ConnectionLife(keepalive_time_s=0.1, keepalive_timeout_s=0.2))
    with Attacker(door) as attacker:
        attacker.send(wait_call())
        (ping,) = pings_of(attacker.read_until(pings_of))
        attacker.send(PingFrame(0, ping.opaque_data, flags=["ACK"]).serialize())
        assert len(pings_of(attacker.read_to_end())) > 1
    wait_until(lambda: door.servicer.count("cancelled") == 1, "the end of its call")
    door.check_next_call()


def test_a_client_that_answers_is_kept(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, life=ConnectionLife(keepalive_time_s=0.05, keepalive_timeout_s=0.5))
    with Attacker(door) as attacker:
        attacker.send(wait_call())
        read_answering(attacker, lambda frames: len(pings_of(frames)) == 15)
        door.release()
        attacker.read_until(lambda frames: any(isinstance(frame, DataFrame) for frame in frames))


@pytest.mark.parametrize("is_calling", [True, False])
def test_too_many_pings(make_door: Callable[..., Door], kind: str, is_calling: bool) -> None:
    door = make_door(kind)
    with Attacker(door) as attacker:
        attacker.send(wait_call() if is_calling else ACKNOWLEDGED)
        for number in range(20):
            attacker.send(PingFrame(0, number.to_bytes(8, "big")).serialize())
        goaway = goaways_of(attacker.read_to_end())[-1]
        assert (goaway.error_code, goaway.additional_data) == (0xB, b"too_many_pings")
    door.check_next_call()


def test_pings_may_be_permitted(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, life=ConnectionLife(min_ping_interval_s=0, keepalive_permit_without_calls=True))
    with Attacker(door) as attacker:
        attacker.send(ACKNOWLEDGED)
        for number in range(20):
            attacker.send(PingFrame(0, number.to_bytes(8, "big")).serialize())
        attacker.read_until(lambda frames: sum("ACK" in f.flags for f in frames if isinstance(f, PingFrame)) == 20)


# -------------------------------------------------------------------------------------------------- age and idleness
def ask_for_a_while(ask: Callable[[int], None], is_enough: Callable[[], bool]) -> None:
    """Four threads call again and again; the first failure is raised here."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def run(first: int) -> None:
        number = first
        while not stop.is_set() and not failures:
            try:
                ask(number)
            except BaseException as error:
                failures.append(error)
            number += 4

    threads = [threading.Thread(target=run, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: failures or is_enough(), "enough connections")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def test_no_call_is_lost_when_connections_grow_old(make_door: Callable[..., Door], kind_or_two: str) -> None:
    door = make_door(kind_or_two, life=ConnectionLife(max_connection_age_s=0.1))
    channel = door.channel()
    echo, info = door.call("Echo", channel), door.call("Info", channel)
    peers: set[bytes] = set()

    def ask(number: int) -> None:
        assert echo(b"%d" % number, timeout=TIMEOUT_S) == b"%d" % number
        peers.add(info(b"", timeout=TIMEOUT_S).split(b",")[0])

    ask_for_a_while(ask, lambda: len(peers) >= 5)


@pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)
def test_no_fast_call_is_lost_either(make_door: Callable[..., Door], kind: str, instance: Instance) -> None:
    door = make_door(kind, router=route_to(instance.scheduler), life=ConnectionLife(max_connection_age_s=0.1))
    channel = door.channel()
    infer, info = channel.unary_unary(FAST_PATH), door.call("Info", channel)
    peers: set[bytes] = set()

    def ask(number: int) -> None:
        answers = [infer.future(infer_message(number * 10 + n), timeout=TIMEOUT_S) for n in range(10)]
        assert [values_of(each.result()) for each in answers] == [[2.0 * (number * 10 + n)] for n in range(10)]
        peers.add(info(b"", timeout=TIMEOUT_S).split(b",")[0])

    ask_for_a_while(ask, lambda: len(peers) >= 5)


def test_after_the_grace_the_rest_is_cancelled(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, life=ConnectionLife(max_connection_age_s=0.1, max_connection_age_grace_s=0.2))
    with pytest.raises(grpc.RpcError) as caught:
        door.call("Wait")(b"", timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    wait_until(lambda: door.servicer.count("cancelled") == 1, "the servicer's cancellation")


def test_within_the_grace_calls_end_as_they_would(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, life=ConnectionLife(max_connection_age_s=0.05, max_connection_age_grace_s=30))
    with Attacker(door) as attacker:
        attacker.send(wait_call())
        wait_until(lambda: door.servicer.count("started") == 1)
        notice = goaways_of(attacker.read_until(goaways_of))[0]
        assert notice.error_code == 0 and notice.last_stream_id == 2**31 - 1
        final = goaways_of(read_answering(attacker, lambda frames: len(goaways_of(frames)) == 2))[1]
        assert final.last_stream_id == 1
        door.release()
        frames = attacker.read_to_end()
        assert b"waited" in b"".join(frame.data for frame in frames if isinstance(frame, DataFrame))


def test_an_idle_connection_is_left(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, life=ConnectionLife(max_connection_idle_s=0.15))
    with Attacker(door) as attacker:
        attacker.send(wait_call())
        wait_until(lambda: door.servicer.count("started") == 1)
        with Attacker(door) as other:  # a connection without calls, which outlives the idle time of the first
            read_answering(other, lambda frames: bool(goaways_of(frames)))
        assert not goaways_of(attacker.frames())
        door.release()
        frames = read_answering(attacker, lambda frames: bool(goaways_of(frames)))
        assert b"waited" in b"".join(frame.data for frame in frames if isinstance(frame, DataFrame))


# ------------------------------------------------------------------------------------------------ noise and silence
@pytest.mark.parametrize(
    "idle",
    [
        SettingsFrame(0),
        PriorityFrame(1, exclusive=True),
        DataFrame(1, b""),
        WindowUpdateFrame(0, window_increment=1),
    ],
    ids=["settings", "priority", "empty data", "window"],
)
def test_a_flood_whose_answers_are_read(native_door: Door, idle: Frame) -> None:
    with Attacker(native_door) as attacker:
        attacker.send(headers(1, WAIT, "END_HEADERS"))
        attacker.socket.settimeout(TIMEOUT_S)
        reader = threading.Thread(target=attacker.read_to_end)
        reader.start()
        for _ in range(30):
            if not attacker.send(idle.serialize() * 500):
                break
        reader.join(TIMEOUT_S)
        assert not reader.is_alive(), "15,000 frames that ask for nothing were taken"
    native_door.check_next_call()


@pytest.mark.parametrize("kind", NATIVE)
def test_answers_behind_closed_windows(make_door: Callable[..., Door], kind: str, instance: Instance) -> None:
    """The socket is open, but the client gives no window for what it has asked for."""
    life = ConnectionLife(stall_timeout_s=1)
    door = make_door(
        kind, router=route_to(instance.scheduler), life=life, limits=ConnectionLimits(max_outbound_bytes=1 << 20)
    )
    closed = SettingsFrame(0, {SettingsFrame.INITIAL_WINDOW_SIZE: 0}).serialize()
    body = message(infer_message(1, width=20_000))
    with Attacker(door, PREFACE + closed) as attacker:

        def ask(first: int, last: int) -> None:
            for stream_id in range(first, last, 2):
                attacker.send(headers(stream_id, FAST_PATH, "END_HEADERS"))
                pieces = [body[at : at + 16384] for at in range(0, len(body), 16384)]
                for piece in pieces:
                    flags = ["END_STREAM"] if piece is pieces[-1] else []
                    if not attacker.send(DataFrame(stream_id, piece, flags=flags).serialize()):
                        break

        ask(1, 41)  # one that is under way does not count yet: above the limit only when all heads have come
        attacker.read_until(lambda frames: sum(isinstance(frame, HeadersFrame) for frame in frames) == 20)
        ask(41, 81)
        frames = attacker.read_to_end()
    decoder = hpack.Decoder()
    blocks = [dict(decoder.decode(frame.data)) for frame in frames if isinstance(frame, HeadersFrame)]
    statuses = [fields.get("grpc-status") for fields in blocks]
    assert statuses[0] is None
    assert statuses[20:] == ["8"] * 20, "what is kept for one client is bounded"
    wait_until(lambda: door.server.connections == 0 and door.server.in_flight == 0)
    door.check_next_call()


@pytest.mark.parametrize("kind", NATIVE)
def test_a_slow_reader_is_not_a_silent_one(make_door: Callable[..., Door], kind: str) -> None:
    """Its windows are closed for many times the stall timeout, as it may think about each answer."""
    door = make_door(kind, life=ConnectionLife(stall_timeout_s=0.05))
    flood = door.call("Flood")(b"300", timeout=TIMEOUT_S)
    next(flood)
    with Attacker(door) as other:
        for stream_id in range(1, 20, 2):
            body = DataFrame(stream_id, message(b"x"), flags=["END_STREAM"]).serialize()
            other.send(headers(stream_id, f"/{SERVICE}/Wait", "END_HEADERS", **{"grpc-timeout": "50m"}) + body)
            other.read_until(
                lambda frames, n=stream_id: any(isinstance(f, HeadersFrame) and f.stream_id == n for f in frames)
            )
    assert sum(1 for _ in flood) == 299


def test_rules_are_checked() -> None:
    rules: list[dict[str, Any]] = [{"keepalive_time_s": -1}, {"keepalive_timeout_s": 0}, {"max_ping_strikes": -1}]
    for rule in rules:
        with pytest.raises(ValueError, match=next(iter(rule))):
            ConnectionLife(**rule)
