"""Computes the audit log's chain anew, and says where it is broken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from aiorch_server.registry.audit import GENESIS, AuditEntry, hash_entry, read_head
from aiorch_server.registry.database import Database
from aiorch_server.registry.schema import audit

#: Entries of one transaction.
_STEP: Final = 2000


@dataclass(slots=True)
class AuditCheck:
    """A check on its way; ``broken_at`` is the first entry that does not agree, 0 if all do.

    ``known_number`` and ``known_hash`` are what is known from outside of some entry; 0: nothing.
    """

    known_number: int = 0
    known_hash: str = ""
    entries: int = 0
    head_hash: str = GENESIS
    broken_at: int = 0
    reason: str = ""
    is_finished: bool = False

    @property
    def is_intact(self) -> bool:
        """Whether all agrees, as far as it went."""
        return not self.broken_at


async def verify_audit(database: Database, *, known_number: int = 0, known_hash: str = "") -> AuditCheck:
    """The finished check of the whole log; in short transactions, so that writers go on."""
    check = AuditCheck(known_number, known_hash.lower())
    while not check.is_finished:
        check = await database.read(lambda session, begin=check: step_audit_check(session, begin))  # type: ignore[misc]
    return check


def step_audit_check(session: Session, begin: AuditCheck, *, step: int = _STEP) -> AuditCheck:
    """The check some entries further; what is given stays as it is."""
    check = AuditCheck(begin.known_number, begin.known_hash, begin.entries, begin.head_hash)
    head_number, head_hash = read_head(session)
    query = select(audit).where(audit.c.number > check.entries).order_by(audit.c.number).limit(step)
    rows = [AuditEntry(**row._mapping) for row in session.execute(query)]
    for entry in rows:
        expected = check.entries + 1
        if entry.number != expected:
            return _break(check, expected, f"entry {expected} is missing")
        if entry.hash != hash_entry(entry, check.head_hash):
            return _break(check, expected, f"entry {expected} was changed, or is not the one that was written there")
        if entry.number == check.known_number and entry.hash != check.known_hash:
            return _break(check, expected, f"entry {expected} has another hash than the one that is known")
        check.entries, check.head_hash = entry.number, entry.hash
    check.is_finished = len(rows) < step
    if check.is_finished and check.known_number > check.entries:
        return _break(check, check.entries + 1, f"entries from {check.entries + 1} on are missing; one is known")
    if check.is_finished and (head_number, head_hash) != (check.entries, check.head_hash):
        return _break(check, check.entries + 1, f"the log ended with entry {head_number}, not {check.entries}")
    return check


def _break(check: AuditCheck, number: int, reason: str) -> AuditCheck:
    check.broken_at, check.reason, check.is_finished = number, reason, True
    return check
