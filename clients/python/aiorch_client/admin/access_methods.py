"""Callers, keys, quotas and the audit log, blocking."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from aiorch_client.admin import access_calls
from aiorch_client.admin.access_types import (
    ApiKey,
    AuditCheck,
    AuditEntry,
    Identity,
    NewApiKey,
    Permission,
    Quota,
    Role,
    RoleBinding,
)
from aiorch_client.admin.connection import AdminConnection


class AccessMethods(AdminConnection):
    """The calls of the services Access and Audit."""

    def who_am_i(self, *, timeout_s: float | None = None) -> Identity:
        """Who the server takes the caller for."""
        return self._call(access_calls.who_am_i(), timeout_s)

    def list_permissions(self, *, timeout_s: float | None = None) -> tuple[Permission, ...]:
        """Each call of the protocols with the role that it needs."""
        return self._call(access_calls.list_permissions(), timeout_s)

    def list_bindings(self, principal: str = "", *, timeout_s: float | None = None) -> Iterator[RoleBinding]:
        """Roles of one caller, or of all."""
        return self._list(access_calls.list_bindings(principal), timeout_s)

    def grant(self, principal: str, role: Role, models: str = "*", *, timeout_s: float | None = None) -> RoleBinding:
        """Gives a caller, or ``group:NAME``, a role on the models whose names fit ``models``."""
        return self._call(access_calls.grant(principal, role, models), timeout_s)

    def revoke(self, id: str, *, timeout_s: float | None = None) -> None:
        """Takes the role away that a binding gives."""
        self._call(access_calls.revoke(id), timeout_s)

    def create_key(
        self,
        principal: str,
        *,
        tenant: str = "",
        description: str = "",
        expires_at: datetime | None = None,
        timeout_s: float | None = None,
    ) -> NewApiKey:
        """Makes an API key; its secret is in this answer alone, and empty where that had to be asked for again."""
        return self._call(access_calls.create_key(principal, tenant, description, expires_at), timeout_s)

    def list_keys(self, principal: str = "", *, timeout_s: float | None = None) -> Iterator[ApiKey]:
        """Keys of one caller, or of all; without their secrets."""
        return self._list(access_calls.list_keys(principal), timeout_s)

    def revoke_key(self, id: str, *, timeout_s: float | None = None) -> None:
        """From then on the key opens nothing."""
        self._call(access_calls.revoke_key(id), timeout_s)

    def get_quota(self, tenant: str, *, timeout_s: float | None = None) -> Quota:
        """A tenant's bounds."""
        return self._call(access_calls.get_quota(tenant), timeout_s)

    def list_quotas(self, *, timeout_s: float | None = None) -> Iterator[Quota]:
        """The bounds of all tenants that have some."""
        return self._list(access_calls.list_quotas(), timeout_s)

    def set_quota(
        self,
        tenant: str,
        *,
        requests_per_s: float | None = None,
        rows_per_s: float | None = None,
        max_in_flight: int | None = None,
        timeout_s: float | None = None,
    ) -> Quota:
        """Changes the bounds that are not None; 0 takes one away."""
        return self._call(access_calls.set_quota(tenant, requests_per_s, rows_per_s, max_in_flight), timeout_s)

    def query_audit(
        self,
        *,
        principal: str = "",
        model: str = "",
        method: str = "",
        since: datetime | None = None,
        until: datetime | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[AuditEntry]:
        """What was done, the newest first; asks for page after page."""
        return self._list(access_calls.query_audit(principal, model, method, since, until), timeout_s)

    def verify_audit(
        self, *, known_number: int = 0, known_hash: str = "", timeout_s: float | None = None
    ) -> AuditCheck:
        """Computes the chain anew; ``known_number`` must have ``known_hash``, where that was written down elsewhere."""
        return self._call(access_calls.verify_audit(known_number, known_hash), timeout_s)
