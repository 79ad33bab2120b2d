"""Packed answers: by the server's option, by the servicer, and never for clients that did not ask."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import grpc
import hpack
import numpy as np
import pytest
from hand_driven import message as infer_message
from hand_driven import values_of
from hyperframe.frame import DataFrame, HeadersFrame

from aiorch_server.frontends.grpc import FAST_PATH, ResponseCompression

from .conftest import NATIVE_AND_TWO_THREADS, SERVICE, TIMEOUT_S, Door
from .test_door_attacks import Attacker, headers, message
from .test_door_life import ACKNOWLEDGED
from .test_door_threads import Instance, instance, route_to

__all__ = ["instance"]

WBITS = {"gzip": 31, "deflate": 15}
TEXT = b"pack me, please " * 1500


def ask(door: Door, method: str, *requests: bytes, accept: str | None = "identity, deflate,gzip") -> Any:
    """The response's encoding and its messages as (flag, bytes unpacked), seen on the wire."""
    more = {} if accept is None else {"grpc-accept-encoding": accept}
    path = method if method.startswith("/") else f"/{SERVICE}/{method}"
    with Attacker(door) as attacker:
        attacker.send(ACKNOWLEDGED + headers(1, path, "END_HEADERS", **more))
        body = b"".join(message(request) for request in requests)
        pieces = [body[at : at + 16000] for at in range(0, len(body), 16000)]
        for piece in pieces:
            attacker.send(DataFrame(1, piece, flags=["END_STREAM"] if piece is pieces[-1] else []).serialize())
        frames = attacker.read_until(
            lambda frames: any(isinstance(frame, HeadersFrame) and "END_STREAM" in frame.flags for frame in frames)
        )
    decoder = hpack.Decoder()
    blocks = [dict(decoder.decode(frame.data)) for frame in frames if isinstance(frame, HeadersFrame)]
    assert blocks[-1]["grpc-status"] == "0", blocks[-1]
    encoding = blocks[0].get("grpc-encoding", "identity")
    data = b"".join(frame.data for frame in frames if isinstance(frame, DataFrame))
    messages = []
    while data:
        flag, size = data[0], int.from_bytes(data[1:5], "big")
        content, data = data[5 : 5 + size], data[5 + size :]
        if flag:
            assert size < len(zlib.decompress(content, WBITS[encoding]))
            content = zlib.decompress(content, WBITS[encoding])
        messages.append((flag, content))
    return encoding, messages


@pytest.mark.parametrize("algorithm", ["Gzip", "Deflate"])
def test_the_servers_option(make_door: Callable[..., Door], kind: str, algorithm: str) -> None:
    door = make_door(kind, compression=getattr(grpc.Compression, algorithm))
    assert ask(door, "Echo", TEXT) == (algorithm.lower(), [(1, TEXT)])
    assert door.call("Echo")(TEXT, timeout=TIMEOUT_S) == TEXT
    assert list(door.call("Chat")(iter([TEXT] * 3), timeout=TIMEOUT_S)) == [b"re: " + TEXT] * 3
    large = np.random.default_rng(1).bytes(3_000_000)
    assert door.call("Echo", door.channel(max_receive_message_length=-1))(large, timeout=TIMEOUT_S) == large


@pytest.mark.parametrize("accept", [None, "identity", "deflate", "br,zstd", ",,"])
@pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)
def test_what_the_client_does_not_name_is_not_used(make_door: Callable[..., Door], kind: str, accept: str) -> None:
    door = make_door(kind, compression=grpc.Compression.Gzip)
    assert ask(door, "Echo", TEXT, accept=accept) == ("identity", [(0, TEXT)])
    assert ask(door, "Pack", b"Gzip", TEXT, accept=accept) == ("identity", [(0, TEXT)])


@pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)
def test_the_servicer_chooses(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind)
    plain = b"plain" + TEXT
    assert ask(door, "Pack", b"default", TEXT) == ("identity", [(0, TEXT)])
    for name in ("Gzip", "Deflate"):
        encoding, messages = ask(door, "Pack", name.encode(), TEXT, plain, TEXT)
        assert (encoding, messages) == (name.lower(), [(1, TEXT), (0, plain), (1, TEXT)])
    assert ask(door, "SyncPack", TEXT) == ("gzip", [(1, TEXT)])


@pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)
def test_small_messages_and_those_that_do_not_pack(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, compression=ResponseCompression(grpc.Compression.Gzip, min_compress_bytes=2000))
    small, noise = b"x" * 1999, np.random.default_rng(1).bytes(50_000)
    assert ask(door, "Echo", small) == ("gzip", [(0, small)])
    assert ask(door, "Echo", small + b"x") == ("gzip", [(1, small + b"x")])
    assert ask(door, "Echo", noise) == ("gzip", [(0, noise)])
    assert ask(door, "Pack", b"NoCompression", TEXT) == ("identity", [(0, TEXT)]), "the servicer has the last word"


def test_compression_is_chosen_before_the_headers(make_door: Callable[..., Door], kind: str) -> None:
    async def too_late(request: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("first", "1"),))
        with pytest.raises(RuntimeError, match="before sending initial metadata"):
            context.set_compression(grpc.Compression.Gzip)
        return request

    handlers = {"TooLate": grpc.unary_unary_rpc_method_handler(too_late)}

    def register(server: Any) -> None:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("other.Test", handlers),))

    door = make_door(kind, register=register)
    assert ask(door, "/other.Test/TooLate", TEXT) == ("identity", [(0, TEXT)])


@pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)
def test_fast_answers_are_packed_on_the_other_plane(
    make_door: Callable[..., Door], kind: str, instance: Instance
) -> None:
    """Only for clients that take them, and only where it is configured: the others keep the fast path."""
    seen: list[bytes] = []

    async def model_infer(request: bytes, context: Any) -> bytes:
        seen.append(request)
        return TEXT

    def register(server: Any) -> None:
        service, method = FAST_PATH[1:].split("/")
        handler = grpc.unary_unary_rpc_method_handler(model_infer)
        server.add_registered_method_handlers(service, {method: handler})

    request = infer_message(21)
    router = route_to(instance.scheduler)
    door = make_door(kind, router=router, register=register, compression=grpc.Compression.Gzip)
    assert ask(door, FAST_PATH, request) == ("gzip", [(1, TEXT)])
    assert ask(door, FAST_PATH, request, accept="gzip") == ("gzip", [(1, TEXT)])
    assert seen == [request, request]
    for accept in (None, "deflate"):
        encoding, messages = ask(door, FAST_PATH, request, accept=accept)
        assert encoding == "identity" and values_of(messages[0][1]) == [42.0]
    plain = make_door(kind, router=router, register=register)
    assert values_of(ask(plain, FAST_PATH, request)[1][0][1]) == [42.0]
    assert len(seen) == 2
