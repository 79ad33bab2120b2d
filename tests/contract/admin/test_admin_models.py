"""ModelRegistry but for uploads: every rpc, good and bad."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import grpc
import pytest
from admin_site import TIMEOUT_S, Site, refused, speaking_as, status_of
from aiorch_proto.admin.v1 import audit_pb2
from aiorch_proto.admin.v1 import registry_pb2 as pb
from aiorch_proto.admin.v1.service import METHODS, AdminStub
from databases import on_every_database

from aiorch_server.registry import paging
from aiorch_server.security.roles import Role

#: What nobody's model is called.
BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "a b",
    ".hidden",
    "x" * 256,
    "x" * 10_000,
    "é",
    "a\nb",
    "%00",
    "'; DROP TABLE models;--",
]


@on_every_database
async def test_a_model_from_its_beginning_to_its_end(site: Site) -> None:
    made = await site.register("digits", description="reads digits", labels={"team": "vision"})
    assert (made.name, made.created_by, made.latest_version) == ("digits", "anybody", 0)
    assert await site.registry.GetModel(pb.GetModelRequest(name="digits")) == made
    changed = await site.registry.UpdateModel(pb.UpdateModelRequest(model={"name": "digits", "description": "new"}))
    assert (changed.description, dict(changed.labels)) == ("new", {"team": "vision"})
    assert changed.etag != made.etag
    version = await site.upload("digits")
    assert (version.version, version.model) == (1, "digits")
    named = await site.registry.SetAlias(pb.SetAliasRequest(model="digits", alias="prod", version=1))
    assert dict(named.aliases) == {"prod": 1}
    request = pb.GetVersionRequest(model="digits", alias="prod")
    assert (await site.registry.GetVersion(request)).aliases == ["prod"]
    assert await status_of(site.registry.DeleteVersion(pb.DeleteVersionRequest(model="digits", version=1))) == (
        "FAILED_PRECONDITION",
        "PRECONDITION_FAILED",
    )
    assert (await status_of(site.registry.DeleteModel(pb.DeleteModelRequest(name="digits"))))[
        0
    ] == "FAILED_PRECONDITION"
    await site.registry.SetAlias(pb.SetAliasRequest(model="digits", alias="prod", version=0))
    await site.registry.DeleteVersion(pb.DeleteVersionRequest(model="digits", version=1))
    assert (await site.upload("digits")).version == 2
    await site.registry.DeleteVersion(pb.DeleteVersionRequest(model="digits", version=2))
    await site.registry.DeleteModel(pb.DeleteModelRequest(name="digits"))
    assert await status_of(site.registry.GetModel(pb.GetModelRequest(name="digits"))) == (
        "NOT_FOUND",
        "NOT_FOUND_ERROR",
    )


async def test_what_is_taken_or_missing(site: Site) -> None:
    await site.register("digits")
    error, details = await refused(site.register("digits"))
    assert (error.code().name, details["ResourceInfo"].resource_name) == ("ALREADY_EXISTS", "digits")
    for call in (
        site.registry.GetModel(pb.GetModelRequest(name="nobody")),
        site.registry.UpdateModel(pb.UpdateModelRequest(model={"name": "nobody", "description": "x"})),
        site.registry.DeleteModel(pb.DeleteModelRequest(name="nobody")),
        site.registry.GetVersion(pb.GetVersionRequest(model="nobody")),
        site.registry.ListVersions(pb.ListVersionsRequest(model="nobody")),
        site.registry.DeleteVersion(pb.DeleteVersionRequest(model="nobody", version=1)),
        site.registry.SetAlias(pb.SetAliasRequest(model="nobody", alias="prod", version=1)),
    ):
        error, _ = await refused(call)
        assert (error.code().name, error.details()) == ("NOT_FOUND", "model 'nobody' is not registered")
    for call in (
        site.registry.GetVersion(pb.GetVersionRequest(model="digits")),
        site.registry.GetVersion(pb.GetVersionRequest(model="digits", version=7)),
        site.registry.GetVersion(pb.GetVersionRequest(model="digits", alias="prod")),
        site.registry.DeleteVersion(pb.DeleteVersionRequest(model="digits", version=7)),
        site.registry.SetAlias(pb.SetAliasRequest(model="digits", alias="prod", version=7)),
        site.registry.GetUpload(pb.GetUploadRequest(model="digits", upload_id="nobody")),
    ):
        error, _ = await refused(call)
        assert error.code().name == "NOT_FOUND"
    both = pb.GetVersionRequest(model="digits", version=1, alias="prod")
    assert (await status_of(site.registry.GetVersion(both)))[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: name[:20])
async def test_names_that_nothing_has(site: Site, name: str) -> None:
    await site.register("digits")
    calls = [
        site.registry.RegisterModel(pb.RegisterModelRequest(name=name)),
        site.registry.GetModel(pb.GetModelRequest(name=name)),
        site.registry.UpdateModel(pb.UpdateModelRequest(model={"name": name})),
        site.registry.DeleteModel(pb.DeleteModelRequest(name=name)),
        site.registry.GetVersion(pb.GetVersionRequest(model=name)),
        site.registry.ListVersions(pb.ListVersionsRequest(model=name)),
        site.registry.DeleteVersion(pb.DeleteVersionRequest(model=name, version=1)),
        site.registry.SetAlias(pb.SetAliasRequest(model=name, alias="prod", version=1)),
        site.registry.GetUpload(pb.GetUploadRequest(model=name, upload_id="x")),
        site.upload(name),
    ]
    for call in calls:
        error, details = await refused(call)
        assert error.code().name == "INVALID_ARGUMENT"
        assert details["BadRequest"].field_violations
        assert len(str(error.details())) < 400
    answer = await site.registry.ListModels(pb.ListModelsRequest())
    assert [model.name for model in answer.models] == ["digits"]


@pytest.mark.parametrize(
    "alias", ["", "Prod", "1st", "a b", "x" * 64, "x" * 10_000, "'; DROP TABLE aliases;--", "../x"]
)
async def test_aliases_that_nothing_has(site: Site, alias: str) -> None:
    await site.upload("digits", create_model=True)
    call = site.registry.SetAlias(pb.SetAliasRequest(model="digits", alias=alias, version=1))
    assert (await status_of(call))[0] == "INVALID_ARGUMENT"
    if alias:
        call = site.registry.GetVersion(pb.GetVersionRequest(model="digits", alias=alias))
        assert (await status_of(call))[0] == "INVALID_ARGUMENT"


async def test_texts_that_no_database_holds(site: Site) -> None:
    error, details = await refused(site.register("digits", labels={"team": "a\0b"}))
    assert details["BadRequest"].field_violations[0].field == "labels"
    error, details = await refused(site.registry.UpdateModel(pb.UpdateModelRequest(model={"name": "a\0b"})))
    assert details["BadRequest"].field_violations[0].field == "model.name"
    assert error.code().name == "INVALID_ARGUMENT"
    assert (await status_of(site.register("digits", description="x" * 100_000)))[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("version", [-1, 0, 2**63 - 1, -(2**63)])
async def test_numbers_that_no_version_has(site: Site, version: int) -> None:
    await site.upload("digits", create_model=True)
    call = site.registry.DeleteVersion(pb.DeleteVersionRequest(model="digits", version=version))
    assert (await status_of(call))[0] in ("INVALID_ARGUMENT", "NOT_FOUND")
    if version:
        call = site.registry.SetAlias(pb.SetAliasRequest(model="digits", alias="prod", version=version))
        assert (await status_of(call))[0] in ("INVALID_ARGUMENT", "NOT_FOUND")


async def test_lists_in_pages(site: Site) -> None:
    names = sorted(f"m{number:02}" for number in range(23))
    for name in names:
        await site.register(name)
    found, token = [], ""
    while True:
        page = await site.registry.ListModels(pb.ListModelsRequest(page_size=10, page_token=token))
        assert len(page.models) <= 10
        found += [model.name for model in page.models]
        token = page.next_page_token
        if not token:
            break
    assert found == names
    page = await site.registry.ListModels(pb.ListModelsRequest(name_prefix="m1", page_size=100_000))
    assert [model.name for model in page.models] == names[10:20]
    assert not (await site.registry.ListModels(pb.ListModelsRequest(name_prefix="%"))).models


@pytest.mark.parametrize("token", ["x", "=" * 5000, "AAAA", "'; DROP TABLE models;--", "é"])
async def test_tokens_that_no_page_gave(site: Site, token: str) -> None:
    error, _ = await refused(site.registry.ListModels(pb.ListModelsRequest(page_token=token)))
    assert (error.code().name, "page_token" in str(error.details())) == ("INVALID_ARGUMENT", True)


@pytest.mark.parametrize("content", [b"[1]", b"{}", b"null", b"true", b"1e999", b"9" * 40, b'"a"', b"[" * 3000])
async def test_tokens_that_somebody_made_up(site: Site, content: bytes) -> None:
    """Whoever knows how they are made can make one for any key: only such keys reach the database as rows have."""
    check = paging._check(content, ("audit", "", "", "", None, None))
    token = base64.urlsafe_b64encode(check + content).decode().rstrip("=")
    error, _ = await refused(site.stub.Audit.QueryAudit(audit_pb2.QueryAuditRequest(page_token=token)))
    assert (error.code().name, "page_token" in str(error.details())) == ("INVALID_ARGUMENT", True)


@pytest.mark.parametrize("content", [b"1", b'"\\u0000"', b'"\\ud800"'])
async def test_texts_that_somebody_made_up(site: Site, content: bytes) -> None:
    check = paging._check(content, ("models", ""))
    token = base64.urlsafe_b64encode(check + content).decode().rstrip("=")
    error, _ = await refused(site.registry.ListModels(pb.ListModelsRequest(page_token=token)))
    assert (error.code().name, "page_token" in str(error.details())) == ("INVALID_ARGUMENT", True)


async def test_tokens_and_sizes_of_other_lists(site: Site) -> None:
    for name in ("a", "b"):
        await site.register(name)
    token = (await site.registry.ListModels(pb.ListModelsRequest(page_size=1))).next_page_token
    for request in (
        pb.ListModelsRequest(page_token=token, name_prefix="a"),
        pb.ListModelsRequest(page_size=-1),
    ):
        assert (await status_of(site.registry.ListModels(request)))[0] == "INVALID_ARGUMENT"
    call = site.registry.ListVersions(pb.ListVersionsRequest(model="a", page_token=token))
    assert (await status_of(call))[0] == "INVALID_ARGUMENT"


async def test_versions_in_pages(site: Site) -> None:
    for _ in range(3):
        await site.upload("digits", create_model=True)
    page = await site.registry.ListVersions(pb.ListVersionsRequest(model="digits", page_size=2))
    assert [each.version for each in page.versions] == [3, 2]
    page = await site.registry.ListVersions(
        pb.ListVersionsRequest(model="digits", page_size=2, page_token=page.next_page_token)
    )
    assert ([each.version for each in page.versions], page.next_page_token) == ([1], "")


async def test_a_page_fits_what_clients_receive(site: Site) -> None:
    """4 MiB, unless a client says otherwise; a version's signature alone may have two."""
    tensors = [{"name": f"{n:0>1000}", "datatype": "FP32"} for n in range(1000)]
    for _ in range(5):
        await site.upload("digits", create_model=True, provenance={"inputs": tensors})
    found, token, sizes = [], "", []
    while token or not found:
        page = await site.registry.ListVersions(pb.ListVersionsRequest(model="digits", page_token=token))
        found += [each.version for each in page.versions]
        token = page.next_page_token
        sizes.append((page.ByteSize() < 4 << 20, len(page.versions)))
    assert found == [5, 4, 3, 2, 1]
    assert sizes == [(True, 3), (True, 2)]


