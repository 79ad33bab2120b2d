"""What the call that a task serves may do: what the planes ask before they look a model up.

Doors set ``current_access``; the server's own tasks, and calls between models, have that of a server which asks nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Final, Protocol, TypeVar

from aiorch_server._core import Quota
from aiorch_server.errors import PermissionDenied
from aiorch_server.security.authenticator import Credentials
from aiorch_server.security.identity import ANYBODY, Principal
from aiorch_server.security.permissions import Permission, Scope
from aiorch_server.security.quotas import NO_SHARE, TenantShare
from aiorch_server.security.roles import Role


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Item = TypeVar("_Item", bound=_Named)
_NO_CREDENTIALS: Final = Credentials()


class Access:
    """A caller in one call: who, and what the call needs; ``permission`` None: everything is allowed.

    ``principal`` may be replaced while a long call runs (Gate.renew). ``has_asked`` tells whether a model was asked
    for: the answer of a call that names one, and whose code never asked, is held back. ``model`` is the last that was
    permitted. ``quota`` counts the requests of the caller's tenant, None where it has no bounds; ``share`` is how
    queues know that tenant.
    """

    __slots__ = ("credentials", "generation", "has_asked", "model", "permission", "principal", "quota", "share")

    def __init__(
        self,
        principal: Principal,
        permission: Permission | None = None,
        credentials: Credentials = _NO_CREDENTIALS,
        generation: int = 0,
        quota: Quota | None = None,
        share: TenantShare = NO_SHARE,
    ) -> None:
        self.principal = principal
        self.permission = permission
        self.credentials = credentials
        self.generation = generation
        self.quota = quota
        self.share = share
        self.has_asked = False
        self.model = ""

    def sees(self, model: str) -> bool:
        """Whether the caller may know that there is such a model."""
        self.has_asked = True
        return self.permission is None or self.principal.may(Role.VIEWER, model)

    def permit(self, model: str, *, changes: bool = False) -> bool:
        """Whether to go on with ``model``; False: answer as if there were none of that name.

        PermissionDenied for a caller who may see the model, and not do this with it. ``changes``: the call changes what
        the same call without changes only reads.
        """
        self.has_asked = True
        permission = self.permission
        if permission is None:
            return True
        role = permission.change_role if changes else permission.role
        if permission.scope is Scope.MODEL and role is not None and self.principal.may(role, model):
            self.model = model
            return True
        if not self.principal.may(Role.VIEWER, model):
            return False
        raise PermissionDenied(
            f"'{self.principal.name}' needs the role {_name(role)} on model '{model}' for {permission.call}"
        )

    def require_everywhere(self, role: Role) -> None:
        """PermissionDenied unless the caller holds ``role`` on all models."""
        self.has_asked = True
        if self.permission is not None and not self.principal.may(role):
            raise PermissionDenied(
                f"'{self.principal.name}' needs the role {_name(role)} on all models for {self.permission.call}"
            )

    def find_model(self, request: object) -> str:
        """The model that a request names, for calls whose permission says in which field."""
        found = request
        for step in self.permission.field.split(".") if self.permission is not None else ():
            found = getattr(found, step)
        return found if isinstance(found, str) else ""

    @property
    def is_complete(self) -> bool:
        """Whether what the call needs was asked for; what answers otherwise is held back."""
        return self.has_asked or self.permission is None or self.permission.scope is not Scope.MODEL


#: The access of everybody where nobody is asked who it is.
UNRESTRICTED: Final = Access(ANYBODY)
#: What the call that this task serves may do.
current_access: ContextVar[Access] = ContextVar("current_access", default=UNRESTRICTED)


def sees(model: str) -> bool:
    """Whether the caller of this task may know that there is such a model."""
    return current_access.get().sees(model)


def keep_seen(items: Iterable[_Item]) -> list[_Item]:
    """Of what has a model's name, what the caller of this task may know of."""
    access = current_access.get()
    access.has_asked = True
    return [each for each in items if access.sees(each.name)]


def permit(model: str, *, changes: bool = False) -> bool:
    """``Access.permit`` of the call that this task serves."""
    return current_access.get().permit(model, changes=changes)


def _name(role: Role | None) -> str:
    return role.name.lower() if role is not None else "admin"
