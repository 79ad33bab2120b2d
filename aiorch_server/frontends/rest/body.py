"""Bodies of requests and responses: reading under a limit, and the content codings gzip and deflate."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from aiorch_server.errors import CapacityError, PayloadTooLarge, RequestCancelled, RequestError, UnsupportedRequest
from aiorch_server.frontends.rest.planes import RestLimits
from aiorch_server.frontends.unpacking import LARGEST_RATIO, UnpackBudget

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

#: "deflate" is the zlib container (RFC 9110, 8.4.1.2), not a bare deflate stream.
_WINDOW_BITS = {"gzip": 31, "deflate": 15}
#: Fast rather than small: tensors hardly shrink, and the time is taken from inference.
_COMPRESSION_LEVEL = 1
#: Below, the coding's own bytes and time outweigh what is saved.
_SMALLEST_COMPRESSED_BYTES = 256
#: Above, zlib runs on a thread (it releases the interpreter lock) instead of holding up the event loop. What unpacks is
#: at most 1032 times as much, so for that the limit is lower.
_LARGEST_INLINE_BYTES = 128 * 1024
_LARGEST_INLINE_PACKED_BYTES = 4 * 1024
#: A gzip body may be several members one after the other (RFC 1952, 2.2), each of which costs a copy of the rest.
_MOST_MEMBERS = 16
_ACCEPTED = re.compile(r"\s*([\w*-]+)\s*(?:;\s*q\s*=\s*([0-9.]+)\s*)?\Z")


class BodyTimeout(RequestError):
    """The body stood still for longer than the limit."""


class ClientGone(RequestCancelled):
    """The client closed its connection: nobody is left to answer."""


class UnsupportedCoding(UnsupportedRequest):
    """The body has a Content-Encoding that this server does not read."""


def find_header(headers: Headers, name: bytes) -> str | None:
    """The value of the first header called ``name`` (lower case), or None."""
    for key, value in headers:
        if key == name:
            return value.decode("latin-1").strip()
    return None


async def read_body(
    receive: Receive,
    headers: Headers,
    *,
    max_bytes: int,
    idle_timeout_s: float,
    min_bytes_per_s: int,
    book: Callable[[int], None] | None = None,
) -> bytes:
    """The whole body as sent.

    It may stand still for ``idle_timeout_s``, and take that long plus its size by ``min_bytes_per_s`` in all. Raises
    PayloadTooLarge (as soon as that is known, without keeping more), BodyTimeout, ClientGone, and what ``book`` raises,
    which is told of each part's bytes before they are kept.
    """
    declared = find_header(headers, b"content-length")
    if declared is not None and declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(f"the request body of {declared} bytes", max_bytes)
    # Grows in place, mostly: parts that are joined at the end lie in memory twice, and the loop waits for it.
    content = io.BytesIO()
    size = 0
    loop = asyncio.get_running_loop()
    slowest_s = loop.time() + idle_timeout_s
    try:
        async with asyncio.timeout(idle_timeout_s) as timer:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone("the client closed the connection before the request was complete")
                chunk: bytes = message.get("body", b"")
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large("the request body", max_bytes)
                if book is not None:
                    book(len(chunk))
                if not message.get("more_body", False) and size == len(chunk):
                    return chunk
                content.write(chunk)
                if not message.get("more_body", False):
                    return content.getvalue()
                timer.reschedule(min(loop.time() + idle_timeout_s, slowest_s + size / min_bytes_per_s))
    except TimeoutError:
        if size and loop.time() >= slowest_s + size / min_bytes_per_s:
            raise BodyTimeout(f"the request body came slower than {min_bytes_per_s} bytes/s") from None
        raise BodyTimeout(f"no part of the request body arrived for {idle_timeout_s:g} s") from None


async def decode_body(body: bytes, coding: str | None, *, max_bytes: int) -> bytes:
    """``body`` without its Content-Encoding; never makes more than ``max_bytes`` of it.

    Raises UnsupportedRequest for other codings, PayloadTooLarge, and RequestError if the stream is broken.
    """
    name = (coding or "identity").strip().lower()
    if name in ("", "identity"):
        return body
    if name not in _WINDOW_BITS:
        raise UnsupportedCoding(f"unsupported Content-Encoding '{coding}'; supported are gzip and deflate")
    if len(body) > _LARGEST_INLINE_PACKED_BYTES:
        return await asyncio.to_thread(_decompress, body, name, max_bytes)
    return _decompress(body, name, max_bytes)


@contextlib.asynccontextmanager
async def receive_body(
    receive: Receive, headers: Headers, limits: RestLimits, budget: UnpackBudget
) -> AsyncIterator[bytes]:
    """The body of a request within ``limits``, unpacked; what it unpacks to stays reserved until the block is left.

    Raises like ``read_body`` and ``decode_body``, and CapacityError when other requests hold the budget for too long.
    """
    bodies = limits.bodies
    held = 0

    def book(size: int) -> None:
        nonlocal held
        bodies.take(size)
        held += size

    try:
        body = await read_body(
            receive,
            headers,
            max_bytes=limits.max_body_bytes,
            idle_timeout_s=limits.body_idle_timeout_s,
            min_bytes_per_s=limits.min_body_bytes_per_s,
            book=book,
        )
        async with _unpacked(body, find_header(headers, b"content-encoding"), limits, budget) as content:
            yield content
    finally:
        bodies.give(held)


@contextlib.asynccontextmanager
async def _unpacked(body: bytes, coding: str | None, limits: RestLimits, budget: UnpackBudget) -> AsyncIterator[bytes]:
    if coding is None:
        yield body
        return
    held = min(limits.max_body_bytes, len(body) * LARGEST_RATIO)
    try:
        await budget.reserve(held)
    except TimeoutError:
        raise CapacityError("other compressed requests take all the memory there is for unpacking") from None
    try:
        body = await decode_body(body, coding, max_bytes=limits.max_body_bytes)
        unused, held = max(0, held - len(body)), min(held, len(body))
        budget.release(unused)
        yield body
    finally:
        budget.release(held)


def _decompress(body: bytes, name: str, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    rest = body
    for _ in range(_MOST_MEMBERS):
        stream = zlib.decompressobj(_WINDOW_BITS[name])
        try:
            part = stream.decompress(rest, max_bytes - size + 1)
        except zlib.error as error:
            raise RequestError(f"the request body is not valid {name} data: {error}") from None
        size += len(part)
        if size > max_bytes:
            raise _too_large(f"the request body, unpacked with {name},", max_bytes)
        parts.append(part)
        if not stream.eof:
            raise RequestError(f"the request body is not valid {name} data: it ends too early")
        rest = stream.unused_data
        if not rest:
            return parts[0] if len(parts) == 1 else b"".join(parts)
        if name != "gzip":
            raise RequestError(f"the request body has {len(rest)} bytes after the end of its {name} data")
    raise RequestError(f"the request body has more than {_MOST_MEMBERS} gzip members")


def choose_coding(accept_encoding: str | None) -> str | None:
    """The coding of the answer: the first of the highest weight among gzip, deflate and identity (None)."""
    best, best_weight = "identity", 0.0
    for item in (accept_encoding or "").split(","):
        matched = _ACCEPTED.match(item)
        if matched is None or matched[1].lower() not in ("gzip", "deflate", "identity"):
            continue
        try:
            weight = 1.0 if matched[2] is None else float(matched[2])
        except ValueError:
            continue
        if weight > best_weight:
            best, best_weight = matched[1].lower(), weight
    return None if best == "identity" else best


async def encode_body(body: bytes, coding: str | None) -> tuple[bytes, str | None]:
    """``body`` in ``coding``, and the coding really used: small bodies are left as they are."""
    if coding is None or len(body) < _SMALLEST_COMPRESSED_BYTES:
        return body, None
    if len(body) > _LARGEST_INLINE_BYTES:
        return await asyncio.to_thread(_compress, body, coding), coding
    return _compress(body, coding), coding


def _compress(body: bytes, coding: str) -> bytes:
    stream = zlib.compressobj(_COMPRESSION_LEVEL, zlib.DEFLATED, _WINDOW_BITS[coding])
    return stream.compress(body) + stream.flush()


def _too_large(what: str, max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"{what} exceeds the maximum allowed size of {max_bytes} bytes")
