"""Packs response messages as gRPC does; https://github.com/grpc/grpc/blob/master/doc/compression.md."""

from __future__ import annotations

import asyncio
import enum
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

#: ``wbits`` of zlib for each message encoding; gRPC's "deflate" is the zlib format.
WBITS: Final = {"gzip": 31, "deflate": 15}
MIN_COMPRESS_BYTES: Final = 1024
#: The fastest: most of what a model answers packs little, and somebody waits for it.
_LEVEL: Final = 1
#: From this size on a message is packed on another thread: less takes the loop a millisecond at worst.
_LARGE_BYTES: Final = 16 << 10


class Compression(enum.IntEnum):
    """What messages are packed with, numbered as ``grpc.Compression``, whose members are taken as well."""

    NONE = 0
    DEFLATE = 1
    GZIP = 2


#: By name, as settings have them.
COMPRESSIONS: Final = {"none": Compression.NONE, "gzip": Compression.GZIP, "deflate": Compression.DEFLATE}
_NAMES: Final[dict[int, str]] = {Compression.GZIP: "gzip", Compression.DEFLATE: "deflate"}
_NUMBERS: Final = {"gzip": 1, "deflate": 2}


@dataclass(frozen=True, slots=True)
class ResponseCompression:
    """What a server packs its response messages with where no servicer says otherwise, and from which size on.

    ValueError for a negative size.
    """

    algorithm: int = Compression.NONE
    min_compress_bytes: int = MIN_COMPRESS_BYTES

    def __post_init__(self) -> None:
        if self.min_compress_bytes < 0:
            raise ValueError(f"min_compress_bytes is {self.min_compress_bytes}; expected 0 or more")

    @property
    def packed_encodings(self) -> int:
        """For the compiled core: clients that take one of these are never answered on the fast path."""
        name = _NAMES.get(self.algorithm)
        return 0 if name is None else 1 << _NUMBERS[name]


def choose_encoding(algorithm: int, accepted: Collection[str]) -> str | None:
    """The encoding's name, None for identity: also where the client's grpc-accept-encoding does not name it."""
    name = _NAMES.get(algorithm)
    return name if name in accepted else None


async def pack_message(message: bytes, encoding: str) -> bytes | None:
    """The message packed, None where that would not make it smaller."""
    if len(message) < _LARGE_BYTES:
        packed = _pack(message, encoding)
    else:
        packed = await asyncio.to_thread(_pack, message, encoding)
    return packed if len(packed) < len(message) else None


def _pack(message: bytes, encoding: str) -> bytes:
    return zlib.compress(message, _LEVEL, WBITS[encoding])
