"""gRPC's own rules on top of HTTP/2: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md."""

from __future__ import annotations

import base64
import gzip
import re
import zlib
from collections.abc import Callable
from urllib.parse import unquote

import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from http2_peer import (
    END_HEADERS,
    END_STREAM,
    VALUES,
    Answer,
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
    prefixed,
)
from running_site import INFER, SERVICE, Site, decode_values, encode_values

MESSAGE = infer_message()
LIVE = f"/{SERVICE}/ServerLive"
STREAM = f"/{SERVICE}/ModelStreamInfer"
OK, INVALID, DEADLINE, EXHAUSTED, UNIMPLEMENTED, INTERNAL = 0, 3, 4, 8, 12, 13


def ask(peer: Peer, *octets: bytes, stream_id: int = 1) -> Answer:
    peer.send(*octets)
    return peer.read_answer(stream_id)


def check_refused(answer: Answer, status: int, words: str = "") -> None:
    """Trailers-Only: one header block with everything in it, and no DATA."""
    assert len(answer.blocks) == 1 and answer.is_ended, answer
    block = answer.blocks[0]
    assert (block[":status"], block["content-type"].split("+")[0]) == ("200", "application/grpc")
    assert answer.status == status, answer
    assert re.search(words, unquote(answer.details)), answer.details
    assert answer.data == b""


# ------------------------------------------------------------------------------------------------------ the request
@pytest.mark.parametrize(
    "content_type",
    ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8", "application/grpc+anything"],
)
@pytest.mark.parametrize("path", [INFER, LIVE])
def test_content_types(peer: Peer, path: str, content_type: str) -> None:
    body = MESSAGE if path == INFER else prefixed(b"")
    answer = ask(peer, call(1, fields_of(path, content_type=content_type), body))
    assert answer.status == OK and answer.blocks[0]["content-type"].startswith("application/grpc")


@pytest.mark.parametrize(
    "content_type", [None, "", "application/json", "text/plain", "application/grpc-web", "application/grpcx", "grpc"]
)
@pytest.mark.parametrize("path", [INFER, LIVE])
def test_other_content_types_are_415(peer: Peer, path: str, content_type: str | None) -> None:
    answer = ask(peer, call(1, fields_of(path, content_type=content_type)))
    assert [block[":status"] for block in answer.blocks] == ["415"] and answer.data == b""
    peer.expect_alive()


def test_te_may_be_missing(peer: Peer) -> None:
    """It shows proxies that do not understand trailers; libraries differ on whether they insist."""
    ask(peer, call(1, fields_of(te=None))).check()


@pytest.mark.parametrize(
    "path",
    ["/", "/nothing", f"/{SERVICE}/Nothing", f"/{SERVICE}", "/no.Service/ModelInfer", f"{INFER}/", f"{INFER}?a=b"],
)
def test_unknown_paths(peer: Peer, path: str) -> None:
    check_refused(ask(peer, call(1, fields_of(path))), UNIMPLEMENTED)
    peer.expect_alive()


@pytest.mark.parametrize(
    "timeout", ["", "1", "S", "1s", "-1S", "+1S", "1.5S", " 1S", "123456789S", "1SS", "1x", "0x1S", "\u0661S"]
)
@pytest.mark.parametrize("path", [INFER, LIVE])
def test_bad_timeouts(peer: Peer, path: str, timeout: str) -> None:
    if timeout.startswith(" "):  # no header field may begin so (RFC 9113, 8.2.1)
        peer.send(headers(1, fields_of(path, grpc_timeout=timeout)))
        peer.expect_reset(Error.PROTOCOL)
        return
    check_refused(ask(peer, call(1, fields_of(path, grpc_timeout=timeout))), INVALID, "grpc-timeout")


@pytest.mark.parametrize("timeout", ["99999999H", "1M", "00000010S", "9999m", "99999999u", "99999999n"])
def test_right_timeouts(peer: Peer, timeout: str) -> None:
    answer = ask(peer, call(1, fields_of(grpc_timeout=timeout)))
    assert answer.status == OK


