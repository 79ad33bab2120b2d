"""Uploads as the database knows them; their bytes are the store's. See models.py for what these functions share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from aiorch_server.errors import Conflict, NotFoundError, RequestError
from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.names import check_sha256, check_short, show
from aiorch_server.registry.schema import uploads


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload: ``version`` is 0 until it is done; ``detail`` is what uploads.py keeps of it."""

    model: str
    upload_id: str
    archive_format: str
    size_bytes: int
    sha256: str
    created_at: datetime
    created_by: str
    expires_at: datetime
    received_bytes: int = 0
    version: int = 0
    detail: Mapping[str, Any] = field(default_factory=dict)


def begin_upload(
    session: Session,
    model: str,
    upload_id: str,
    *,
    archive_format: str,
    size_bytes: int,
    sha256: str,
    actor: str,
    expiry_s: float,
    detail: Mapping[str, Any] | None = None,
) -> Upload:
    """The upload, new or as it stands; Conflict where one of that id is of another archive or somebody else's."""
    check_short(upload_id, "upload_id", 128)
    check_sha256(sha256, "the archive's sha256")
    if size_bytes < 0:
        raise RequestError(f"found {size_bytes} as size_bytes; it should be 0 or more")
    now = read_clock(session)
    found = find_upload(session, model, upload_id)
    if found is not None and found.expires_at <= now:
        drop_upload(session, model, upload_id)
        found = None
    if found is not None:
        known = (found.archive_format, found.size_bytes, found.sha256, found.created_by)
        if known != (archive_format, size_bytes, sha256, actor):
            raise Conflict(f"upload {show(upload_id)} of model {model!r} is of another archive: choose another id")
        return found
    row = {
        "model": model,
        "upload_id": upload_id,
        "archive_format": check_short(archive_format, "an archive's format", 16),
        "size_bytes": size_bytes,
        "sha256": sha256,
        "received_bytes": 0,
        "version": 0,
        "detail": dict(detail or {}),
        "created_at": now,
        "created_by": actor,
        "expires_at": now + timedelta(seconds=expiry_s),
    }
    session.execute(insert(uploads).values(row))
    return get_upload(session, model, upload_id)


def get_upload(session: Session, model: str, upload_id: str) -> Upload:
    """The upload; NotFoundError."""
    found = find_upload(session, model, upload_id)
    if found is None:
        raise NotFoundError(f"model {show(model)} has no upload {show(upload_id)}")
    return found


def find_upload(session: Session, model: str, upload_id: str) -> Upload | None:
    """The upload, None where there is none."""
    is_it = (uploads.c.model == model, uploads.c.upload_id == upload_id)
    row = session.execute(select(uploads).where(*is_it)).first()
    return None if row is None else Upload(**row._mapping)


def advance_upload(
    session: Session,
    model: str,
    upload_id: str,
    *,
    received_bytes: int | None = None,
    version: int | None = None,
    detail: Mapping[str, Any] | None = None,
) -> Upload:
    """Writes down how far an upload is, or what became of it; NotFoundError."""
    given = {"received_bytes": received_bytes, "version": version, "detail": None if detail is None else dict(detail)}
    values = {name: value for name, value in given.items() if value is not None}
    if values:
        is_it = (uploads.c.model == model, uploads.c.upload_id == upload_id)
        session.execute(update(uploads).where(*is_it).values(values))
    return get_upload(session, model, upload_id)


def drop_upload(session: Session, model: str, upload_id: str) -> None:
    """Forgets an upload; nothing happens where there is none."""
    session.execute(delete(uploads).where(uploads.c.model == model, uploads.c.upload_id == upload_id))


def read_expired_uploads(session: Session) -> tuple[Upload, ...]:
    """Those whose time is over, done or not."""
    query = select(uploads).where(uploads.c.expires_at <= read_clock(session)).order_by(uploads.c.expires_at)
    return tuple(Upload(**row._mapping) for row in session.execute(query))


def read_open_uploads(session: Session, actor: str) -> tuple[Upload, ...]:
    """Those that somebody has begun and not finished, and that are not over."""
    is_open = (uploads.c.created_by == actor, uploads.c.version == 0, uploads.c.expires_at > read_clock(session))
    return tuple(Upload(**row._mapping) for row in session.execute(select(uploads).where(*is_open)))
