"""RFC 7541: header blocks that cannot be, tables that change, and what the server's own blocks may use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hpack import Encoder
from hpack.hpack import encode_integer
from http2_peer import (
    END_HEADERS,
    PREFACE,
    Error,
    Kind,
    Peer,
    data,
    encode_fields,
    fields_of,
    frame,
    infer_message,
    settings,
)

Connect = Callable[..., Peer]
BLOCK = encode_fields(fields_of())


def integer(value: int, prefix: int, first: int) -> bytes:
    """RFC 7541, 5.1."""
    octets = encode_integer(value, prefix)
    octets[0] |= first
    return bytes(octets)


def huffman(content: bytes) -> bytes:
    """A header ``x`` whose value is Huffman-coded octets, given as they are."""
    return b"\x10\x01x" + integer(len(content), 7, 0x80) + content


BROKEN = {
    "2.3.3 index beyond both tables": BLOCK + integer(62, 7, 0x80),
    "2.3.3 index far beyond": BLOCK + integer(1 << 20, 7, 0x80),
    "2.3.3 name beyond both tables": BLOCK + integer(70, 6, 0x40) + b"\x01x",
    "4.2 size update at the end": BLOCK + integer(0, 5, 0x20),
    "5.1 integer without an end": BLOCK + b"\xff" + b"\x80" * 20,
    "5.1 integer above 32 bits": BLOCK + b"\xff" + b"\xff" * 9 + b"\x01",
    "5.2 string longer than the block": BLOCK + b"\x10\x01x" + integer(10_000, 7, 0),
    "5.2 8 bits of padding": BLOCK + huffman(b"\x1f\xff"),
    "5.2 padding of zeros": BLOCK + huffman(b"\x18"),
    "5.2 the end-of-string symbol": BLOCK + huffman(b"\xff\xff\xff\xff"),
    "6.1 index 0": BLOCK + b"\x80",
    "6.3 table larger than allowed": integer(4097, 5, 0x20) + BLOCK,
    "6.3 table larger than anything": integer(1 << 31, 5, 0x20) + BLOCK,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_blocks(peer: Peer, name: str) -> None:
    peer.send(frame(Kind.HEADERS, 1, BROKEN[name], END_HEADERS))
    peer.expect_goaway(Error.COMPRESSION)


def encode(encoder: Encoder, *more: tuple[str, str], is_huffman: bool = True) -> bytes:
    return bytes(encoder.encode([*fields_of(), *more], huffman=is_huffman))


def check_call(peer: Peer, stream_id: int, block: bytes) -> None:
    peer.send(frame(Kind.HEADERS, stream_id, block, END_HEADERS), data(stream_id, infer_message()))
    peer.read_answer(stream_id).check()


RIGHT = {
    "5.2 Huffman coding": lambda: encode(Encoder()),
    "5.2 no Huffman coding": lambda: encode(Encoder(), is_huffman=False),
    "5.2 an empty string": lambda: BLOCK + b"\x10\x01x\x00",
    "5.2 an empty Huffman string": lambda: BLOCK + b"\x10\x01x\x80",
    "5.2 7 bits of padding": lambda: BLOCK + huffman(b"\xf8"),
    "6.2.2 without indexing": lambda: b"".join(
        b"\0" + block[1:] for block in (encode_fields([pair]) for pair in fields_of())
    ),
    "6.3 table of size 0": lambda: integer(0, 5, 0x20) + BLOCK,
    "6.3 two updates in front": lambda: integer(0, 5, 0x20) + integer(4096, 5, 0x20) + encode(Encoder()),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_blocks(peer: Peer, name: str) -> None:
    if name == "5.2 7 bits of padding":
        # '&' is 11111000: eight bits, no padding at all; '(' is 1111111010: ten bits, and six ones
        check_call(peer, 1, BLOCK + huffman(b"\xf8") + huffman(b"\xfe\xbf"))
        return
    check_call(peer, 1, RIGHT[name]())


def test_2_3_2_the_table_serves_later_calls(peer: Peer) -> None:
    """A client's dynamic table: filled by one call, used by the next, evicted by a large field."""
    encoder = Encoder()
    first, second = encode(encoder, ("x-token", "abc")), encode(encoder, ("x-token", "abc"))
    assert len(second) < 20 < len(first)
    check_call(peer, 1, first)
    check_call(peer, 3, second)
    check_call(peer, 5, encode(encoder, ("x-large", "y" * 4000)))
    check_call(peer, 7, encode(encoder, ("x-token", "abc")))


def test_4_3_what_was_evicted_is_gone(peer: Peer) -> None:
    encoder = Encoder()
    encode(encoder)
    check_call(peer, 1, encode(Encoder()))
    check_call(peer, 3, integer(0, 5, 0x20) + BLOCK)
    peer.send(frame(Kind.HEADERS, 5, BLOCK + integer(62, 7, 0x80), END_HEADERS))
    peer.expect_goaway(Error.COMPRESSION)


def test_4_1_blocks_of_refused_calls_still_count(peer: Peer) -> None:
    """The table is the connection's: a block that is refused has filled it all the same (RFC 9113, 4.3)."""
    encoder = Encoder()
    refused = bytes(encoder.encode([*fields_of(_method="GET"), ("x-token", "abc")]))
    peer.send(frame(Kind.HEADERS, 1, refused, END_HEADERS | 0x1))
    assert peer.read_answer(1).blocks[0][":status"] == "405"
    malformed = bytes(encoder.encode([*fields_of(), ("x-token", "abc"), ("Upper", "x"), ("x-late", "1")]))
    peer.send(frame(Kind.HEADERS, 3, malformed, END_HEADERS))
    assert peer.read_answer(3).reset == Error.PROTOCOL
    check_call(peer, 5, encode(encoder, ("x-token", "abc"), ("x-late", "1")))


def test_4_2_the_server_keeps_to_the_clients_table(connect: Connect) -> None:
    """With a table of size 0 each answer can be read on its own."""
    peer = connect(PREFACE + settings(HEADER_TABLE_SIZE=0))
    peer.decoder.max_allowed_table_size = 0
    for stream_id in (1, 3, 5):
        check_call(peer, stream_id, BLOCK)
    peer.send(settings(HEADER_TABLE_SIZE=4096))
    peer.decoder.max_allowed_table_size = 4096
    for stream_id in (7, 9):
        check_call(peer, stream_id, BLOCK)
