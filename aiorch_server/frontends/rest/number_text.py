"""Large arrays of numbers in a JSON document, read piece by piece instead of all at once.

A JSON parser keeps the interpreter lock from a document's first byte to its last: 60 ms for 16 MB, in which no other
thread gets a turn, and the event loop is one of them. Here the text of such arrays is cut out before the document is
parsed, and read in pieces later. Only what is plainly right is read this way: whoever meets ``NotPlain``, or any error
in what is left of the document, parses the whole for the same answer or the exact error.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from typing import Any, Final

from aiorch_server.errors import AiorchError
from aiorch_server.frontends.rest.tensor_json import pack_data
from aiorch_server.types import DataType

#: Text read in one step, between two chances for other threads to run (about 1 ms).
PIECE_BYTES: Final = 64 * 1024
_SPACE: Final = b" \t\r\n"
_NUMBERS: Final = b"0123456789+-.eE,[]" + _SPACE
#: The end of one row and the beginning of the next; with its bracket in front, which is found fast. Brackets and space
#: of any length would be read anew from each bracket, with the lock held.
_JOINT: Final = re.compile(rb"\]([\]\s]{0,64}+),\s*+\[([\[\s]*+)")
#: Longest white space around an array that is looked through.
_MARGIN_BYTES: Final = 256
#: What stands for an array that is cut out; clients never see it, so none of them can write it.
_MARK: Final = f"cut {secrets.token_hex(16)} "


class NotPlain(Exception):
    """The text is wrong, or right in a way that is read only with the whole document."""


class NumberText:
    """The JSON text of one array of numbers, nested to the same depth everywhere; not yet checked to be that."""

    def __init__(self, text: memoryview) -> None:
        self._text = text

    def pack(self, datatype: DataType, count: int, name: str, path: str) -> bytes:
        """The raw bytes of its ``count`` elements as ``pack_data`` makes them; NotPlain."""
        import msgspec

        packed: list[bytes] = []
        found = 0
        depth = opened = _strip(bytes(self._text[:_MARGIN_BYTES]))[1]
        for piece, is_last in self._cut():
            text, leading, trailing = _strip(piece)
            # Rows end where a piece ends as often as the next one begins; all of them end with the last.
            if leading != opened or (trailing != depth if is_last else trailing >= depth):
                raise NotPlain
            opened = trailing
            if b"]" in text:
                text = _JOINT.sub(lambda joint: _check_joint(joint, depth), text)
            try:
                values = msgspec.json.decode(b"[%b]" % text)
                packed.append(pack_data(values, datatype, (len(values),), name, path))
            except (msgspec.MsgspecError, AiorchError, ValueError, RecursionError):
                raise NotPlain from None
            found += len(values)
        if found != count:
            raise NotPlain
        return b"".join(packed)

    def _cut(self) -> Iterator[tuple[bytes, bool]]:
        """Its pieces between commas, and whether each is the last."""
        at, size = 0, len(self._text)
        while size - at > PIECE_BYTES:
            piece = bytes(self._text[at : at + PIECE_BYTES])
            end = piece.rfind(b",")
            if end < 0:
                raise NotPlain
            yield piece[:end], False
            at += end + 1
        yield bytes(self._text[at:]), True


def _strip(piece: bytes) -> tuple[bytes, int, int]:
    """``piece`` without the brackets around it, and how many were before and behind."""
    leading = piece[: len(piece) - len(piece.lstrip(b"[" + _SPACE))]
    text = piece[len(leading) :].rstrip(b"]" + _SPACE)
    trailing = piece[len(leading) + len(text) :]
    if not text:
        raise NotPlain
    return text, leading.count(b"["), trailing.count(b"]")


def _check_joint(joint: re.Match[bytes], depth: int) -> bytes:
    closed = joint[1].count(b"]")
    if closed != joint[2].count(b"[") or closed + 1 >= depth:
        raise NotPlain
    return b","


def cut_numbers(document: memoryview) -> tuple[bytes, list[NumberText]]:
    """``document`` with a mark in the place of each large array of numbers, and those in their order."""
    parts: list[bytes | memoryview] = []
    texts: list[NumberText] = []
    at = 0
    for start, end in _find_numbers(document):
        parts += (document[at:start], f'"{_MARK}{len(texts)}"'.encode("ascii"))
        texts.append(NumberText(document[start:end]))
        at = end
    return b"".join((*parts, document[at:])), texts


def put_numbers(document: dict[str, Any], texts: list[NumberText]) -> None:
    """Puts ``texts`` where their marks are, which is the ``data`` of inputs; NotPlain where one is elsewhere."""
    marks = {f"{_MARK}{index}": text for index, text in enumerate(texts)}
    inputs = document.get("inputs")
    for item in inputs if isinstance(inputs, list) else ():
        if isinstance(item, dict) and isinstance(item.get("data"), str) and item["data"] in marks:
            item["data"] = marks.pop(item["data"])
    if marks:
        raise NotPlain


def _find_numbers(document: memoryview) -> Iterator[tuple[int, int]]:
    """Where the text of each array starts and ends that fills at least one whole piece."""
    start: int | None = None
    for at in range(0, len(document), PIECE_BYTES):
        is_plain = not bytes(document[at : at + PIECE_BYTES]).translate(None, _NUMBERS)
        if is_plain and start is None:
            start = at
        elif not is_plain and start is not None:
            yield from _trim(document, start, at)
            start = None


def _trim(document: memoryview, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The array around whole pieces of numbers, if it is one: what is before and behind belongs to it, or to others."""
    before = bytes(document[max(0, start - PIECE_BYTES) : start])
    start -= len(before) - len(before.rstrip(_NUMBERS))
    behind = bytes(document[end : end + PIECE_BYTES])
    end += len(behind) - len(behind.lstrip(_NUMBERS))
    head, tail = bytes(document[start : start + _MARGIN_BYTES]), bytes(document[end - _MARGIN_BYTES : end])
    start += len(head) - len(head.lstrip(_SPACE))
    end -= len(tail) - len(tail.rstrip(_SPACE + b","))
    if bytes(document[start : start + 1]) == b"[" and bytes(document[end - 1 : end]) == b"]":
        yield start, end
