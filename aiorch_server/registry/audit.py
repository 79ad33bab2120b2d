"""Who did what, with what outcome: rows that are only added, each with a hash over the one before.

Whoever changes, removes or exchanges rows breaks the chain. Whoever computes it anew, or cuts its end off, is found by
who keeps the number and hash of some entry elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Row, insert, select
from sqlalchemy.orm import Session

from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.names import check_short, check_text, fit_text
from aiorch_server.registry.paging import read_page
from aiorch_server.registry.records import Page
from aiorch_server.registry.rows import put_row
from aiorch_server.registry.schema import audit, audit_head

GENESIS: Final = "0" * 64
LONGEST_DETAIL: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One call: ``outcome`` is OK or the name of a gRPC status, ``detail`` JSON without secrets."""

    number: int
    time: datetime
    principal: str
    method: str
    model: str
    outcome: str
    detail: str
    server: str
    hash: str = ""


def append_audit(
    session: Session,
    *,
    principal: str,
    method: str,
    outcome: str,
    model: str = "",
    detail: str = "",
    server: str = "",
) -> AuditEntry:
    """Adds an entry; ``model`` may be any text that was asked for."""
    head = read_head(session)
    entry = AuditEntry(
        number=head[0] + 1,
        # Whole microseconds in UTC, as it will be read.
        time=read_clock(session).astimezone(UTC),
        principal=check_short(principal, "a principal"),
        method=check_short(method, "a method"),
        model=fit_text(model, 255),
        outcome=check_short(outcome, "an outcome", 32),
        detail=check_text(detail, "detail", LONGEST_DETAIL),
        server=check_short(server, "a server", may_be_empty=True),
    )
    row = {**asdict(entry), "hash": hash_entry(entry, head[1])}
    session.execute(insert(audit).values(row))
    put_row(session, audit_head, {"id": 1}, {"number": entry.number, "hash": row["hash"]})
    return AuditEntry(**row)


def hash_entry(entry: AuditEntry, before: str) -> str:
    """SHA-256 over the hash before and all fields but the hash, as JSON."""
    fields = asdict(entry)
    del fields["hash"]
    fields["time"] = entry.time.isoformat(timespec="microseconds")
    text = json.dumps([before, *(fields[name] for name in sorted(fields))], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_head(session: Session) -> tuple[int, str]:
    """Number and hash of the last entry: what to keep elsewhere."""
    row = session.execute(select(audit_head.c.number, audit_head.c.hash)).first()
    return (0, GENESIS) if row is None else (row.number, row.hash)


def query_audit(
    session: Session,
    *,
    principal: str = "",
    model: str = "",
    method: str = "",
    since: datetime | None = None,
    until: datetime | None = None,
    size: int = 0,
    token: str = "",
    is_visible: Callable[[str], bool] | None = None,
) -> Page[AuditEntry]:
    """Entries that fit all of what is given, the newest first; ``until`` is the first moment that does not."""
    query = select(audit)
    for name, wanted in (("principal", principal), ("model", model), ("method", method)):
        if wanted:
            query = query.where(audit.c[name] == check_text(wanted, name, 255))
    if since is not None:
        query = query.where(audit.c.time >= since)
    if until is not None:
        query = query.where(audit.c.time < until)
    return read_page(
        session,
        query,
        audit.c.number,
        size=size,
        token=token,
        scope=("audit", principal, model, method, since, until),
        build=lambda rows: [_build(row) for row in rows],
        is_wanted=None if is_visible is None else lambda row: is_visible(row.model),
        is_descending=True,
    )


def _build(row: Row[Any]) -> AuditEntry:
    return AuditEntry(**row._mapping)
