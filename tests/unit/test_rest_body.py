"""Content codings: which one is chosen, and what is done to small and broken bodies."""

import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.errors import PayloadTooLarge, RequestCancelled, RequestError
from aiorch_server.frontends.rest.body import choose_coding, decode_body, encode_body, read_body


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        (None, None),
        ("", None),
        ("gzip", "gzip"),
        ("GZIP", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("br, deflate", "deflate"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip; q=0", None),
        ("identity, gzip;q=0.9", None),
        ("identity;q=0.5, gzip", "gzip"),
        ("gzip;q=x, deflate", "deflate"),
        ("gzip;q=1.1.1", None),
        ("br", None),
        ("*", None),
        (";q=1,,=", None),
    ],
)
def test_choice_of_coding(header, coding):
    assert choose_coding(header) == coding


@given(st.text(max_size=60))
def test_any_accept_encoding_is_survived(header):
    assert choose_coding(header) in (None, "gzip", "deflate")


@given(st.binary(max_size=2000), st.sampled_from(["gzip", "deflate"]))
async def test_coding_round_trip(body, coding):
    packed, used = await encode_body(body, coding)
    assert used == (coding if len(body) >= 256 else None)
    assert await decode_body(packed, used, max_bytes=2000) == body


@given(st.binary(max_size=200), st.sampled_from(["gzip", "deflate"]))
async def test_any_bytes_are_decoded_or_refused(body, coding):
    try:
        await decode_body(body, coding, max_bytes=1000)
    except (RequestError, PayloadTooLarge) as error:
        assert "the request body" in str(error)


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_the_limit_is_exact(coding, pack):
    assert await decode_body(pack(b"x" * 100), coding, max_bytes=100) == b"x" * 100
    with pytest.raises(PayloadTooLarge):
        await decode_body(pack(b"x" * 101), coding, max_bytes=100)


async def test_members_share_the_limit():
    two = gzip.compress(b"x" * 60) * 2
    assert len(await decode_body(two, "gzip", max_bytes=120)) == 120
    with pytest.raises(PayloadTooLarge):
        await decode_body(two, "gzip", max_bytes=119)


async def test_a_bomb_is_never_unpacked():
    bomb = zlib.compress(bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge):
            await decode_body(bomb, "deflate", max_bytes=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


async def test_endless_members_are_refused():
    members = gzip.compress(b"")
    assert await decode_body(members * 16, "gzip", max_bytes=100) == b""
    with pytest.raises(RequestError, match="more than 16 gzip members"):
        await decode_body(members * 50_000, "gzip", max_bytes=100)


def feed(*messages):
    left = list(messages)

    async def receive():
        return left.pop(0)

    return receive


async def test_chunks_become_one_body():
    receive = feed({"type": "http.request", "body": b"ab", "more_body": True}, {"type": "http.request", "body": b"c"})
    assert await read_body(receive, [], max_bytes=3, min_bytes_per_s=1, idle_timeout_s=5) == b"abc"


async def test_a_declared_length_is_refused_before_anything_is_read():
    with pytest.raises(PayloadTooLarge, match="the request body of 101 bytes"):
        await read_body(feed(), [(b"content-length", b"101")], max_bytes=100, min_bytes_per_s=1, idle_timeout_s=5)


async def test_leaving_inside_a_body_cancels():
    receive = feed({"type": "http.request", "body": b"ab", "more_body": True}, {"type": "http.disconnect"})
    with pytest.raises(RequestCancelled):
        await read_body(receive, [], max_bytes=3, min_bytes_per_s=1, idle_timeout_s=5)
