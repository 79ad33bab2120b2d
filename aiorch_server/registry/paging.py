"""Lists in pages: what follows a row is asked for by that row's key, so that nothing is missed or seen twice."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from sqlalchemy import ColumnElement, Row, Select
from sqlalchemy.orm import Session

from aiorch_server.errors import RequestError
from aiorch_server.registry.records import Page

T = TypeVar("T")
DEFAULT_SIZE: Final = 100
LARGEST_SIZE: Final = 1000
#: Parts (such as files of versions) that the items of a page have together.
HEAVIEST: Final = 20_000
_LONGEST_TOKEN = 4096
_CHECK_BYTES = 12
_WRONG = "page_token is none that this list gave: begin again without one"


def choose_size(size: int) -> int:
    """How many rows a page has: 0 stands for 100, more than 1000 for 1000; RequestError for less than none."""
    if size < 0:
        raise RequestError(f"found {size} as page_size; it should be 0 to {LARGEST_SIZE}")
    return min(size or DEFAULT_SIZE, LARGEST_SIZE)


def write_token(key: str | int, *scope: object) -> str:
    """The token for what follows the row of this key, good for the request that ``scope`` tells."""
    content = json.dumps(key).encode()
    return base64.urlsafe_b64encode(_check(content, scope) + content).decode().rstrip("=")


def read_token(token: str, *scope: object) -> Any:
    """The key in a token, None for an empty one; RequestError for what was not written for this request."""
    if not token:
        return None
    try:
        if len(token) > _LONGEST_TOKEN:
            raise ValueError
        raw = base64.b64decode(token.encode("ascii") + b"=" * (-len(token) % 4), b"-_", validate=True)
        check, content = raw[:_CHECK_BYTES], raw[_CHECK_BYTES:]
        if check != _check(content, scope):
            raise ValueError
        key = json.loads(content)
        # whoever made it up may have put in what databases do not take
        if type(key) is int and abs(key) < 2**63:
            return key
        if isinstance(key, str) and "\0" not in key and key.encode() is not None:
            return key
        raise ValueError
    except (ValueError, RecursionError):  # also of decoding
        raise RequestError(_WRONG) from None


def _check(content: bytes, scope: Sequence[object]) -> bytes:
    # No secret: whoever makes up a token only chooses where the list goes on. It tells mistakes.
    place = json.dumps([str(each) for each in scope]).encode()
    return hashlib.blake2b(place + b"\0" + content, digest_size=_CHECK_BYTES, person=b"aiorch page").digest()


def read_page(
    session: Session,
    query: Select[Any],
    key: ColumnElement[Any],
    *,
    size: int,
    token: str,
    scope: Sequence[object],
    build: Callable[[Sequence[Row[Any]]], Sequence[T]],
    is_wanted: Callable[[Row[Any]], bool] | None = None,
    weigh: Callable[[Row[Any]], int] | None = None,
    is_descending: bool = False,
) -> Page[T]:
    """A page of ``query``, ordered by ``key``, a column of it that is unique.

    ``is_wanted`` leaves rows out, ``build`` makes the items of those that are left; ``weigh`` says how large a row's
    item is: a page ends before all are more than HEAVIEST, unless it would be empty. ``scope`` names the list and its
    filters. Raises RequestError for a token of another list.
    """
    wanted = choose_size(size)
    after = read_token(token, *scope)
    if after is not None and not isinstance(after, key.type.python_type):
        raise RequestError(_WRONG)
    rows: list[Row[Any]] = []

    def write_after(count: int) -> str:
        return write_token(_key_of(rows[count - 1], key), *scope)

    weight = 0
    while True:
        part = query if after is None else query.where(key < after if is_descending else key > after)
        part = part.order_by(key.desc() if is_descending else key).limit(wanted + 1)
        found = session.execute(part).all()
        for row in found:
            if is_wanted is not None and not is_wanted(row):
                continue
            weight += 0 if weigh is None else weigh(row)
            if len(rows) == wanted or (rows and weight > HEAVIEST):
                return Page(tuple(build(rows)), write_after(len(rows)), write_after)
            rows.append(row)
        if len(found) <= wanted:
            return Page(tuple(build(rows)), token_after=write_after)
        after = _key_of(found[-1], key)


def _key_of(row: Row[Any], key: ColumnElement[Any]) -> Any:
    return row._mapping[key]
