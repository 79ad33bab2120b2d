"""Callers, keys, quotas and the audit log, awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator
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
from aiorch_client.admin.aio.connection import AsyncAdminConnection


class AsyncAccessMethods(AsyncAdminConnection):
    """The calls of the services Access and Audit."""

    async def who_am_i(self, *, timeout_s: float | None = None) -> Identity:
        """As ``AdminClient.who_am_i``."""
        return await self._call(access_calls.who_am_i(), timeout_s)

    async def list_permissions(self, *, timeout_s: float | None = None) -> tuple[Permission, ...]:
        """As ``AdminClient.list_permissions``."""
        return await self._call(access_calls.list_permissions(), timeout_s)

    def list_bindings(self, principal: str = "", *, timeout_s: float | None = None) -> AsyncIterator[RoleBinding]:
        """As ``AdminClient.list_bindings``."""
        return self._list(access_calls.list_bindings(principal), timeout_s)

    async def grant(
        self, principal: str, role: Role, models: str = "*", *, timeout_s: float | None = None
    ) -> RoleBinding:
        """As ``AdminClient.grant``."""
        return await self._call(access_calls.grant(principal, role, models), timeout_s)

    async def revoke(self, id: str, *, timeout_s: float | None = None) -> None:
        """As ``AdminClient.revoke``."""
        await self._call(access_calls.revoke(id), timeout_s)

    async def create_key(
        self,
        principal: str,
        *,
        tenant: str = "",
        description: str = "",
        expires_at: datetime | None = None,
        timeout_s: float | None = None,
    ) -> NewApiKey:
        """As ``AdminClient.create_key``."""
        return await self._call(access_calls.create_key(principal, tenant, description, expires_at), timeout_s)

    def list_keys(self, principal: str = "", *, timeout_s: float | None = None) -> AsyncIterator[ApiKey]:
        """As ``AdminClient.list_keys``."""
        return self._list(access_calls.list_keys(principal), timeout_s)

    async def revoke_key(self, id: str, *, timeout_s: float | None = None) -> None:
        """As ``AdminClient.revoke_key``."""
        await self._call(access_calls.revoke_key(id), timeout_s)

    async def get_quota(self, tenant: str, *, timeout_s: float | None = None) -> Quota:
        """As ``AdminClient.get_quota``."""
        return await self._call(access_calls.get_quota(tenant), timeout_s)

    def list_quotas(self, *, timeout_s: float | None = None) -> AsyncIterator[Quota]:
        """As ``AdminClient.list_quotas``."""
        return self._list(access_calls.list_quotas(), timeout_s)

    async def set_quota(
        self,
        tenant: str,
        *,
        requests_per_s: float | None = None,
        rows_per_s: float | None = None,
        max_in_flight: int | None = None,
        timeout_s: float | None = None,
    ) -> Quota:
        """As ``AdminClient.set_quota``."""
        return await self._call(access_calls.set_quota(tenant, requests_per_s, rows_per_s, max_in_flight), timeout_s)

    def query_audit(
        self,
        *,
        principal: str = "",
        model: str = "",
        method: str = "",
        since: datetime | None = None,
        until: datetime | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[AuditEntry]:
        """As ``AdminClient.query_audit``."""
        return self._list(access_calls.query_audit(principal, model, method, since, until), timeout_s)

    async def verify_audit(
        self, *, known_number: int = 0, known_hash: str = "", timeout_s: float | None = None
    ) -> AuditCheck:
        """As ``AdminClient.verify_audit``."""
        return await self._call(access_calls.verify_audit(known_number, known_hash), timeout_s)
