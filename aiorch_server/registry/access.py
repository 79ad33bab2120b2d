"""Role grants, API keys and quotas. See models.py for what all of these functions share.

Each change counts up ``access_revision``, by which servers see that what they remember is old.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import asdict, dataclass
from datetime import datetime
from math import isfinite
from typing import Any, Final

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.orm import Session

from aiorch_server.errors import NotFoundError, RequestError
from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.names import check_sha256, check_short, check_text, show
from aiorch_server.registry.paging import read_page
from aiorch_server.registry.records import Page
from aiorch_server.registry.rows import count_up, put_row, read_counter
from aiorch_server.registry.schema import api_keys, grants, quotas

COUNTER: Final = "access"
_KEY = re.compile(r"[A-Za-z0-9-]{1,36}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Grant:
    """A role (by its number) on the models whose names fit ``models``, for a principal or ``group:NAME``."""

    id: str
    principal: str
    role: int
    models: str
    created_at: datetime
    created_by: str


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key by its public part; ``secret`` is a digest of its other part, in hex."""

    id: str
    secret: str
    principal: str
    tenant: str
    description: str
    created_at: datetime
    created_by: str
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Quota:
    """Bounds for a tenant, on each server; 0: none."""

    tenant: str
    requests_per_s: float = 0.0
    rows_per_s: float = 0.0
    max_in_flight: int = 0


def access_revision(session: Session) -> int:
    """Counts the changes of grants, keys and quotas."""
    return read_counter(session, COUNTER)


def grant_role(session: Session, principal: str, role: int, models: str, *, actor: str) -> Grant:
    """Gives a role; the same grant again is the one that is there."""
    check_short(principal, "principal")
    check_short(models, "models")
    if not 1 <= role <= 4:
        raise RequestError(f"found {role} as a role; it should be 1 to 4")
    same = (grants.c.principal == principal, grants.c.role == role, grants.c.models == models)
    row = session.execute(select(grants).where(*same)).first()
    if row is not None:
        return Grant(**row._mapping)
    grant = Grant(str(uuid.uuid4()), principal, role, models, read_clock(session), actor)
    session.execute(insert(grants).values(asdict(grant)))
    count_up(session, COUNTER)
    return grant


def revoke_role(session: Session, id: str) -> Grant:
    """Takes a grant away and gives what it was; NotFoundError."""
    row = session.execute(select(grants).where(grants.c.id == id)).first()
    if row is None:
        raise NotFoundError(f"there is no role binding {show(id)}")
    session.execute(delete(grants).where(grants.c.id == id))
    count_up(session, COUNTER)
    return Grant(**row._mapping)


def list_grants(session: Session, principal: str = "", *, size: int = 0, token: str = "") -> Page[Grant]:
    """Grants to a principal (empty: all), in the order of their ids."""
    query = select(grants) if not principal else select(grants).where(grants.c.principal == principal)
    return read_page(
        session,
        query,
        grants.c.id,
        size=size,
        token=token,
        scope=("grants", principal),
        build=lambda rows: [Grant(**row._mapping) for row in rows],
    )


def read_grants(session: Session) -> tuple[Grant, ...]:
    """All grants: what a server decides by."""
    return tuple(Grant(**row._mapping) for row in session.execute(select(grants).order_by(grants.c.id)))


def add_api_key(
    session: Session,
    id: str,
    secret: str,
    *,
    principal: str,
    actor: str,
    tenant: str = "",
    description: str = "",
    expires_at: datetime | None = None,
) -> ApiKey:
    """Keeps a new key, of whose secret part only the digest comes here."""
    key = ApiKey(
        id=_check_key(id),
        secret=check_sha256(secret, "a key's digest"),
        principal=check_short(principal, "principal"),
        tenant=check_short(tenant, "tenant", may_be_empty=True),
        description=check_text(description, "description"),
        created_at=read_clock(session),
        created_by=actor,
        expires_at=expires_at,
    )
    session.execute(insert(api_keys).values(asdict(key)))
    count_up(session, COUNTER)
    return key


def find_api_key(session: Session, id: str) -> ApiKey | None:
    """The key of that id, revoked, expired or not."""
    if not _KEY.fullmatch(id):
        return None
    row = session.execute(select(api_keys).where(api_keys.c.id == id)).first()
    return None if row is None else ApiKey(**row._mapping)


def revoke_api_key(session: Session, id: str) -> ApiKey:
    """From now on it opens nothing; NotFoundError. Once more changes nothing."""
    key = find_api_key(session, id)
    if key is None:
        raise NotFoundError(f"there is no API key {show(id)}")
    if key.revoked_at is None:
        session.execute(update(api_keys).where(api_keys.c.id == id).values(revoked_at=read_clock(session)))
        count_up(session, COUNTER)
    return find_api_key(session, id) or key


def list_api_keys(session: Session, principal: str = "", *, size: int = 0, token: str = "") -> Page[ApiKey]:
    """Keys of a principal (empty: all), in the order of their ids."""
    query = select(api_keys) if not principal else select(api_keys).where(api_keys.c.principal == principal)
    return read_page(
        session,
        query,
        api_keys.c.id,
        size=size,
        token=token,
        scope=("api keys", principal),
        build=lambda rows: [ApiKey(**row._mapping) for row in rows],
    )


def get_quota(session: Session, tenant: str) -> Quota:
    """A tenant's quota; without any bound where none was set."""
    row = session.execute(select(quotas).where(quotas.c.tenant == tenant)).first()
    return Quota(tenant) if row is None else _build_quota(row)


def set_quota(session: Session, quota: Quota) -> Quota:
    """Sets all bounds of a tenant; RequestError for what is no bound."""
    check_short(quota.tenant, "tenant")
    for name in ("requests_per_s", "rows_per_s", "max_in_flight"):
        value = getattr(quota, name)
        if not isfinite(value) or not 0 <= value < 2**63:
            raise RequestError(f"found {value} as {name}; it should be 0 (no bound) or more")
    values = asdict(quota)
    put_row(session, quotas, {"tenant": values.pop("tenant")}, values)
    count_up(session, COUNTER)
    return quota


def list_quotas(session: Session, *, size: int = 0, token: str = "") -> Page[Quota]:
    """Quotas by tenant."""
    return read_page(
        session,
        select(quotas),
        quotas.c.tenant,
        size=size,
        token=token,
        scope=("quotas",),
        build=lambda rows: [_build_quota(row) for row in rows],
    )


def read_quotas(session: Session) -> tuple[Quota, ...]:
    """All quotas: what a server enforces."""
    return tuple(_build_quota(row) for row in session.execute(select(quotas).order_by(quotas.c.tenant)))


def _check_key(id: str) -> str:
    if not _KEY.fullmatch(id):
        raise RequestError(f"found {show(id)} as a key's id; it should be at most 36 of the characters A-Z a-z 0-9 -")
    return id


def _build_quota(row: Row[Any]) -> Quota:
    return Quota(row.tenant, float(row.requests_per_s), float(row.rows_per_s), row.max_in_flight)
