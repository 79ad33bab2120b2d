"""What each server says of itself. See models.py for what all of these functions share."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, delete, insert, select
from sqlalchemy.orm import Session

from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.columns import LARGEST_DOCUMENT_BYTES
from aiorch_server.registry.documents import read_statuses, write_record
from aiorch_server.registry.names import check_short, check_text
from aiorch_server.registry.records import ServerStatus
from aiorch_server.registry.rows import put_row
from aiorch_server.registry.schema import server_statuses, servers


def report(session: Session, server: str, statuses: Iterable[ServerStatus] = ()) -> datetime:
    """A server's sign of life, and what it made of each deployment; gives the database's time, which it is put down to.

    What it said before of other models is gone. ``server`` and ``seen_at`` of the statuses do not count.
    """
    check_short(server, "a server's name")
    now = read_clock(session)
    put_row(session, servers, {"name": server}, {"seen_at": now})
    session.execute(delete(server_statuses).where(server_statuses.c.server == server))
    rows = [
        {
            "server": server,
            "model": each.model,
            "observed_generation": each.observed_generation,
            "versions": [write_record(version) for version in each.versions],
            "samples": check_text(each.samples, "samples", LARGEST_DOCUMENT_BYTES),
            "seen_at": now,
        }
        for each in statuses
    ]
    if rows:
        session.execute(insert(server_statuses), rows)
    return now


def read_server_statuses(
    session: Session, model: str = "", *, within_s: float | None = None
) -> tuple[ServerStatus, ...]:
    """What servers made of a model's deployment (empty: of all), by model and server.

    Only of those that gave a sign of life within so many seconds, None: of all.
    """
    query = select(server_statuses).order_by(server_statuses.c.model, server_statuses.c.server)
    if model:
        query = query.where(server_statuses.c.model == model)
    if within_s is not None:
        query = query.where(server_statuses.c.seen_at > read_clock(session) - timedelta(seconds=within_s))
    return tuple(_build(row) for row in session.execute(query))


def read_servers(session: Session, *, within_s: float | None = None) -> dict[str, datetime]:
    """When each server gave its last sign of life, by name."""
    query = select(servers.c.name, servers.c.seen_at).order_by(servers.c.name)
    if within_s is not None:
        query = query.where(servers.c.seen_at > read_clock(session) - timedelta(seconds=within_s))
    return dict(session.execute(query).tuples().all())


def forget_server(session: Session, server: str) -> None:
    """The server has ended; nothing happens where it is not known."""
    session.execute(delete(server_statuses).where(server_statuses.c.server == server))
    session.execute(delete(servers).where(servers.c.name == server))


def forget_silent_servers(session: Session, *, after_s: float) -> tuple[str, ...]:
    """Takes away those without a sign of life for so long; gives their names."""
    before = read_clock(session) - timedelta(seconds=after_s)
    names = tuple(session.execute(select(servers.c.name).where(servers.c.seen_at < before)).scalars())
    for name in names:
        forget_server(session, name)
    return names


def _build(row: Row[Any]) -> ServerStatus:
    return ServerStatus(**{**row._mapping, "versions": read_statuses(row.versions)})
