"""A caller, as all parts see it."""

from __future__ import annotations

import enum
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from aiorch_server.security.roles import Role, matches


class AuthMethod(enum.StrEnum):
    """How a caller said who it is."""

    NONE = "none"
    CERTIFICATE = "certificate"
    TOKEN = "token"
    API_KEY = "api-key"


@dataclass(frozen=True, slots=True)
class RoleBinding:
    """A role on the models whose names fit ``models`` (``*`` stands for any characters)."""

    principal: str
    role: Role
    models: str = "*"
    id: str = ""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: a name, the tenant whose quota counts, and what it may do.

    ``expires_ns`` is absolute on the wall clock, 0 for never. ``bindings`` are those of its name and its groups.
    """

    name: str
    tenant: str = ""
    method: AuthMethod = AuthMethod.NONE
    bindings: tuple[RoleBinding, ...] = ()
    groups: tuple[str, ...] = ()
    expires_ns: int = 0

    def may(self, role: Role, model: str = "") -> bool:
        """Whether it holds ``role`` or a higher one on ``model``; without a model: on all of them.

        What concerns no single model (lists, the server's own state) is asked with ``may_anywhere``.
        """
        wanted = model or "*"
        return any(each.role >= role and (each.models == "*" or matches(each.models, wanted)) for each in self.bindings)

    def may_anywhere(self, role: Role) -> bool:
        """Whether it holds ``role`` or a higher one on some model."""
        return any(each.role >= role for each in self.bindings)


#: The caller of a server that asks nobody who it is: it may do everything.
ANYBODY: Final = Principal("anybody", bindings=(RoleBinding("anybody", Role.ADMIN),))
#: The caller of the call that this task serves.
current_principal: ContextVar[Principal] = ContextVar("current_principal", default=ANYBODY)
