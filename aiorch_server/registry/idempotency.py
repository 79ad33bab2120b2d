"""Answers to repeat: the same key with the same request by the same caller is done once, also by two at a time.

answer = find_answer(session, caller, key, request)
if answer is None:
    answer = ...            # in the same transaction
    keep_answer(session, caller, key, request, answer)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from aiorch_server.errors import IdempotencyKeyReused, RequestError
from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.names import show
from aiorch_server.registry.rows import put_row
from aiorch_server.registry.schema import idempotency

LONGEST_KEY: Final = 128
KEPT_S: Final = 24 * 3600.0
LARGEST_ANSWER_BYTES: Final = 4 << 20


def find_answer(session: Session, caller: str, key: str, request: bytes) -> bytes | None:
    """The answer that this request got, None if it is new; ``request`` tells the method too.

    An empty key is always new. Raises IdempotencyKeyReused where the key stands for another request, RequestError for
    what is no key.
    """
    if not key:
        return None
    query = select(idempotency).where(idempotency.c.id == _name(caller, key))
    row = session.execute(query).first()
    if row is None or row.expires_at <= read_clock(session):
        return None
    if row.request != _digest(request):
        raise IdempotencyKeyReused(f"idempotency key {show(key)} was used for another request; a new one needs its own")
    return bytes(row.answer)


def keep_answer(
    session: Session, caller: str, key: str, request: bytes, answer: bytes, *, kept_s: float = KEPT_S
) -> None:
    """Keeps what this transaction answers, for a day; nothing where the key is empty."""
    if not key:
        return
    if len(answer) > LARGEST_ANSWER_BYTES:
        raise RequestError(f"an answer of {len(answer)} bytes cannot be kept for repetition; call without a key")
    expires_at = read_clock(session) + timedelta(seconds=kept_s)
    values = {"request": _digest(request), "answer": answer, "expires_at": expires_at}
    put_row(session, idempotency, {"id": _name(caller, key)}, values)


def do_once(session: Session, caller: str, key: str, request: bytes, do: Callable[[], bytes]) -> bytes:
    """What ``do`` gives, or gave to the same request before."""
    answer = find_answer(session, caller, key, request)
    if answer is None:
        answer = do()
        keep_answer(session, caller, key, request, answer)
    return answer


def forget_answers(session: Session) -> int:
    """Takes away what is too old; gives how many."""
    old = delete(idempotency).where(idempotency.c.expires_at <= read_clock(session))
    return session.execute(old).rowcount  # type: ignore[attr-defined,no-any-return]


def _name(caller: str, key: str) -> str:
    if len(key) > LONGEST_KEY or not key.isprintable():
        raise RequestError(
            f"found {show(key)} as idempotency_key; it should be at most {LONGEST_KEY} printable characters"
        )
    # A digest: the columns of databases differ in what they take for the same text.
    return _digest(caller.encode("utf-8", "surrogatepass") + b"\0" + key.encode("utf-8", "surrogatepass"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