async def test_a_mask_says_what_is_changed(site: Site) -> None:
    await site.register("digits", description="old", labels={"a": "1"})
    request = pb.UpdateModelRequest(
        model={"name": "digits", "labels": {"b": "2"}}, update_mask={"paths": ["description"]}
    )
    changed = await site.registry.UpdateModel(request)
    assert (changed.description, dict(changed.labels)) == ("", {"a": "1"})
    request = pb.UpdateModelRequest(model={"name": "digits"}, update_mask={"paths": ["colour", "name"]})
    error, details = await refused(site.registry.UpdateModel(request))
    (violation,) = details["BadRequest"].field_violations
    assert (violation.field, violation.description) == (
        "update_mask",
        "names 'colour', 'name'; expected some of description, labels",
    )
    assert error.code().name == "INVALID_ARGUMENT"


async def test_an_etag_that_is_old(site: Site) -> None:
    made = await site.register("digits")
    update = pb.UpdateModelRequest(model={"name": "digits", "description": "x", "etag": made.etag})
    changed = await site.registry.UpdateModel(update)
    error, details = await refused(site.registry.UpdateModel(update))
    assert (error.code().name, details["ErrorInfo"].reason) == ("ABORTED", "CONFLICT")
    assert changed.etag in str(error.details())


# --------------------------------------------------------------------------------------------------- idempotency


