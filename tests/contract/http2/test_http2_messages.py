"""RFC 9113, section 8: which header fields make a request, and where a request ends."""

from __future__ import annotations

import pytest
from http2_peer import (
    END_HEADERS,
    END_STREAM,
    Error,
    Fields,
    Kind,
    Peer,
    data,
    fields_of,
    frame,
    headers,
    infer_message,
)

MESSAGE = infer_message()
AT_ONCE = END_HEADERS | END_STREAM


MALFORMED: dict[str, Fields] = {
    "8.2 upper case": fields_of(x_UPPER="x"),
    "8.2.1 control character in a name": [*fields_of(), ("x\x01y", "x")],
    "8.2.1 space in a name": [*fields_of(), ("x y", "x")],
    "8.2.1 octet above 127 in a name": [*fields_of(), (b"x\xfcy", "x")],
    "8.2.1 colon in a name": [*fields_of(), ("x:y", "x")],
    "8.2.1 empty name": [*fields_of(), ("", "x")],
    "8.2.1 NUL in a value": [*fields_of(), ("x", "a\0b")],
    "8.2.1 line feed in a value": [*fields_of(), ("x", "a\nb")],
    "8.2.1 carriage return in a value": [*fields_of(), ("x", "a\rb")],
    "8.2.1 space before a value": [*fields_of(), ("x", " a")],
    "8.2.1 tab after a value": [*fields_of(), ("x", "a\t")],
    "8.2.2 connection": [*fields_of(), ("connection", "close")],
    "8.2.2 proxy-connection": [*fields_of(), ("proxy-connection", "keep-alive")],
    "8.2.2 keep-alive": [*fields_of(), ("keep-alive", "timeout=5")],
    "8.2.2 transfer-encoding": [*fields_of(), ("transfer-encoding", "chunked")],
    "8.2.2 upgrade": [*fields_of(), ("upgrade", "h2c")],
    "8.2.2 te": fields_of(te="gzip"),
    "8.3 unknown pseudo-header": [(":unknown", "x"), *fields_of()],
    "8.3 a response's pseudo-header": [(":status", "200"), *fields_of()],
    "8.3 pseudo-header after others": [*fields_of(_path=None), (":path", "/a/b")],
    "8.3.1 no :method": fields_of(_method=None),
    "8.3.1 no :scheme": fields_of(_scheme=None),
    "8.3.1 no :path": fields_of(_path=None),
    "8.3.1 empty :path": fields_of(_path=""),
    "8.3.1 :path without a slash": fields_of(_path="a/b"),
    "8.3.1 neither :authority nor host": fields_of(_authority=None),
    "8.3.1 two :method": [(":method", "POST"), *fields_of()],
    "8.3.1 two :scheme": [(":scheme", "http"), *fields_of()],
    "8.3.1 two :path": [(":path", "/a/b"), *fields_of()],
    "8.3.1 two :authority": [(":authority", "a"), *fields_of()],
    "8.1.1 content-length that is no number": fields_of(content_length="many"),
    "8.1.1 two values of content-length": [*fields_of(content_length="5"), ("content-length", "6")],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests(peer: Peer, name: str) -> None:
    """8.1.1: a stream error PROTOCOL_ERROR, and nothing of the request is looked at."""
    peer.send(headers(1, MALFORMED[name]), data(1, MESSAGE))
    peer.expect_reset(Error.PROTOCOL)


TRAILERS = {
    "8.1 a second block that does not end the stream": (headers(1) + headers(1, [("x", "y")]), Error.PROTOCOL),
    "8.1 pseudo-header in trailers": (
        headers(1) + data(1, MESSAGE, 0) + headers(1, [(":path", "/a/b")], AT_ONCE),
        Error.PROTOCOL,
    ),
    "8.2 upper case in trailers": (
        headers(1) + data(1, MESSAGE, 0) + headers(1, [("X", "y")], AT_ONCE),
        Error.PROTOCOL,
    ),
    "8.1.1 content-length, more came": (
        headers(1, fields_of(content_length="1")) + data(1, MESSAGE),
        Error.PROTOCOL,
    ),
    "8.1.1 content-length, less came": (
        headers(1, fields_of(content_length=str(len(MESSAGE) + 1))) + data(1, MESSAGE),
        Error.PROTOCOL,
    ),
    "8.1.1 content-length, nothing came": (headers(1, fields_of(content_length="1"), AT_ONCE), Error.PROTOCOL),
    "8.1.1 content-length, less came before trailers": (
        headers(1, fields_of(content_length=str(len(MESSAGE) + 1)))
        + data(1, MESSAGE, 0)
        + headers(1, [("x", "y")], AT_ONCE),
        Error.PROTOCOL,
    ),
}


@pytest.mark.parametrize("name", TRAILERS)
def test_malformed_ends(peer: Peer, name: str) -> None:
    octets, code = TRAILERS[name]
    peer.send(octets)
    peer.expect_reset(code)


RIGHT = {
    "8.1 trailers of a request": headers(1) + data(1, MESSAGE, 0) + headers(1, [("x", "y")], AT_ONCE),
    "8.1.1 content-length that is right": headers(1, fields_of(content_length=str(len(MESSAGE)))) + data(1, MESSAGE),
    "8.2.1 octets above 127 in a value": headers(1, [*fields_of(), ("x", b"\xc3\xbc \xff")]) + data(1, MESSAGE),
    "8.2.2 te: trailers": headers(1, fields_of(te="trailers")) + data(1, MESSAGE),
    "8.2.3 crumbs of cookies": headers(1, [*fields_of(), ("cookie", "a=b"), ("cookie", "c=d")]) + data(1, MESSAGE),
    "8.3.1 host instead of :authority": headers(1, fields_of(_authority=None, host="x")) + data(1, MESSAGE),
    "8.3.1 any scheme": headers(1, fields_of(_scheme="https")) + data(1, MESSAGE),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_requests(peer: Peer, name: str) -> None:
    peer.send(RIGHT[name])
    peer.read_answer().check()


@pytest.mark.parametrize("method", ["GET", "PUT", "OPTIONS", "HEAD", "post", "FOO"])
def test_8_3_1_other_methods_are_not_for_grpc(peer: Peer, method: str) -> None:
    path = "*" if method == "OPTIONS" else "/"
    peer.send(headers(1, fields_of(path, _method=method), AT_ONCE))
    answer = peer.read_answer()
    assert [block[":status"] for block in answer.blocks] == ["405"] and answer.data == b""
    peer.expect_alive()


def test_8_5_connect(peer: Peer) -> None:
    """No proxy: :scheme and :path are left out, and the answer is an error."""
    peer.send(headers(1, [(":method", "CONNECT"), (":authority", "localhost:80")]))
    assert peer.read_answer().blocks[0][":status"] == "405"
    peer.expect_alive()


def test_8_5_connect_with_a_path_is_malformed(peer: Peer) -> None:
    peer.send(headers(1, fields_of(_method="CONNECT")))
    peer.expect_reset(Error.PROTOCOL)


@pytest.mark.parametrize("ends", ["answered", "reset"])
def test_8_1_an_early_answer_ends_with_no_error(peer: Peer, ends: str) -> None:
    """The server may answer before the request is complete, and then tells the client to stop with NO_ERROR."""
    peer.send(headers(1, fields_of(grpc_timeout="never")))
    answer = peer.read_answer()
    peer.read_until(lambda: answer.reset is not None)
    assert answer.is_ended and answer.reset == Error.NO_ERROR and answer.status == 3
    if ends == "reset":
        peer.send(frame(Kind.RST_STREAM, 1, bytes(4)))
    else:
        peer.send(data(1, MESSAGE))
    peer.expect_alive()
