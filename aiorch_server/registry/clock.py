"""The time by the database, which is the same for all servers of a registry."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import text
from sqlalchemy.orm import Session

from aiorch_server.registry.columns import Moment

# Not now(): that is when the transaction began, and writers wait for each other after that.
_POSTGRESQL = text("SELECT clock_timestamp() AS moment").columns(moment=Moment)
_MYSQL = text("SELECT UTC_TIMESTAMP(6) AS moment").columns(moment=Moment)


def read_clock(session: Session) -> datetime:
    """The time now, aware, in UTC; SQLite's is this machine's, because all who share its file run there."""
    name = session.get_bind().dialect.name
    if name == "sqlite":
        return datetime.now(UTC)
    now: datetime = session.execute(_POSTGRESQL if name == "postgresql" else _MYSQL).scalar_one()
    return now
