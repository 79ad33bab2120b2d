"""Callers, keys, quotas and the audit log, as the admin client gives and takes them.

The shapes of proto/aiorch/admin/v1/access.proto and audit.proto. Times are aware, in UTC.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime


class Role(enum.StrEnum):
    """From least to most; each may do what those before it may."""

    UNSPECIFIED = "unspecified"
    VIEWER = "viewer"
    CLIENT = "client"
    DEPLOYER = "deployer"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class RoleBinding:
    """A role of ``principal`` (or ``group:NAME``) on the models whose names fit ``models``."""

    id: str
    principal: str
    role: Role
    models: str
    created_at: datetime | None
    created_by: str


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the server takes the caller for; ``method`` is certificate, token, api-key or none."""

    principal: str
    tenant: str
    method: str
    bindings: tuple[RoleBinding, ...]
    groups: tuple[str, ...]
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Permission:
    """A call of the protocols with the role that it needs."""

    method: str
    role: Role


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret; ``expires_at`` None: it does not."""

    id: str
    principal: str
    tenant: str
    description: str
    created_at: datetime | None
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """A key that was just made; nobody can read its ``secret`` again. It is not in the ``repr``."""

    key: ApiKey
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Quota:
    """Bounds for one tenant, on each server; 0: none."""

    tenant: str
    requests_per_s: float = 0.0
    rows_per_s: float = 0.0
    max_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """What was done, by whom, with what outcome; ``detail`` is JSON."""

    number: int
    time: datetime | None
    principal: str
    method: str
    model: str
    outcome: str
    detail: str
    hash: str
    server: str


@dataclass(frozen=True, slots=True)
class AuditCheck:
    """Whether the chain of the audit log holds; ``broken_at`` is the first entry that does not agree, or 0."""

    is_intact: bool
    entries: int
    broken_at: int
    head_hash: str
    reason: str
