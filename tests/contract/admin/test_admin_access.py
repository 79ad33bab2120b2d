"""Access, Audit and Tuning: every rpc, good and bad."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from admin_site import Site, refused, speaking_as, status_of
from aiorch_proto.admin.v1 import access_pb2, audit_pb2, registry_pb2, tuning_pb2
from databases import on_every_database
from sqlalchemy import text

from aiorch_server.frontends.admin.registry_access import RegistryAccess
from aiorch_server.registry import access
from aiorch_server.registry.audit import append_audit
from aiorch_server.registry.session import Session
from aiorch_server.security.api_keys import ApiKeyAuthenticator
from aiorch_server.security.authenticator import Credentials
from aiorch_server.security.quotas import QuotaBook
from aiorch_server.security.roles import Role


async def test_who_am_i(site: Site) -> None:
    assert (await site.stub.Access.WhoAmI(access_pb2.WhoAmIRequest())).principal == "anybody"
    with speaking_as("alice", (Role.DEPLOYER, "team-a-*")):
        me = await site.stub.Access.WhoAmI(access_pb2.WhoAmIRequest())
    assert (me.principal, me.method) == ("alice", "none")
    assert [(each.role, each.models) for each in me.bindings] == [(access_pb2.ROLE_DEPLOYER, "team-a-*")]
    permissions = (await site.stub.Access.ListPermissions(access_pb2.ListPermissionsRequest())).permissions
    roles = {each.method: each.role for each in permissions}
    assert roles["/aiorch.admin.v1.Deployments/Deploy"] == access_pb2.ROLE_DEPLOYER
    assert roles["/inference.GRPCInferenceService/ModelInfer"] == access_pb2.ROLE_CLIENT


@on_every_database
async def test_roles(site: Site) -> None:
    stub = site.stub.Access
    request = access_pb2.GrantRoleRequest(principal="group:ops", role=access_pb2.ROLE_DEPLOYER, models="team-a-*")
    made = await stub.GrantRole(request)
    assert (made.principal, made.role, made.created_by) == ("group:ops", access_pb2.ROLE_DEPLOYER, "anybody")
    assert (await stub.GrantRole(request)).id == made.id
    bindings, _ = await RegistryAccess(site.database).read_rules()
    assert [(each.principal, each.role, each.models) for each in bindings] == [("group:ops", Role.DEPLOYER, "team-a-*")]
    listed = await stub.ListRoleBindings(access_pb2.ListRoleBindingsRequest(principal="group:ops"))
    assert list(listed.bindings) == [made]
    generation = await RegistryAccess(site.database).read_generation()
    await stub.RevokeRole(access_pb2.RevokeRoleRequest(id=made.id))
    assert await RegistryAccess(site.database).read_generation() > generation
    assert not (await stub.ListRoleBindings(access_pb2.ListRoleBindingsRequest())).bindings
    assert (await status_of(stub.RevokeRole(access_pb2.RevokeRoleRequest(id=made.id))))[0] == "NOT_FOUND"


@pytest.mark.parametrize(
    "fields",
    [
        {"principal": "bob", "role": 0, "models": "*"},
        {"principal": "bob", "role": 9, "models": "*"},
        {"principal": "", "role": 1, "models": "*"},
        {"principal": "bob", "role": 1, "models": ""},
        {"principal": "bob", "role": 1, "models": "a\0"},
        {"principal": "x" * 10_000, "role": 1, "models": "*"},
        {"principal": "bob", "role": 1, "models": "x" * 10_000},
        {"principal": "a\nb", "role": 1, "models": "*"},
    ],
    ids=str,
)
async def test_roles_that_cannot_be(site: Site, fields: dict[str, Any]) -> None:
    call = site.stub.Access.GrantRole(access_pb2.GrantRoleRequest(**fields))
    assert (await status_of(call))[0] == "INVALID_ARGUMENT"


async def test_api_keys(site: Site) -> None:
    """The secret is in one answer alone: not in a repeated one, not in lists, not in the database, not in the audit."""
    stub = site.stub.Access
    request = access_pb2.CreateApiKeyRequest(
        principal="robot", tenant="acme", description="nightly", idempotency_key="k1",
        expires_at={"seconds": int(time.time()) + 3600},
    )  # fmt: skip
    made = await stub.CreateApiKey(request)
    assert made.secret.startswith(f"aio_{made.key.id}_")
    again = await stub.CreateApiKey(request)
    assert (again.key, again.secret) == (made.key, "")
    secret = made.secret.removeprefix(f"aio_{made.key.id}_")  # it may have a "_" in it
    kept = (site.folder / "registry.db").read_bytes() + (site.folder / "registry.db-wal").read_bytes()
    assert secret.encode() not in kept
    assert made.key.id.encode() in kept
    (entry,) = await site.audit(method="/aiorch.admin.v1.Access/CreateApiKey")
    assert json.loads(entry.detail)["principal"] == "robot"
    assert list((await stub.ListApiKeys(access_pb2.ListApiKeysRequest(principal="robot"))).keys) == [made.key]
    authenticator = ApiKeyAuthenticator((), RegistryAccess(site.database))
    credentials = Credentials((f"Bearer {made.secret}".encode(),))
    identity = await authenticator.authenticate(credentials)
    assert identity is not None
    assert (identity.name, identity.tenant, identity.expires_ns // 10**9) == (
        "robot",
        "acme",
        request.expires_at.seconds,
    )
    await stub.RevokeApiKey(access_pb2.RevokeApiKeyRequest(id=made.key.id))
    (listed,) = (await stub.ListApiKeys(access_pb2.ListApiKeysRequest())).keys
    assert listed.HasField("revoked_at")
    with pytest.raises(Exception, match="unknown or revoked"):
        await authenticator.authenticate(credentials)


@pytest.mark.parametrize(
    "fields",
    [
        {"principal": ""},
        {"principal": "x" * 10_000},
        {"principal": "robot", "tenant": "a\nb"},
        {"principal": "robot", "description": "x" * 100_000},
        {"principal": "robot", "expires_at": {"seconds": 1}},
        {"principal": "robot", "expires_at": {"seconds": 2**62}},
        {"principal": "robot", "expires_at": {"nanos": -5}},
    ],
    ids=lambda fields: str(fields)[:40],
)
async def test_keys_that_cannot_be(site: Site, fields: dict[str, Any]) -> None:
    call = site.stub.Access.CreateApiKey(access_pb2.CreateApiKeyRequest(**fields))
    assert (await status_of(call))[0] == "INVALID_ARGUMENT"
    assert (await status_of(site.stub.Access.RevokeApiKey(access_pb2.RevokeApiKeyRequest(id="'x'"))))[0] == "NOT_FOUND"


async def test_quotas(site: Site) -> None:
    stub = site.stub.Access
    none = await stub.GetQuota(access_pb2.GetQuotaRequest(tenant="acme"))
    assert none == access_pb2.Quota(tenant="acme")
    quota = {"tenant": "acme", "requests_per_s": 10.5, "max_in_flight": 4}
    made = await stub.SetQuota(access_pb2.SetQuotaRequest(quota=quota))
    assert made == access_pb2.Quota(**quota)
    request = access_pb2.SetQuotaRequest(quota={"tenant": "acme"}, update_mask={"paths": ["max_in_flight"]})
    assert await stub.SetQuota(request) == access_pb2.Quota(tenant="acme", requests_per_s=10.5)
    _, bounds = await RegistryAccess(site.database).read_rules()
    assert [(each.tenant, each.requests_per_s, each.max_in_flight) for each in bounds] == [("acme", 10.5, 0)]
    assert [each.tenant for each in (await stub.ListQuotas(access_pb2.ListQuotasRequest())).quotas] == ["acme"]
    for quota, mask in (
        ({"tenant": ""}, []),
        ({"tenant": "acme", "requests_per_s": float("nan")}, []),
        ({"tenant": "acme", "rows_per_s": -1}, []),
        ({"tenant": "acme", "max_in_flight": -1}, []),
        ({"tenant": "acme", "requests_per_s": 1e-9}, []),
        ({"tenant": "acme", "rows_per_s": 1e9}, []),
        ({"tenant": "\u00e4" * 100, "rows_per_s": 1}, []),
        ({"tenant": "acme"}, ["tenant"]),
    ):
        request = access_pb2.SetQuotaRequest(quota=quota, update_mask={"paths": mask})
        assert (await status_of(stub.SetQuota(request)))[0] == "INVALID_ARGUMENT"
    assert (await status_of(stub.GetQuota(access_pb2.GetQuotaRequest())))[0] == "INVALID_ARGUMENT"


async def test_quotas_that_were_never_checked(site: Site) -> None:
    """Rows of another hand: the nearest bounds that can be counted hold, and everything else goes on."""
    await site.database.run(lambda session: access.set_quota(session, access.Quota("acme", 1e-9, 1e12)))
    _, bounds = await RegistryAccess(site.database).read_rules()
    quota = QuotaBook(bounds).find("acme")
    assert quota is not None and (quota.requests_per_s, quota.rows_per_s) == (0.001, 1e8)


@on_every_database
async def test_the_audit_log(site: Site) -> None:
    stub = site.stub.Audit
    for name in ("a", "b", "c"):
        await site.register(name)
    await site.registry.DeleteModel(registry_pb2.DeleteModelRequest(name="b"))
    page = await stub.QueryAudit(audit_pb2.QueryAuditRequest(page_size=3))
    assert [entry.number for entry in page.entries] == [4, 3, 2]
    rest = audit_pb2.QueryAuditRequest(page_size=3, page_token=page.next_page_token)
    assert [entry.number for entry in (await stub.QueryAudit(rest)).entries] == [1]
    assert [entry.number for entry in await site.audit(model="b")] == [2, 4]
    since = page.entries[0].time
    assert [entry.number for entry in await site.audit(since=since)] == [4]
    checked = await stub.VerifyAudit(audit_pb2.VerifyAuditRequest())
    assert (checked.is_intact, checked.entries, checked.head_hash) == (True, 4, page.entries[0].hash)
    known = audit_pb2.VerifyAuditRequest(known_number=4, known_hash=page.entries[0].hash)
    assert (await stub.VerifyAudit(known)).is_intact
    await site.database.run(lambda session: session.execute(text("UPDATE audit SET principal='x' WHERE number=2")))
    checked = await stub.VerifyAudit(audit_pb2.VerifyAuditRequest())
    assert (checked.is_intact, checked.broken_at) == (False, 2)
    for request in (audit_pb2.VerifyAuditRequest(known_number=-1), audit_pb2.VerifyAuditRequest(known_number=3)):
        assert (await status_of(stub.VerifyAudit(request)))[0] == "INVALID_ARGUMENT"
    for request in (
        audit_pb2.QueryAuditRequest(page_token="x"),
        audit_pb2.QueryAuditRequest(page_size=-1),
        audit_pb2.QueryAuditRequest(since={"seconds": 2**62}),
        audit_pb2.QueryAuditRequest(principal="x" * 10_000),
        audit_pb2.QueryAuditRequest(model="a\0b"),
    ):
        assert (await status_of(stub.QueryAudit(request)))[0] == "INVALID_ARGUMENT"


async def test_a_page_of_the_audit_log_fits_what_clients_receive(site: Site) -> None:
    def write(session: Session) -> None:
        for number in range(400):
            append_audit(session, principal="ann", method=f"/a/{number}", outcome="OK", detail="x" * 15_000)

    await site.database.run(write)
    found, token = [], ""
    while token or not found:
        page = await site.stub.Audit.QueryAudit(audit_pb2.QueryAuditRequest(page_size=1000, page_token=token))
        assert page.ByteSize() < 4 << 20
        found += [each.method for each in page.entries]
        token = page.next_page_token
    assert found == [f"/a/{number}" for number in reversed(range(400))]


async def test_objectives(site: Site) -> None:
    stub = site.stub.Tuning
    await site.register("digits")
    assert (await status_of(stub.GetObjective(tuning_pb2.GetObjectiveRequest(model="digits"))))[0] == "NOT_FOUND"
    objective = {"model": "digits", "percentile": 99.0, "latency_us": 5000, "max_instances": 4, "priority": -1}
    made = await stub.SetObjective(tuning_pb2.SetObjectiveRequest(objective=objective))
    assert made == tuning_pb2.Objective(**objective)
    assert await stub.GetObjective(tuning_pb2.GetObjectiveRequest(model="digits")) == made
    request = tuning_pb2.SetObjectiveRequest(
        objective={"model": "digits", "latency_us": 7000}, update_mask={"paths": ["latency_us", "priority"]}
    )
    changed = await stub.SetObjective(request)
    assert (changed.latency_us, changed.priority, changed.percentile) == (7000, 0, 99.0)
    for fields, field in (
        ({"percentile": 101}, "objective.percentile"),
        ({"percentile": float("nan")}, "objective.percentile"),
        ({"latency_us": -1}, "objective.latency_us"),
        ({"error_budget": 2}, "objective.error_budget"),
        ({"min_instances": 9}, "objective.max_instances"),
        ({"instance_cost": float("inf")}, "objective.instance_cost"),
    ):
        request = tuning_pb2.SetObjectiveRequest(objective={"model": "digits", **fields})
        error, details = await refused(stub.SetObjective(request))
        assert (error.code().name, details["BadRequest"].field_violations[0].field) == ("INVALID_ARGUMENT", field)
    request = tuning_pb2.SetObjectiveRequest(objective={"model": "digits"}, update_mask={"paths": ["model"]})
    assert (await status_of(stub.SetObjective(request)))[0] == "INVALID_ARGUMENT"
    assert (await status_of(stub.SetObjective(tuning_pb2.SetObjectiveRequest(objective={"model": "no"}))))[
        0
    ] == "NOT_FOUND"
    assert (await status_of(stub.SetObjective(tuning_pb2.SetObjectiveRequest())))[0] == "INVALID_ARGUMENT"
    error, _ = await refused(stub.Explain(tuning_pb2.ExplainRequest(model="digits")))
    assert (error.code().name, "nothing of it to tune" in str(error.details())) == ("NOT_FOUND", True)


async def test_objectives_of_others(site: Site) -> None:
    await site.register("digits")
    with speaking_as("alice", (Role.ADMIN, "team-a-*")):
        request = tuning_pb2.SetObjectiveRequest(objective={"model": "digits"})
        error, _ = await refused(site.stub.Tuning.SetObjective(request))
        assert (error.code().name, error.details()) == ("NOT_FOUND", "model 'digits' is not registered")