@pytest.mark.parametrize("timeout", ["0S", "1n", "30m"])
@pytest.mark.parametrize("model", ["gate"])
def test_deadlines_pass(peer: Peer, timeout: str, model: str) -> None:
    """The server ends the call itself: the client does nothing."""
    check_refused(ask(peer, call(1, fields_of(grpc_timeout=timeout), infer_message(model))), DEADLINE)
    peer.expect_alive()


def test_a_deadline_passes_while_the_message_is_on_its_way(peer: Peer) -> None:
    answer = ask(peer, headers(1, fields_of(grpc_timeout="20m")), data(1, MESSAGE[:7], 0))
    check_refused(answer, DEADLINE)
    peer.read_until(lambda: answer.reset is not None)
    assert answer.reset == Error.NO_ERROR
    peer.expect_alive()


# ------------------------------------------------------------------------------------------------------ the messages
BAD_BODIES: dict[str, tuple[bytes, tuple[int, ...], str]] = {
    "no message": (b"", (UNIMPLEMENTED,), "received none"),
    "two messages": (MESSAGE * 2, (UNIMPLEMENTED,), "received more"),
    "half a prefix": (MESSAGE[:3], (INTERNAL,), "middle of a message"),
    "half a message": (MESSAGE[:-1], (INTERNAL,), "middle of a message"),
    "a prefix alone": (MESSAGE[:5], (INTERNAL,), "middle of a message"),
    "a message and a half": (MESSAGE + MESSAGE[:9], (UNIMPLEMENTED, INTERNAL), "received more|middle of a message"),
    "flag 2": (b"\x02" + MESSAGE[1:], (INTERNAL,), "compressed flag"),
    "flag 255": (b"\xff" + MESSAGE[1:], (INTERNAL,), "compressed flag"),
    "compressed without grpc-encoding": (b"\x01" + MESSAGE[1:], (INTERNAL,), "compressed flag"),
    "too large": (b"\0\x7f\xff\xff\xff", (EXHAUSTED,), "larger than max"),
    "no protobuf": (prefixed(b"\xff\xff\xff\xff"), (INVALID, INTERNAL), ""),
}


@pytest.mark.parametrize("path", [INFER, f"/{SERVICE}/ModelReady"])
@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies(peer: Peer, name: str, path: str) -> None:
    body, statuses, words = BAD_BODIES[name]
    answer = ask(peer, call(1, fields_of(path), body))
    assert answer.status in statuses
    check_refused(answer, answer.status, words)
    peer.expect_alive()


def test_an_empty_message_is_a_message(peer: Peer) -> None:
    check_refused(ask(peer, call(1, body=prefixed(b""))), INVALID, "unknown model: ''")
    assert ask(peer, call(3, fields_of(LIVE), prefixed(b"")), stream_id=3).status == OK


def test_a_unary_call_is_run_once_its_end_has_come(site: Site, peer: Peer) -> None:
    """The message alone may still be followed by another, which would make the call an error."""
    for stream_id, path in ((1, INFER), (3, f"/{SERVICE}/ModelReady")):
        peer.send(headers(stream_id, fields_of(path)), data(stream_id, MESSAGE, 0))
        peer.expect_pong(b"12345678")
        assert stream_id not in peer.answers
        peer.send(data(stream_id, b""))
    peer.read_answer(1).check()
    assert peer.read_answer(3).is_ended


def test_an_end_of_stream_with_the_headers(peer: Peer) -> None:
    check_refused(ask(peer, headers(1, flags=END_HEADERS | END_STREAM)), UNIMPLEMENTED, "received none")
    check_refused(
        ask(peer, headers(3, fields_of(LIVE), END_HEADERS | END_STREAM), stream_id=3), UNIMPLEMENTED, "received none"
    )


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("path", [INFER, f"/{SERVICE}/ServerMetadata"])
@pytest.mark.parametrize("encoding", COMPRESSORS)
def test_compressed_requests(peer: Peer, encoding: str, path: str) -> None:
    compress = COMPRESSORS[encoding]
    content = MESSAGE[5:] if path == INFER else b""
    answer = ask(peer, call(1, fields_of(path, grpc_encoding=encoding), prefixed(compress(content), 1)))
    assert answer.status == OK and answer.data[0] == 0
    # the flag rules: with grpc-encoding a message may still come as it is
    assert ask(peer, call(3, fields_of(path, grpc_encoding=encoding), prefixed(content)), stream_id=3).status == OK


