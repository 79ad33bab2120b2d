"""What was done, by whom, with what outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiorch_proto.admin.v1 import audit_pb2 as pb

from aiorch_server.frontends.admin.caller import Caller
from aiorch_server.frontends.admin.fields import InvalidField, encode_time, read_time
from aiorch_server.frontends.admin.pages import encode_page
from aiorch_server.registry.audit import AuditEntry, query_audit
from aiorch_server.registry.audit_check import verify_audit

if TYPE_CHECKING:
    from aiorch_server.registry.database import Database
    from aiorch_server.registry.session import Session


class AuditServicer:
    """The service Audit."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def QueryAudit(self, session: Session, request: Any, caller: Caller) -> pb.QueryAuditResponse:
        """A page of the entries that fit, the newest first; an operation on a session."""
        page = query_audit(
            session,
            principal=request.principal,
            model=request.model,
            method=request.method,
            since=read_time(request, "since"),
            until=read_time(request, "until"),
            size=request.page_size,
            token=request.page_token,
        )
        return encode_page(pb.QueryAuditResponse(), "entries", page, _encode)

    async def VerifyAudit(self, request: Any, context: Any) -> pb.VerifyAuditResponse:
        """Computes the whole chain anew."""
        if request.known_number < 0 or (request.known_number > 0) != bool(request.known_hash):
            raise InvalidField("known_number", "and known_hash are given together, or neither is")
        check = await verify_audit(
            self._database, known_number=request.known_number, known_hash=request.known_hash
        )  # fmt: skip
        return pb.VerifyAuditResponse(
            is_intact=check.is_intact,
            entries=check.entries,
            broken_at=check.broken_at,
            head_hash=check.head_hash,
            reason=check.reason,
        )


def _encode(entry: AuditEntry) -> pb.AuditEntry:
    message = pb.AuditEntry(
        number=entry.number,
        principal=entry.principal,
        method=entry.method,
        model=entry.model,
        outcome=entry.outcome,
        detail=entry.detail,
        hash=entry.hash,
        server=entry.server,
    )
    encode_time(entry.time, message.time)
    return message
