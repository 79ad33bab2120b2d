"""Who may do what: role bindings, API keys and quotas of the registry."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from aiorch_proto.admin.v1 import access_pb2 as pb

from aiorch_server.frontends.admin.caller import Caller
from aiorch_server.frontends.admin.fields import InvalidField, check_range, choose_paths, encode_time, read_time
from aiorch_server.frontends.admin.pages import encode_page
from aiorch_server.registry import access
from aiorch_server.security.api_keys import make_key
from aiorch_server.security.identity import RoleBinding
from aiorch_server.security.permissions import TABLE
from aiorch_server.security.quotas import MAX_PER_S, MAX_TENANT_BYTES, MIN_PER_S
from aiorch_server.security.roles import Role

if TYPE_CHECKING:
    from aiorch_server.registry.session import Session

_BOUNDS: Final = ("requests_per_s", "rows_per_s", "max_in_flight")


class AccessServicer:
    """The service Access; methods with a session are operations on the registry's database."""

    async def WhoAmI(self, request: Any, context: Any) -> pb.Identity:
        """The caller, as this server knows it."""
        principal = Caller.current().access.principal
        message = pb.Identity(
            principal=principal.name,
            tenant=principal.tenant,
            method=principal.method.value,
            bindings=map(_encode_own, principal.bindings),
            groups=principal.groups,
        )
        if principal.expires_ns:
            message.expires_at.FromNanoseconds(principal.expires_ns)
        return message

    async def ListPermissions(self, request: Any, context: Any) -> pb.ListPermissionsResponse:
        """Each gRPC call of this server with the least role that it needs; no role: any caller who is known."""
        response = pb.ListPermissionsResponse()
        for call, permission in TABLE.items():
            if call.startswith("/"):
                response.permissions.add(method=call, role=permission.role or pb.ROLE_UNSPECIFIED)
        return response

    def ListRoleBindings(self, session: Session, request: Any, caller: Caller) -> pb.ListRoleBindingsResponse:
        """A page of the registry's bindings; those of the server's settings are not among them."""
        page = access.list_grants(session, request.principal, size=request.page_size, token=request.page_token)
        return encode_page(pb.ListRoleBindingsResponse(), "bindings", page, _encode_grant)

    def GrantRole(self, session: Session, request: Any, caller: Caller) -> pb.RoleBinding:
        """Gives a role; again changes nothing."""
        if request.role not in set(Role):
            names = ", ".join(f"ROLE_{role.name}" for role in Role)
            raise InvalidField("role", f"is {request.role}; expected one of {names}")
        grant = access.grant_role(session, request.principal, request.role, request.models, actor=caller.name)
        return _encode_grant(grant)

    def RevokeRole(self, session: Session, request: Any, caller: Caller) -> pb.RevokeRoleResponse:
        """Takes a role away."""
        access.revoke_role(session, request.id)
        return pb.RevokeRoleResponse()

    def CreateApiKey(self, session: Session, request: Any, caller: Caller) -> pb.CreateApiKeyResponse:
        """Makes a key; the one answer that holds it."""
        expires_at = read_time(request, "expires_at")
        if expires_at is not None and expires_at <= datetime.now(UTC):
            raise InvalidField("expires_at", f"is {expires_at.isoformat()}; expected a time to come")
        new = make_key()
        key = access.add_api_key(
            session,
            new.id,
            new.sha256.hex(),
            principal=request.principal,
            tenant=request.tenant,
            description=request.description,
            expires_at=expires_at,
            actor=caller.name,
        )
        return pb.CreateApiKeyResponse(key=_encode_key(key), secret=new.text)

    def ListApiKeys(self, session: Session, request: Any, caller: Caller) -> pb.ListApiKeysResponse:
        """A page of the registry's keys, without what is secret of them."""
        page = access.list_api_keys(session, request.principal, size=request.page_size, token=request.page_token)
        return encode_page(pb.ListApiKeysResponse(), "keys", page, _encode_key)

    def RevokeApiKey(self, session: Session, request: Any, caller: Caller) -> pb.RevokeApiKeyResponse:
        """From now on the key opens nothing; again changes nothing."""
        access.revoke_api_key(session, request.id)
        return pb.RevokeApiKeyResponse()

    def GetQuota(self, session: Session, request: Any, caller: Caller) -> pb.Quota:
        """The quota of a tenant; without bounds where none was set."""
        if not request.tenant:
            raise InvalidField("tenant", "is empty; expected the name of a tenant")
        return _encode_quota(access.get_quota(session, request.tenant))

    def ListQuotas(self, session: Session, request: Any, caller: Caller) -> pb.ListQuotasResponse:
        """A page of the quotas that were set."""
        page = access.list_quotas(session, size=request.page_size, token=request.page_token)
        return encode_page(pb.ListQuotasResponse(), "quotas", page, _encode_quota)

    def SetQuota(self, session: Session, request: Any, caller: Caller) -> pb.Quota:
        """Sets the bounds that the mask names, and leaves the others as they were."""
        given = request.quota
        paths = choose_paths(request, given, _BOUNDS)
        before = _encode_quota(access.get_quota(session, given.tenant))
        bounds = {name: getattr(given if name in paths else before, name) for name in _BOUNDS}
        _check_quota(given.tenant, bounds)
        return _encode_quota(access.set_quota(session, access.Quota(given.tenant, **bounds)))


def _check_quota(tenant: str, bounds: dict[str, Any]) -> None:
    """InvalidField for what the servers could not count."""
    if len(tenant.encode()) > MAX_TENANT_BYTES:
        raise InvalidField("quota.tenant", f"has over {MAX_TENANT_BYTES} bytes")
    for name in ("requests_per_s", "rows_per_s"):
        if bounds[name]:
            check_range(bounds[name], f"quota.{name}", MIN_PER_S, MAX_PER_S)


def _encode_own(binding: RoleBinding) -> pb.RoleBinding:
    return pb.RoleBinding(
        id=binding.id, principal=binding.principal, role=pb.Role.Name(binding.role), models=binding.models
    )


def _encode_grant(grant: access.Grant) -> pb.RoleBinding:
    message = pb.RoleBinding(
        id=grant.id,
        principal=grant.principal,
        role=pb.Role.Name(grant.role),
        models=grant.models,
        created_by=grant.created_by,
    )
    encode_time(grant.created_at, message.created_at)
    return message


def _encode_key(key: access.ApiKey) -> pb.ApiKey:
    message = pb.ApiKey(
        id=key.id,
        principal=key.principal,
        tenant=key.tenant,
        description=key.description,
        created_by=key.created_by,
    )
    encode_time(key.created_at, message.created_at)
    encode_time(key.expires_at, message.expires_at)
    encode_time(key.revoked_at, message.revoked_at)
    return message


def _encode_quota(quota: access.Quota) -> pb.Quota:
    return pb.Quota(
        tenant=quota.tenant,
        requests_per_s=quota.requests_per_s,
        rows_per_s=quota.rows_per_s,
        max_in_flight=quota.max_in_flight,
    )
