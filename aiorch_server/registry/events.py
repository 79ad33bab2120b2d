"""What happened, in order. See models.py for what all of these functions share.

Numbers are committed in their order: whoever has read one has read all before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Final

from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.names import check_short, check_text
from aiorch_server.registry.records import Event
from aiorch_server.registry.rows import count_up, read_counter
from aiorch_server.registry.schema import events

COUNTER: Final = "event"
_MOST_READ: Final = 1000
#: How many are kept, at least.
KEPT: Final = 100_000


def append_event(
    session: Session,
    kind: str,
    text: str,
    *,
    actor: str,
    model: str = "",
    version: int = 0,
    rollout: str = "",
) -> Event:
    """Writes down what this transaction does; ``text`` is a sentence."""
    event = Event(
        number=count_up(session, COUNTER),
        time=read_clock(session),
        kind=check_short(kind, "an event's kind", 64),
        actor=check_short(actor, "an event's actor", may_be_empty=True),
        text=check_text(text, "an event's text"),
        model=model,
        version=version,
        rollout=rollout,
    )
    session.execute(insert(events).values(asdict(event)))
    return event


def read_events(
    session: Session,
    *,
    after: int = 0,
    model: str = "",
    limit: int = _MOST_READ,
    is_visible: Callable[[str], bool] | None = None,
) -> tuple[Event, ...]:
    """Events behind number ``after``, the oldest first, of one model or of all that are visible ("": of no model).

    Fewer than ``limit`` does not mean that there are no more where ``is_visible`` left some out.
    """
    query = select(events).where(events.c.number > after).order_by(events.c.number).limit(min(limit, _MOST_READ))
    if model:
        query = query.where(events.c.model == model)
    found = (Event(**row._mapping) for row in session.execute(query))
    return tuple(event for event in found if is_visible is None or is_visible(event.model))


def last_event_number(session: Session) -> int:
    """The number of the last event, 0 before the first: where a reader begins who only wants what comes."""
    return read_counter(session, COUNTER)


def first_event_number(session: Session) -> int:
    """The number of the oldest event that is kept, 0 if there is none."""
    return session.execute(select(func.min(events.c.number))).scalar() or 0


def forget_events(session: Session, *, kept: int = KEPT) -> int:
    """Takes away the oldest but for the last ``kept``; gives how many."""
    old = delete(events).where(events.c.number <= last_event_number(session) - kept)
    return session.execute(old).rowcount  # type: ignore[attr-defined,no-any-return]
