"""Who calls, and what they may do: identities, roles on model names, quotas."""

from aiorch_server.security.identity import ANYBODY, AuthMethod, Principal, RoleBinding
from aiorch_server.security.roles import Role

__all__ = ["ANYBODY", "AuthMethod", "Principal", "Role", "RoleBinding"]
