"""Counts features before a message is parsed: the parser takes 250 ns for each, and no other thread runs then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from aiorch_server.errors import PayloadTooLarge

#: Features of all examples, and examples, together; a message of the largest size could hold ten million.
MOST_FEATURES: Final = 1 << 18
#: Below this size there is no need to look.
SMALL_BYTES: Final = 1 << 18
_LEN: Final = 2
_GROUP: Final = (3, 4)
#: The fields from a request to its features: input, either kind of examples, examples or their context, features.
_PATH: Final = (frozenset((2,)), frozenset((1, 2)), frozenset((1, 2)), frozenset((1,)), frozenset((1,)))

_EXAMPLE: Final = 2
_FEATURE: Final = 4


class _Malformed(Exception):
    """The parser will tell."""


def check_features(message: bytes) -> None:
    """PayloadTooLarge if a Classify, Regress or MultiInference request has more than MOST_FEATURES; for any thread.

    Other fields, which take their time here, may be twice as many: an example has one around its features.
    """
    count = others = 0
    try:
        for is_counted in _walk(memoryview(message), 0):
            if is_counted:
                count += 1
            else:
                others += 1
            if count > MOST_FEATURES:
                raise PayloadTooLarge(f"the request has more examples and features than {MOST_FEATURES}")
            if others > 2 * MOST_FEATURES:
                raise PayloadTooLarge(
                    f"the request has more fields beside its examples and features than {2 * MOST_FEATURES}"
                )
    except _Malformed:
        return


def _walk(view: memoryview, level: int) -> Iterator[bool]:
    """For each field of ``view``, which lies that deep in the request, and below: whether it is one that counts."""
    wanted = _PATH[level]
    for number, part in _read_fields(view):
        is_wanted = number in wanted
        yield is_wanted and level in (_EXAMPLE, _FEATURE)
        if is_wanted and level != _FEATURE:
            yield from _walk(part, level + 1)


def _read_fields(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each field that has a length (https://protobuf.dev/programming-guides/encoding/).

    0 and none for any other.
    """
    at, size = 0, len(view)
    nothing = view[:0]
    while at < size:
        key, at = _read_varint(view, at)
        kind = key & 7
        if kind == 0:
            _, at = _read_varint(view, at)
        elif kind == 1:
            at += 8
        elif kind == 5:
            at += 4
        elif kind == _LEN:
            length, at = _read_varint(view, at)
            if length > size - at:
                raise _Malformed
            yield key >> 3, view[at : at + length]
            at += length
            continue
        elif kind not in _GROUP:  # what is in a group is looked at like what is beside it: it may only count too much
            raise _Malformed
        yield 0, nothing


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(view) and shift < 70:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Malformed
