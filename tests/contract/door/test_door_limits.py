"""Bounds of a whole server, over its connections and threads."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import grpc
import hpack
import pytest
from hyperframe.frame import DataFrame, HeadersFrame

from aiorch_server.frontends.grpc import ConnectionLimits, NativeGrpcServer, ServerLimits

from .conftest import NATIVE_AND_TWO_THREADS, SERVICE, TIMEOUT_S, Door, wait_until, wait_until_still
from .test_door_attacks import Attacker, headers, message
from .test_door_life import ACKNOWLEDGED

pytestmark = pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)


def test_connections_above_the_limit_are_closed(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, server_limits=ServerLimits(max_connections=3))
    channel = door.channel()
    door.check_next_call(channel)
    first, second = Attacker(door), Attacker(door)
    for attacker in (first, second):
        attacker.read_until(lambda frames: bool(frames))
    for _ in range(5):
        refused = socket.create_connection(("127.0.0.1", door.port), TIMEOUT_S)
        with refused, contextlib.suppress(ConnectionResetError):
            assert refused.recv(1) == b""
    assert door.server.ledger.refused_connections == 5
    door.check_next_call(channel)
    first.socket.close()
    wait_until(lambda: door.server.ledger.connections == 2, "the place of the one that left")
    door.check_next_call()
    second.socket.close()


def upload(stream_id: int, size: int, *, method: str = "SlowSum", left_out: int = 0) -> bytes:
    """A call with one large message, of which the end may be left out."""
    body = message(bytes(size))[: size + 5 - left_out]
    frames = [headers(stream_id, f"/{SERVICE}/{method}", "END_HEADERS")]
    for at in range(0, len(body), 16384):
        is_last = at + 16384 >= len(body) and not left_out
        frames.append(DataFrame(stream_id, body[at : at + 16384], flags=["END_STREAM"] if is_last else []).serialize())
    return b"".join(frames)


def test_above_the_memory_bound_new_messages_are_refused(make_door: Callable[..., Door], kind: str) -> None:
    """What is complete is answered; who left gives back."""
    door = make_door(kind, server_limits=ServerLimits(max_buffered_bytes=12 << 20))
    ledger = door.server.ledger
    with Attacker(door) as hog, Attacker(door) as other:
        for attacker in (hog, other):  # 6 MB each, on two connections; unread because the servicer waits
            attacker.send(ACKNOWLEDGED + upload(1, 3_000_000) + upload(3, 3_000_000))
        wait_until(lambda: ledger.bytes > 9 << 20, "the messages")  # each thread may keep 1 MiB to itself
        wait_until_still(lambda: ledger.bytes)
        channel = door.channel()
        with pytest.raises(grpc.RpcError) as caught:
            door.call("Echo", channel)(bytes(3 << 20), timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "holds as many bytes" in caught.value.details()
        assert ledger.refused_messages == 1
        door.release()
        for attacker in (hog, other):
            frames = attacker.read_until(
                lambda frames: (
                    sum(isinstance(frame, HeadersFrame) and "END_STREAM" in frame.flags for frame in frames) == 2
                )
            )
            answers = b"".join(frame.data for frame in frames if isinstance(frame, DataFrame))
            assert answers.count(b"3000000") == 2
        assert len(door.call("Echo", channel)(bytes(3 << 20), timeout=TIMEOUT_S)) == 3 << 20
    channel.close()
    wait_until(lambda: door.server.connections == 0)
    wait_until(lambda: ledger.bytes == 0, "empty books")


def test_half_messages_of_many_connections_are_bounded(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, server_limits=ServerLimits(max_buffered_bytes=8 << 20))
    attackers = [Attacker(door) for _ in range(6)]
    for attacker in attackers:
        attacker.send(ACKNOWLEDGED + upload(1, 4_000_000, left_out=1))
    decoder = hpack.Decoder()
    wait_until(lambda: door.server.ledger.refused_messages >= 3, "refusals")
    assert door.server.ledger.bytes <= (8 << 20) + (2 << 20)
    for attacker in attackers:
        attacker.send(DataFrame(1, b"\0", flags=["END_STREAM"]).serialize())
    statuses = []
    for attacker in attackers:
        attacker.socket.settimeout(0.5)
        try:
            frames = attacker.read_until(lambda frames: any(isinstance(frame, HeadersFrame) for frame in frames))
        except TimeoutError:
            continue  # taken whole, and its servicer waits
        block = next(frame for frame in frames if isinstance(frame, HeadersFrame))
        statuses.append(dict(decoder.decode(block.data))["grpc-status"])
        decoder = hpack.Decoder()
    assert set(statuses) == {"8"} and 3 <= len(statuses) < 6
    for attacker in attackers:
        attacker.socket.close()
    wait_until(lambda: door.server.ledger.bytes == 0, "empty books")
    door.check_next_call()


def test_answers_that_nobody_takes_are_bounded(make_door: Callable[..., Door], kind: str) -> None:
    """Streams of one client: each writer waits at its own mark, new calls are refused at the connection's."""
    door = make_door(kind, limits=ConnectionLimits(max_outbound_bytes=4 << 20, high_water_bytes=1 << 19))
    with Attacker(door) as attacker:
        for stream_id in range(1, 61, 2):
            flood = headers(stream_id, f"/{SERVICE}/Flood", "END_HEADERS")
            body = DataFrame(stream_id, message(b"1000"), flags=["END_STREAM"]).serialize()
            attacker.send(flood + body)
            if stream_id == 21:  # those have filled what there is
                wait_until(lambda: door.server.ledger.bytes > 4 << 20, "unsent answers")
        attacker.read_until(lambda frames: any(isinstance(f, HeadersFrame) and f.stream_id == 59 for f in frames))
        assert door.server.ledger.bytes < 12 << 20
        assert door.servicer.count("written") < 150
        door.check_next_call()
    wait_until(lambda: door.server.calls == 0, "the end of all calls")


async def test_limits_are_checked(kind: str) -> None:
    with pytest.raises(ValueError, match="0 \\(none\\) or more"):
        NativeGrpcServer(io_threads=int(kind[-1]), server_limits=ServerLimits(max_connections=-1))
