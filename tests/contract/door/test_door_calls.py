"""What servicers and clients see of each other; the same on both doors."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from .conftest import SERVICE, TIMEOUT_S, Door, wait_until, wait_until_still


def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


NUMBERS = [b"%d" % index for index in range(50)]


@pytest.mark.parametrize("prefix", ["", "Sync"])
def test_four_kinds(door: Door, prefix: str) -> None:
    channel = door.channel()
    assert door.call(prefix + "Echo", channel)(b"hello", timeout=TIMEOUT_S) == b"hello"
    assert list(door.call(prefix + "Count", channel)(b"50", timeout=TIMEOUT_S)) == NUMBERS
    assert door.call(prefix + "Sum", channel)(iter(NUMBERS), timeout=TIMEOUT_S) == b"1225"
    answers = list(door.call(prefix + "Chat", channel)(iter(NUMBERS), timeout=TIMEOUT_S))
    assert answers == [b"re: " + number for number in NUMBERS]


def test_reading_and_writing_through_the_context(door: Door) -> None:
    assert list(door.call("CountWrite")(b"50", timeout=TIMEOUT_S)) == NUMBERS
    assert door.call("SumRead")(iter(NUMBERS), timeout=TIMEOUT_S) == b"1225"


def test_empty_messages_and_empty_streams(door: Door) -> None:
    channel = door.channel()
    assert door.call("Echo", channel)(b"", timeout=TIMEOUT_S) == b""
    assert list(door.call("Count", channel)(b"0", timeout=TIMEOUT_S)) == []
    assert list(door.call("CountWrite", channel)(b"0", timeout=TIMEOUT_S)) == []
    assert door.call("Sum", channel)(iter(()), timeout=TIMEOUT_S) == b"0"
    assert list(door.call("Chat", channel)(iter([b""]), timeout=TIMEOUT_S)) == [b"re: "]


def test_a_conversation_in_turns(door: Door) -> None:
    """Each answer arrives before the next question is asked."""
    answers: list[bytes] = []

    def ask() -> Iterator[bytes]:
        for index in range(20):
            wait_until(lambda index=index: len(answers) == index)  # type: ignore[misc]
            yield b"%d" % index

    for answer in door.call("Chat")(ask(), timeout=TIMEOUT_S):
        answers.append(answer)
    assert answers == [b"re: %d" % index for index in range(20)]


def test_metadata_both_ways(door: Door) -> None:
    sent = (("x-text", "1"), ("x-text", "2"), ("x-raw-bin", bytes(range(256))), ("x-empty", ""), ("y", "a, b=c"))
    answer, call = door.call("Metadata").with_call(b"", metadata=sent, timeout=TIMEOUT_S)
    received = ast.literal_eval(answer.decode())
    assert [pair for pair in received if pair[0] != "user-agent"] == list(sent)
    assert "grpc-python" in dict(received)["user-agent"]
    assert [tuple(pair) for pair in call.initial_metadata() if pair[0].startswith("first")] == [
        ("first", "1"),
        ("first-bin", b"\x00\x01\xfe"),
    ]
    assert [tuple(pair) for pair in call.trailing_metadata()] == [*sent[:4], ("last", "2")]


def test_context_facts(door: Door) -> None:
    info = ast.literal_eval(door.call("Info")(b"", timeout=7).decode())
    assert info["peer"].startswith("ipv4:127.0.0.1:")
    assert 5 < info["remaining"] <= 7.5
    assert info["auth"]["transport_security_type"] == [b"insecure"]
    assert (info["identities"], info["key"], info["cancelled"]) == ([], None, False)
    assert ast.literal_eval(door.call("Info")(b"").decode())["remaining"] is None


@pytest.mark.parametrize("text", ["plain", "größer als 100 %, 日本\n\x7f", ""])
def test_abort(door: Door, text: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        door.call("Abort")(text.encode(), timeout=TIMEOUT_S)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, text)
    assert [tuple(pair) for pair in caught.value.trailing_metadata()] == [("why", "a"), ("why-bin", b"\xff")]


def test_other_statuses(door: Door) -> None:
    channel = door.channel()

    def status(method: str, request: bytes = b"x") -> tuple[grpc.StatusCode, str]:
        return status_of(lambda: door.call(method, channel)(request, timeout=TIMEOUT_S))

    assert status("AbortStatus") == (grpc.StatusCode.DATA_LOSS, "as one object")
    assert status("SetCode") == (grpc.StatusCode.NOT_FOUND, "not here")
    assert status("Raise", b"missing") == (grpc.StatusCode.UNKNOWN, "Unexpected <class 'KeyError'>: 'missing'")
    assert status("BadMetadata") == (grpc.StatusCode.INTERNAL, "Invalid metadata")
    if door.is_native:  # grpc.aio's synchronous context cannot abort
        assert status("SyncEcho", b"abort") == (grpc.StatusCode.OUT_OF_RANGE, "from a thread")
    assert status("SyncEcho", b"raise") == (grpc.StatusCode.UNKNOWN, "Unexpected <class 'KeyError'>: 'thread'")
    received: list[bytes] = []

    def read() -> None:
        received.extend(door.call("CountThenRaise", channel)(b"", timeout=TIMEOUT_S))

    assert status_of(read) == (grpc.StatusCode.UNKNOWN, "Unexpected <class 'ValueError'>: after one")
    unknown = channel.unary_unary(f"/{SERVICE}/Nowhere")
    assert status_of(lambda: unknown(b"", timeout=TIMEOUT_S)) == (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    door.check_next_call(channel)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"code", grpc.StatusCode.UNKNOWN),
        (b"no code", grpc.StatusCode.UNKNOWN),
        (b"metadata", grpc.StatusCode.INTERNAL),
        (b"details", grpc.StatusCode.ABORTED),
        (b"abort with OK", grpc.StatusCode.UNKNOWN),
        (b"twice", grpc.StatusCode.UNKNOWN),
        (b"type", grpc.StatusCode.UNKNOWN),
    ],
)
def test_odd_servicers_still_answer(native_door: Door, request_: bytes, code: grpc.StatusCode) -> None:
    """grpc.aio leaves some of these clients without an answer."""
    channel = native_door.channel()
    actual, _ = status_of(lambda: native_door.call("Odd", channel)(request_, timeout=TIMEOUT_S))
    assert actual is code
    assert native_door.call("Odd", channel)(b"callback", timeout=TIMEOUT_S) == b"odd"


def test_registered_handlers_win(make_door: Callable[..., Door], kind: str) -> None:
    async def loud(request: bytes, context: Any) -> bytes:
        return request.upper()

    def refuse(request: bytes) -> bytes:
        raise ValueError("not a message")

    def register(server: Any) -> None:
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(loud),
            "Chat": grpc.unary_unary_rpc_method_handler(loud, request_deserializer=refuse),
            "Sum": grpc.unary_unary_rpc_method_handler(loud, bytes.strip, lambda answer: answer + b"!"),
        }
        server.add_registered_method_handlers(SERVICE, handlers)

    door = make_door(kind, register=register)
    channel = door.channel()
    assert door.call("Echo", channel)(b"quiet", timeout=TIMEOUT_S) == b"QUIET"
    assert channel.unary_unary(f"/{SERVICE}/Sum")(b" x ", timeout=TIMEOUT_S) == b"X!"
    code, text = status_of(lambda: channel.unary_unary(f"/{SERVICE}/Chat")(b"x", timeout=TIMEOUT_S))
    assert (code, text) == (grpc.StatusCode.UNKNOWN, "Unexpected <class 'ValueError'>: not a message")
    assert list(door.call("Count", channel)(b"1", timeout=TIMEOUT_S)) == [b"0"]


def test_concurrent_rpcs_are_bounded(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, maximum_concurrent_rpcs=2)
    channel = door.channel()
    waiting = [door.call("Wait", channel).future(b"x", timeout=TIMEOUT_S) for _ in range(2)]
    wait_until(lambda: door.servicer.count("started") == 2)
    code, text = status_of(lambda: door.call("Echo", channel)(b"x", timeout=TIMEOUT_S))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "oncurrent RPC limit exceeded" in text
    door.release()
    assert [call.result() for call in waiting] == [b"waited"] * 2
    wait_until(lambda: not door.is_native or not door.server.calls)
    door.check_next_call(channel)


# -------------------------------------------------------------------------------------------------- message sizes
def test_the_message_limit(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, max_message_bytes=100_000)
    channel = door.channel()
    assert len(door.call("Echo", channel)(bytes(100_000), timeout=TIMEOUT_S)) == 100_000
    for call in (
        lambda: door.call("Echo", channel)(bytes(100_001), timeout=TIMEOUT_S),
        lambda: door.call("Echo", channel)(bytes(30_000_000), timeout=TIMEOUT_S),
        lambda: door.call("Sum", channel)(iter([b"1", bytes(100_001)]), timeout=TIMEOUT_S),
        lambda: list(door.call("Chat", channel)(iter([b"1", bytes(100_001)]), timeout=TIMEOUT_S)),
    ):
        code, text = status_of(call)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "eceived message larger than max" in text
        assert "vs. 100000)" in text
        door.check_next_call(channel)


def test_large_messages(door: Door) -> None:
    channel = door.channel(max_receive_message_length=-1)
    content = bytes(range(256)) * 80_000  # 20 MB, above every window
    assert door.call("Echo", channel)(content, timeout=TIMEOUT_S) == content
    answers = list(door.call("Chat", channel)(iter([content, b"small", content]), timeout=TIMEOUT_S))
    assert answers == [b"re: " + content, b"re: small", b"re: " + content]


def test_a_slow_reader_stops_the_writer(door: Door) -> None:
    flood = door.call("Flood")(b"2000", timeout=60)
    assert len(next(flood)) == 100_000
    most = wait_until_still(lambda: door.servicer.count("written"))
    assert most < 600, "200 MB are buffered for a client that does not read"
    assert sum(1 for _ in flood) == 1999


def test_a_slow_servicer_stops_the_client(door: Door) -> None:
    taken = 0

    def offer() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(500):
            taken += 1
            yield bytes(100_000)

    running = door.call("SlowSum").future(offer(), timeout=60)
    wait_until(lambda: door.servicer.count("started") == 1)
    most = wait_until_still(lambda: taken)
    assert most < 400, "the servicer reads nothing, but 50 MB have left the client"
    door.release()
    assert running.result() == b"50000000"


# ----------------------------------------------------------------------------------------------------- compression
@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests(door: Door, compression: grpc.Compression) -> None:
    channel = door.channel()
    text = b"compress me " * 1000
    assert door.call("Echo", channel)(text, compression=compression, timeout=TIMEOUT_S) == text
    texts = [text, b"short", text * 50]
    answers = list(door.call("Chat", channel)(iter(texts), compression=compression, timeout=TIMEOUT_S))
    assert answers == [b"re: " + text for text in texts]


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_compression_bomb(make_door: Callable[..., Door], kind: str, compression: grpc.Compression) -> None:
    door = make_door(kind, max_message_bytes=1_000_000)
    channel = door.channel()
    for size in (1_000_001, 50_000_000):
        bomb = bytes(size)
        code, text = status_of(
            lambda bomb=bomb: door.call("Echo", channel)(bomb, compression=compression, timeout=TIMEOUT_S)
        )
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED, text
    assert len(door.call("Echo", channel)(bytes(1_000_000), compression=compression, timeout=TIMEOUT_S)) == 1_000_000
    door.check_next_call(channel)