async def test_the_same_key_gives_the_same_bytes(site: Site) -> None:
    call = site.channel.unary_unary("/aiorch.admin.v1.ModelRegistry/RegisterModel")
    labels = {str(number): "x" for number in range(20)}
    request = pb.RegisterModelRequest(name="digits", labels=labels, idempotency_key="k1").SerializeToString()
    first = await call(request)
    await site.registry.UpdateModel(pb.UpdateModelRequest(model={"name": "digits", "description": "changed"}))
    assert await call(request) == first
    assert [entry.outcome for entry in await site.audit(method="/aiorch.admin.v1.ModelRegistry/RegisterModel")] == [
        "OK"
    ]


async def test_a_key_for_another_request(site: Site) -> None:
    await site.register("digits", idempotency_key="k1")
    for call in (
        site.register("letters", idempotency_key="k1"),
        site.registry.DeleteModel(pb.DeleteModelRequest(name="digits", idempotency_key="k1")),
    ):
        assert await status_of(call) == ("INVALID_ARGUMENT", "IDEMPOTENCY_KEY_REUSED")
    with speaking_as("bob", (Role.ADMIN, "*")):
        assert (await site.register("letters", idempotency_key="k1")).created_by == "bob"


async def test_a_key_is_its_callers_own(site: Site) -> None:
    """Who guesses another's key gets neither his answer nor learns that it was used; who lost his role gets nothing."""
    with speaking_as("alice", (Role.ADMIN, "*")):
        await site.register("digits", idempotency_key="k1")
    for other in ("bob", "ALICE", "alice ", "alic"):
        with speaking_as(other, (Role.ADMIN, "*")):
            assert (await status_of(site.register("digits", idempotency_key="k1")))[0] == "ALREADY_EXISTS"
    with speaking_as("mallory", (Role.ADMIN, "other-*")):
        first = await status_of(site.register("digits", idempotency_key="k1"))
        assert first == await status_of(site.register("digits", idempotency_key="k2"))
    with speaking_as("alice", (Role.VIEWER, "*")):
        assert (await status_of(site.register("digits", idempotency_key="k1")))[0] == "PERMISSION_DENIED"
    with speaking_as("alice", (Role.ADMIN, "*")):
        assert (await site.register("digits", idempotency_key="k1")).created_by == "alice"


