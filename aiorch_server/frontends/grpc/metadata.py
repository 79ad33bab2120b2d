"""Metadata as gRPC's Python interface shows it, and as header pairs of bytes.

https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md: names ending in ``-bin`` carry base64, with or without
padding, several values joined by commas; all other values are printable ASCII.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

HeaderPairs = Sequence[tuple[bytes, bytes]]

_NAME: Final = re.compile(r"[0-9a-z_.\-]+")
_VALUE: Final = re.compile(rb"[\x20-\x7e]*")
#: Names that the protocol itself uses in responses; servicers cannot set them.
_RESERVED: Final = frozenset(
    {"content-type", "te", "grpc-status", "grpc-message", "grpc-encoding", "grpc-accept-encoding", "grpc-timeout"}
)


class Metadatum(NamedTuple):
    """One pair; ``value`` is bytes where the name ends in ``-bin``."""

    key: str
    value: str | bytes


class MalformedMetadata(ValueError):
    """The client sent metadata that does not follow the protocol."""


class InvalidMetadata(ValueError):
    """A servicer set metadata that cannot be sent."""


def decode_metadata(pairs: HeaderPairs) -> tuple[Metadatum, ...]:
    """Header pairs as a client sent them, duplicates kept in order; raises MalformedMetadata."""
    decoded: list[Metadatum] = []
    for name, value in pairs:
        key = name.decode("latin-1")
        if not key.endswith("-bin"):
            decoded.append(Metadatum(key, value.decode("latin-1")))
            continue
        for part in value.split(b","):
            text = part.strip()
            try:
                decoded.append(Metadatum(key, base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)))
            except binascii.Error:
                raise MalformedMetadata(f"metadata '{key}' is not base64") from None
    return tuple(decoded)


def encode_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> list[tuple[bytes, bytes]]:
    """What a servicer set, as header pairs; raises InvalidMetadata and says which pair and why."""
    pairs: list[tuple[bytes, bytes]] = []
    for key, value in metadata or ():
        if not isinstance(key, str) or _NAME.fullmatch(key) is None:
            raise InvalidMetadata(f"metadata name {key!r} is not of lower-case letters, digits, '_', '-' and '.'")
        if key in _RESERVED:
            raise InvalidMetadata(f"metadata name '{key}' belongs to the protocol")
        if not isinstance(value, str | bytes):
            raise InvalidMetadata(f"the value of metadata '{key}' is {type(value).__name__}, not str or bytes")
        if key.endswith("-bin"):
            raw = value.encode() if isinstance(value, str) else value
            pairs.append((key.encode(), base64.b64encode(raw).rstrip(b"=")))
            continue
        try:
            raw = value.encode("ascii") if isinstance(value, str) else value
        except UnicodeEncodeError:
            raw = b"\xff"
        if _VALUE.fullmatch(raw) is None:
            raise InvalidMetadata(f"the value of metadata '{key}' is not printable ASCII; use a name ending in -bin")
        pairs.append((key.encode(), raw))
    return pairs
