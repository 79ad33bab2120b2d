"""Writing rows: counters, and rows that may be there already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Table, and_, insert, select, update
from sqlalchemy.orm import Session

from aiorch_server.registry.schema import counters


def count_up(session: Session, name: str) -> int:
    """The next number of a counter: larger than all that were given, and committed in their order."""
    found = session.execute(select(counters.c.value).where(counters.c.name == name).with_for_update()).scalar()
    value = (found or 0) + 1
    put_row(session, counters, {"name": name}, {"value": value})
    return value


def read_counter(session: Session, name: str) -> int:
    """The last number of a counter, 0 before the first."""
    return session.execute(select(counters.c.value).where(counters.c.name == name)).scalar() or 0


def put_row(session: Session, table: Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Writes the row with this primary key, whether or not it is there; for writers, which follow each other."""
    is_it = and_(*(table.c[name] == value for name, value in key.items()))
    if session.execute(select(next(iter(table.primary_key))).where(is_it)).first() is None:
        session.execute(insert(table).values({**key, **values}))
    elif values:
        session.execute(update(table).where(is_it).values(dict(values)))