@pytest.mark.parametrize("key", ["x" * 129, "x" * 10_000, "a\nb", "a\0b"])
async def test_keys_that_are_none(site: Site, key: str) -> None:
    assert (await status_of(site.register("digits", idempotency_key=key)))[0] == "INVALID_ARGUMENT"


async def test_what_was_refused_may_be_tried_again_with_its_key(site: Site) -> None:
    alias = pb.SetAliasRequest(model="digits", alias="prod", version=1, idempotency_key="k1")
    assert (await status_of(site.registry.SetAlias(alias)))[0] == "NOT_FOUND"
    await site.upload("digits", create_model=True)
    assert dict((await site.registry.SetAlias(alias)).aliases) == {"prod": 1}


@on_every_database
async def test_one_key_by_many_at_once(site: Site) -> None:
    """All get the one answer, and it is done once."""
    answers = await asyncio.gather(*[site.register("digits", idempotency_key="k1") for _ in range(10)])
    assert all(answer == answers[0] for answer in answers)
    assert len(await site.audit()) == 1


async def test_two_operators_at_once(site: Site) -> None:
    """One wins, the other is told."""
    await site.upload("digits", create_model=True)
    await site.upload("digits")
    await site.registry.SetAlias(pb.SetAliasRequest(model="digits", alias="prod", version=1))
    calls = [
        site.registry.SetAlias(pb.SetAliasRequest(model="digits", alias="prod", version=2, expected_version=1))
        for _ in range(2)
    ]
    results = await asyncio.gather(*calls, return_exceptions=True)
    (lost,) = [each for each in results if isinstance(each, grpc.aio.AioRpcError)]
    assert lost.code().name == "ABORTED"
    assert "points at version 2 by now" in str(lost.details())


