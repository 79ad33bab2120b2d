"""The calls of the services Access and Audit."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from aiorch_proto.admin.v1 import access_pb2 as pb
from aiorch_proto.admin.v1 import audit_pb2

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
from aiorch_client.admin.calls import Call, ListCall, forget
from aiorch_client.admin.messages import (
    decode_audit_check,
    decode_audit_entry,
    decode_binding,
    decode_identity,
    decode_key,
    decode_new_key,
    decode_permission,
    decode_quota,
    encode_role,
    write_time,
)


def who_am_i() -> Call[Identity]:
    """Who the caller is."""
    return Call("Access.WhoAmI", pb.WhoAmIRequest(), decode_identity)


def list_permissions() -> Call[tuple[Permission, ...]]:
    """Each call with the role that it needs."""

    def decode(message: pb.ListPermissionsResponse) -> tuple[Permission, ...]:
        return tuple(decode_permission(each) for each in message.permissions)

    return Call("Access.ListPermissions", pb.ListPermissionsRequest(), decode)


def list_bindings(principal: str) -> ListCall[RoleBinding]:
    """Roles of one caller, or of all."""
    request = pb.ListRoleBindingsRequest(principal=principal)
    return ListCall("Access.ListRoleBindings", request, "bindings", decode_binding)


def grant(principal: str, role: Role, models: str) -> Call[RoleBinding]:
    """Gives a role."""
    request = pb.GrantRoleRequest(principal=principal, role=encode_role(role), models=models)
    return Call("Access.GrantRole", request, decode_binding)


def revoke(id: str) -> Call[None]:
    """Takes a role away."""
    return Call("Access.RevokeRole", pb.RevokeRoleRequest(id=id), forget)


def create_key(principal: str, tenant: str, description: str, expires_at: datetime | None) -> Call[NewApiKey]:
    """Makes a key."""
    request = pb.CreateApiKeyRequest(principal=principal, tenant=tenant, description=description)
    if expires_at is not None:
        write_time(expires_at, request.expires_at)
    return Call("Access.CreateApiKey", request, decode_new_key)


def list_keys(principal: str) -> ListCall[ApiKey]:
    """Keys of one caller, or of all."""
    return ListCall("Access.ListApiKeys", pb.ListApiKeysRequest(principal=principal), "keys", decode_key)


def revoke_key(id: str) -> Call[None]:
    """From then on the key opens nothing."""
    return Call("Access.RevokeApiKey", pb.RevokeApiKeyRequest(id=id), forget)


def get_quota(tenant: str) -> Call[Quota]:
    """A tenant's bounds."""
    return Call("Access.GetQuota", pb.GetQuotaRequest(tenant=tenant), decode_quota)


def list_quotas() -> ListCall[Quota]:
    """All bounds."""
    return ListCall("Access.ListQuotas", pb.ListQuotasRequest(), "quotas", decode_quota)


def set_quota(
    tenant: str, requests_per_s: float | None, rows_per_s: float | None, max_in_flight: int | None
) -> Call[Quota]:
    """Changes the bounds that are not None."""
    bounds = {"requests_per_s": requests_per_s, "rows_per_s": rows_per_s, "max_in_flight": max_in_flight}
    given: dict[str, Any] = {name: value for name, value in bounds.items() if value is not None}
    request = pb.SetQuotaRequest(quota=pb.Quota(tenant=tenant, **given))
    request.update_mask.paths.extend(given)
    return Call("Access.SetQuota", request, decode_quota)


def query_audit(
    principal: str, model: str, method: str, since: datetime | None, until: datetime | None
) -> ListCall[AuditEntry]:
    """What was done, the newest first."""
    request = audit_pb2.QueryAuditRequest(principal=principal, model=model, method=method)
    if since is not None:
        write_time(since, request.since)
    if until is not None:
        write_time(until, request.until)
    return ListCall("Audit.QueryAudit", request, "entries", decode_audit_entry)


def verify_audit(known_number: int, known_hash: str) -> Call[AuditCheck]:
    """Computes the chain anew."""
    request = audit_pb2.VerifyAuditRequest(known_number=known_number, known_hash=known_hash)
    return Call("Audit.VerifyAudit", request, decode_audit_check)
