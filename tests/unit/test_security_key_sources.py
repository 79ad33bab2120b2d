"""Where keys come from: servers that are slow, endless, elsewhere or no servers at all."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from aiorch_server.security.key_sources import MAX_BYTES, make_fetch

TIMEOUT_S = 0.4
Talk = Callable[[socket.socket], None]


@contextlib.contextmanager
def talking(talk: Talk) -> Iterator[str]:
    """The address of a server that says what ``talk`` does to each who connects."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listener.accept()
                with peer, contextlib.suppress(OSError):
                    peer.recv(65536)
                    talk(peer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        assert not thread.is_alive()


def drip(begin: bytes, piece: bytes) -> Talk:
    def talk(peer: socket.socket) -> None:
        peer.sendall(begin)
        until = time.monotonic() + 8
        while time.monotonic() < until:
            peer.sendall(piece)
            time.sleep(0.05)

    return talk


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\nx: ", b"a"),
        (b"HTTP/1.1 200 OK\r\n", b"x: a\r\n"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"0"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", b"{"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_who_sends_a_byte_now_and_then(begin: bytes, piece: bytes, scheme: str) -> None:
    with talking(drip(begin, piece)) as address:
        since = time.monotonic()
        with pytest.raises(OSError):
            make_fetch(f"{scheme}://{address}/keys", timeout_s=TIMEOUT_S)()
        assert time.monotonic() - since < 3.0


@pytest.mark.parametrize("target", ["file:///etc/passwd", "http://127.0.0.1:1/inside", "https://example.org/x", "/x"])
def test_redirects_are_not_followed(target: str) -> None:
    answer = f"HTTP/1.1 302 Found\r\nlocation: {target}\r\ncontent-length: 0\r\n\r\n".encode()
    with talking(lambda peer: peer.sendall(answer)) as address, pytest.raises(OSError, match="answers with status 302"):
        make_fetch(f"http://{address}/keys", timeout_s=5)()


def test_what_is_too_large() -> None:
    answer = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (4 * MAX_BYTES)
    with talking(lambda peer: peer.sendall(answer)) as address, pytest.raises(ValueError, match="more than"):
        make_fetch(f"http://{address}/keys", timeout_s=5)()


def test_what_is_right() -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
    with talking(lambda peer: peer.sendall(answer)) as address:
        fetch = make_fetch(f"http://{address}/keys", timeout_s=5)
        assert (fetch(), fetch()) == (b"{}", b"{}")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://10.0.0.1/keys", "ftp://127.0.0.1/x", "HTTP://evil/"])
def test_other_places(url: str) -> None:
    with pytest.raises(ValueError, match="is not https"):
        make_fetch(url, timeout_s=1)()


def test_what_speaks_no_http() -> None:
    with (
        talking(lambda peer: peer.sendall(b"220 smtp\r\n")) as address,
        pytest.raises(OSError, match="does not speak HTTP"),
    ):
        make_fetch(f"http://{address}/keys", timeout_s=5)()
