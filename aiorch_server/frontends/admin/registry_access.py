"""What the registry knows of callers, for the gate of the doors."""

from __future__ import annotations

import calendar
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from aiorch_server.registry import access
from aiorch_server.security.api_keys import KnownKey
from aiorch_server.security.identity import RoleBinding
from aiorch_server.security.quotas import QuotaBounds
from aiorch_server.security.roles import Role

if TYPE_CHECKING:
    from aiorch_server.registry.database import Database
    from aiorch_server.registry.session import Session


class RegistryAccess:
    """Role bindings, quotas and API keys of ``database``: RoleSource of the gate, ApiKeys of its authenticator."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def read_generation(self) -> int:
        """See RoleSource."""
        return await self._database.read(access.access_revision)

    async def read_rules(self) -> tuple[Sequence[RoleBinding], Sequence[QuotaBounds]]:
        """See RoleSource."""

        def work(session: Session) -> tuple[Sequence[RoleBinding], Sequence[QuotaBounds]]:
            bindings = [
                RoleBinding(each.principal, Role(each.role), each.models, each.id)
                for each in access.read_grants(session)
            ]
            bounds = [
                QuotaBounds(each.tenant, each.requests_per_s, each.rows_per_s, each.max_in_flight).fit()
                for each in access.read_quotas(session)
            ]
            return bindings, bounds

        return await self._database.read(work)

    async def find_key(self, id: str) -> KnownKey | None:
        """See ApiKeys."""
        key = await self._database.read(lambda session: access.find_api_key(session, id))
        if key is None or key.revoked_at is not None:
            return None
        expires_ns = 0 if key.expires_at is None else _count_ns(key.expires_at)
        return KnownKey(key.id, bytes.fromhex(key.secret), key.principal, key.tenant, expires_ns)


def _count_ns(time: datetime) -> int:
    return calendar.timegm(time.utctimetuple()) * 10**9 + time.microsecond * 1000