# ----------------------------------------------------------------------------------------------------------- audit


async def test_what_the_audit_log_says(site: Site) -> None:
    await site.register("digits", description="d" * 1000, idempotency_key="k1")
    await refused(site.register("digits"))
    await refused(site.registry.GetModel(pb.GetModelRequest(name="nobody")))  # changes nothing: not there
    await refused(site.registry.SetAlias(pb.SetAliasRequest(model="digits", alias="'x'", version=1)))
    entries = await site.audit()
    assert [(entry.method.rpartition("/")[2], entry.model, entry.outcome, entry.principal) for entry in entries] == [
        ("RegisterModel", "digits", "OK", "anybody"),
        ("RegisterModel", "digits", "ALREADY_EXISTS", "anybody"),
        ("SetAlias", "digits", "INVALID_ARGUMENT", "anybody"),
    ]
    detail = json.loads(entries[0].detail)
    assert detail["name"] == "digits"
    assert detail["description"] == "d" * 500 + "... (1000 characters)"
    assert "idempotency_key" not in detail
    assert {entry.server for entry in entries} == {"here"}


async def test_a_large_request_has_its_entry(site: Site) -> None:
    labels = {str(number) + "x" * 40: "y" * 1000 for number in range(900)}
    assert (await status_of(site.register("digits", labels=labels)))[0] == "INVALID_ARGUMENT"
    (entry,) = await site.audit()
    assert json.loads(entry.detail) == {"name": "digits", "left_out": ["labels"]}


async def test_what_was_changed_is_told_on_commit(site: Site) -> None:
    await site.register("digits")
    await refused(site.register("digits"))
    assert site.commits == 1


# ---------------------------------------------------------------------------------------------------------- access


