"""Who calls, and what they may do: identities, roles on model names, quotas."""

from aiorch_server.security.access import UNRESTRICTED, Access, current_access, keep_seen, permit, sees
from aiorch_server.security.authenticator import Authenticator, Credentials, Identity
from aiorch_server.security.identity import ANYBODY, AuthMethod, Principal, RoleBinding, current_principal
from aiorch_server.security.permissions import TABLE, Permission, Scope
from aiorch_server.security.roles import Role

__all__ = [
    "ANYBODY",
    "TABLE",
    "UNRESTRICTED",
    "Access",
    "AuthMethod",
    "Authenticator",
    "Credentials",
    "Identity",
    "Permission",
    "Principal",
    "Role",
    "RoleBinding",
    "Scope",
    "current_access",
    "current_principal",
    "keep_seen",
    "permit",
    "sees",
]
