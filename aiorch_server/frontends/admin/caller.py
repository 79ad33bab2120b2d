"""Who makes an admin call, and whether they may: asked of the table of permissions before anything is looked up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from aiorch_proto.admin.v1.service import Method

from aiorch_server.errors import PermissionDenied
from aiorch_server.frontends.admin.fields import InvalidField, check_texts
from aiorch_server.registry.names import check_model_name, not_registered
from aiorch_server.security.access import Access, current_access
from aiorch_server.security.permissions import TABLE, Permission

#: Calls that make a model: they name one that need not exist, so there is nothing to hide.
_MAKERS = ("RegisterModel",)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, under the name that events and the audit log speak of; good on any thread."""

    name: str
    access: Access

    @classmethod
    def current(cls) -> Caller:
        """The one whose call this task serves."""
        access = current_access.get()
        return cls(access.principal.name, access)

    @property
    def sees(self) -> Callable[[str], bool]:
        """Tells whether they may know that there is a model of that name; "" stands for what concerns none."""
        return self.access.sees

    def require_model(self, model: str) -> None:
        """NotFoundError, as for a model that does not exist, where they may not see it; else PermissionDenied."""
        if not self.access.permit(model):
            raise not_registered(model)


def find_permission(method: Method) -> Permission:
    """What the method needs; PermissionDenied where the table does not have it."""
    permission = TABLE.get(method.path)
    if permission is None:
        raise PermissionDenied(f"nobody may call {method.path}: it is not in the table of permissions")
    return permission


def read_field(request: Any, path: str) -> str:
    """The text in a field of the request, with dots where it lies deeper."""
    return str(reduce(getattr, path.split("."), request))


def authorize(method: Method, request: Any) -> None:
    """Raises unless the caller of this task may make this call; also for names and texts that nothing can have."""
    check_texts(request)
    caller, permission = Caller.current(), find_permission(method)
    if not permission.field:
        caller.sees("")  # it has been asked for what it may do: lists show what the caller may see
        return
    name = read_field(request, permission.field)
    if not name:
        raise InvalidField(permission.field, "is empty; expected the name of a model")
    if method.name in _MAKERS and not caller.sees(name):
        raise PermissionDenied(f"'{caller.name}' needs the role deployer on model '{name[:255]}' for {method.path}")
    caller.require_model(name)
    check_model_name(name)
