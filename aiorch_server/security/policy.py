"""Which roles somebody has: those of the settings, of the registry, and of the credentials themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from aiorch_server.security.authenticator import Identity
from aiorch_server.security.identity import Principal, RoleBinding

#: Begins the name of a binding that holds for all members of a group.
GROUP: Final = "group:"


class Policy:
    """Bindings by the names that they are for; ``fixed`` ones stay, others are replaced as a whole."""

    def __init__(self, fixed: Iterable[RoleBinding] = ()) -> None:
        self._fixed = tuple(fixed)
        self._by_name: dict[str, tuple[RoleBinding, ...]] = {}
        self.replace(())

    def replace(self, bindings: Iterable[RoleBinding]) -> bool:
        """From now on these hold beside the fixed ones; whether anything has changed."""
        by_name: dict[str, tuple[RoleBinding, ...]] = {}
        for each in (*self._fixed, *bindings):
            by_name[each.principal] = (*by_name.get(each.principal, ()), each)
        has_changed = by_name != self._by_name
        self._by_name = by_name
        return has_changed

    def bind(self, identity: Identity) -> Principal:
        """The caller with all its roles."""
        return Principal(
            name=identity.name,
            tenant=identity.tenant or identity.name,
            method=identity.method,
            bindings=(*self._find(identity.name), *self._find_groups(identity.groups), *identity.roles),
            groups=identity.groups,
            expires_ns=identity.expires_ns,
        )

    def _find(self, name: str) -> Sequence[RoleBinding]:
        return self._by_name.get(name, ())

    def _find_groups(self, groups: Iterable[str]) -> Iterable[RoleBinding]:
        return (binding for group in groups for binding in self._find(GROUP + group))