@pytest.mark.parametrize("encoding", COMPRESSORS)
@pytest.mark.parametrize("broken", ["garbage", "cut", "more behind it"])
def test_compressed_requests_that_are_broken(peer: Peer, encoding: str, broken: str) -> None:
    packed = COMPRESSORS[encoding](MESSAGE[5:])
    content = {"garbage": b"garbage", "cut": packed[:-6], "more behind it": packed + b"\0\0\0junk"}[broken]
    answer = ask(peer, call(1, fields_of(grpc_encoding=encoding), prefixed(content, 1)))
    check_refused(answer, INTERNAL)
    peer.expect_alive()


@pytest.mark.parametrize("encoding", ["br", "snappy", "GZIP", ""])
def test_unknown_encodings_name_the_known_ones(peer: Peer, encoding: str) -> None:
    """UNIMPLEMENTED, with grpc-accept-encoding to choose from."""
    answer = ask(peer, call(1, fields_of(grpc_encoding=encoding)))
    check_refused(answer, UNIMPLEMENTED, "grpc-encoding")
    accepted = answer.blocks[0]["grpc-accept-encoding"].split(",")
    assert set(accepted) == {"identity", "deflate", "gzip"}


# -------------------------------------------------------------------------------------------------------- metadata
def test_metadata_that_is_too_much(peer: Peer) -> None:
    """RESOURCE_EXHAUSTED for this call; the connection and its compression state go on."""
    fields = fields_of(x_large="x" * 15_000, x_larger="y" * 5_000)
    block = encode_fields(fields)
    pieces = frame(Kind.HEADERS, 1, block[:16_000]), frame(Kind.CONTINUATION, 1, block[16_000:], END_HEADERS)
    answer = ask(peer, *pieces, data(1, MESSAGE))
    check_refused(answer, EXHAUSTED, "metadata larger than max")
    peer.expect_alive()


@pytest.mark.parametrize(
    "value",
    [
        base64.b64encode(b"\0\xff\x01").decode(),
        base64.b64encode(b"\0\xff").decode(),
        base64.b64encode(b"\0\xff").decode().rstrip("="),
        base64.b64encode(b"\0").decode().rstrip("="),
        "",
        f"{base64.b64encode(b'one').decode()},{base64.b64encode(b'more').decode().rstrip('=')}",
    ],
    ids=["whole", "padded", "unpadded", "one octet", "empty", "two values"],
)
@pytest.mark.parametrize("path", [INFER, LIVE])
def test_binary_metadata(peer: Peer, path: str, value: str) -> None:
    body = MESSAGE if path == INFER else prefixed(b"")
    assert ask(peer, call(1, fields_of(path, x_bin=value), body)).status == OK


@pytest.mark.parametrize("value", ["a", "!!!!", "ab=c", "YQ==YQ==", "a b c d", "\u00e9\u00e9"])
def test_binary_metadata_that_is_not_base64(peer: Peer, value: str) -> None:
    """Refused by the methods that look at metadata."""
    check_refused(ask(peer, call(1, fields_of(STREAM, x_bin=value))), INVALID, "'x-bin' is not base64")
    peer.expect_alive()


def test_reserved_and_unknown_names_change_nothing(peer: Peer) -> None:
    """grpc- names are the protocol's: those that mean nothing in a request are not obeyed."""
    fields = fields_of(grpc_status="7", grpc_message="no", grpc_future="x", user_agent="x/1", grpc_accept_encoding="br")
    ask(peer, call(1, fields)).check()
    fields = fields_of(LIVE, grpc_status="7", grpc_message="no", grpc_future="x")
    assert ask(peer, call(3, fields, prefixed(b"")), stream_id=3).status == OK