async def test_what_a_caller_may_not_see_is_not_there(site: Site) -> None:
    for name in ("team-a-x", "team-b-x", "team-b-y"):
        await site.upload(name, create_model=True)

    def list_calls(name: str) -> list[Any]:
        return [
            site.registry.GetModel(pb.GetModelRequest(name=name)),
            site.registry.UpdateModel(pb.UpdateModelRequest(model={"name": name})),
            site.registry.DeleteModel(pb.DeleteModelRequest(name=name)),
            site.registry.GetVersion(pb.GetVersionRequest(model=name)),
            site.registry.ListVersions(pb.ListVersionsRequest(model=name)),
            site.registry.DeleteVersion(pb.DeleteVersionRequest(model=name, version=1)),
            site.registry.SetAlias(pb.SetAliasRequest(model=name, alias="prod", version=1)),
            site.registry.GetUpload(pb.GetUploadRequest(model=name, upload_id="x")),
            site.upload(name),
        ]

    with speaking_as("alice", (Role.DEPLOYER, "team-a-*")):
        for name in ("team-b-x", "team-b-z"):  # there, and not there
            for call in list_calls(name):
                error, details = await refused(call)
                told = (error.code().name, str(error.details()).replace(name, "M"), details["ErrorInfo"].reason)
                assert told == ("NOT_FOUND", "model 'M' is not registered", "NOT_FOUND_ERROR")
        page = await site.registry.ListModels(pb.ListModelsRequest(page_size=1))
        assert ([model.name for model in page.models], page.next_page_token) == (["team-a-x"], "")
        for name in ("team-b-x", "team-b-z"):  # nothing tells which of the two is there
            error, _ = await refused(site.register(name))
            assert error.code().name == "PERMISSION_DENIED"
        assert (await site.register("team-a-y")).created_by == "alice"


async def test_a_caller_who_may_only_look(site: Site) -> None:
    await site.upload("digits", create_model=True)
    with speaking_as("eve", (Role.VIEWER, "*")):
        await site.registry.GetModel(pb.GetModelRequest(name="digits"))
        await site.registry.ListVersions(pb.ListVersionsRequest(model="digits"))
        for call in (
            site.registry.RegisterModel(pb.RegisterModelRequest(name="mine")),
            site.registry.UpdateModel(pb.UpdateModelRequest(model={"name": "digits"})),
            site.registry.DeleteVersion(pb.DeleteVersionRequest(model="digits", version=1)),
            site.registry.SetAlias(pb.SetAliasRequest(model="digits", alias="prod", version=1)),
            site.upload("digits"),
        ):
            assert await status_of(call) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    entries = await site.audit(principal="eve")
    assert {entry.outcome for entry in entries} == {"PERMISSION_DENIED"}
    assert len(entries) == 5


async def test_synchronous_stubs(site: Site) -> None:
    def work() -> list[str]:
        with grpc.insecure_channel(site.target) as channel:
            registry = AdminStub(channel).ModelRegistry
            registry.RegisterModel(pb.RegisterModelRequest(name="digits"), timeout=TIMEOUT_S)
            with pytest.raises(grpc.RpcError) as raised:
                registry.RegisterModel(pb.RegisterModelRequest(name="digits"), timeout=TIMEOUT_S)
            assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS
            return [model.name for model in registry.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S).models]

    assert await asyncio.to_thread(work) == ["digits"]


def test_every_method_is_there() -> None:
    from aiorch_server.security.permissions import TABLE

    assert set(METHODS) <= set(TABLE)


async def test_values_that_no_json_has(site: Site) -> None:
    """They are refused, and the audit log tells of them all the same."""
    mask = {"paths": ["camelCase", "a..b", "é"]}
    request = pb.UpdateModelRequest(
        model={"name": "digits", "created_at": {"seconds": 2**62, "nanos": -1}}, update_mask=mask
    )
    assert (await status_of(site.registry.UpdateModel(request)))[0] == "INVALID_ARGUMENT"
    (entry,) = await site.audit()
    detail = json.loads(entry.detail)
    assert detail["update_mask"] == mask
    assert detail["model"]["created_at"] == {"seconds": 2**62, "nanos": -1}