# ------------------------------------------------------------------------------------------------------ the response
@pytest.mark.parametrize(
    ("path", "body"),
    [(INFER, MESSAGE), (LIVE, prefixed(b"")), (STREAM, MESSAGE)],
    ids=["ModelInfer", "unary", "stream"],
)
def test_an_answer_is_head_messages_trailers(peer: Peer, path: str, body: bytes) -> None:
    answer = ask(peer, call(1, fields_of(path), body))
    head, trailers = answer.blocks
    assert (head[":status"], head["content-type"]) == ("200", "application/grpc")
    assert "grpc-status" not in head and ":status" not in trailers
    assert trailers["grpc-status"] == "0" and answer.is_ended
    assert answer.data[:1] == b"\0" and int.from_bytes(answer.data[1:5], "big") == len(answer.data) - 5


def test_status_messages_are_percent_encoded(peer: Peer) -> None:
    name = 'n\u00f6 100% "such" m\u00f6del\n'
    answer = ask(peer, call(1, body=infer_message(name)))
    check_refused(answer, INVALID)
    assert re.fullmatch(r"(?:[\x20-\x24\x26-\x7e]|%[0-9A-F]{2})*", answer.details)
    assert name in unquote(answer.details)


def test_a_conversation(peer: Peer) -> None:
    """Both ways at once: each message is answered before the next is sent, and the end comes after END_STREAM."""
    peer.send(headers(1, fields_of(STREAM)))
    for count in range(1, 4):
        peer.send(data(1, MESSAGE, 0))
        peer.read_until(lambda count=count: 1 in peer.answers and len(split(peer.answers[1].data)) == count)  # type: ignore[misc]
    peer.send(data(1, infer_message("nobody"), 0), data(1, b""))
    answer = peer.read_answer()
    responses = [pb.ModelStreamInferResponse.FromString(each) for each in split(answer.data)]
    assert [bool(each.error_message) for each in responses] == [False, False, False, True]
    for response in responses[:3]:
        assert decode_values(response.infer_response.SerializeToString()) == VALUES
    assert answer.status == OK


def split(octets: bytes) -> list[bytes]:
    """The complete messages in DATA."""
    found = []
    while len(octets) >= 5 and len(octets) >= 5 + (size := int.from_bytes(octets[1:5], "big")):
        found.append(octets[5 : 5 + size])
        octets = octets[5 + size :]
    return found


# ------------------------------------------------------------------------------- errors of HTTP/2, seen by the server
@pytest.mark.parametrize("code", [*Error, 0xFF])
def test_any_reset_cancels_the_call(site: Site, peer: Peer, code: int) -> None:
    """The request leaves its queue; its place is not taken by an answer, and never by somebody else's."""
    peer.send(call(1, body=infer_message("gate")))
    peer.expect_pong(b"12345678")
    assert site.count_pending() == 1
    peer.send(frame(Kind.RST_STREAM, 1, int(code).to_bytes(4, "big")))
    peer.expect_pong(b"87654321")
    assert site.count_pending() == 0
    assert 1 not in peer.answers
    first, second = (prefixed(encode_values([each], "gate")) for each in (1.0, 2.0))
    peer.send(call(3, body=first), call(5, body=second))
    assert [decode_values(peer.read_answer(stream_id).data[5:]) for stream_id in (3, 5)] == [[1.0], [2.0]]


def test_half_a_connection(site: Site, peer: Peer) -> None:
    """A client that is gone in the middle of everything leaves nothing behind."""
    peer.send(call(1, body=infer_message("gate")), headers(3), data(3, MESSAGE[:9], 0), headers(5, fields_of(STREAM)))
    peer.expect_pong(b"12345678")
    peer.socket.close()
    with Peer(site.port) as second:
        second.ping_until(lambda: site.count_pending() == 0)
        second.expect_alive()
