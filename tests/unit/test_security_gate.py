"""The gate's decisions and its memory; policies, quotas and authenticators of others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from aiorch_server.config.security import SecurityConfig
from aiorch_server.errors import (
    CapacityError,
    IdentityUnavailable,
    InternalError,
    InvalidSettings,
    NotAuthenticated,
    PermissionDenied,
    QuotaExceeded,
)
from aiorch_server.security import (
    UNRESTRICTED,
    Access,
    AuthMethod,
    Credentials,
    Identity,
    Role,
    RoleBinding,
    Scope,
    current_access,
    keep_seen,
    permit,
    sees,
)
from aiorch_server.security import gate as gates
from aiorch_server.security.api_keys import ApiKeyAuthenticator, KnownKey, hash_secret, make_key
from aiorch_server.security.authenticator import Authenticator
from aiorch_server.security.find import open_gate
from aiorch_server.security.gate import Gate
from aiorch_server.security.policy import Policy
from aiorch_server.security.quotas import QuotaBook, QuotaBounds

METADATA = "/inference.GRPCInferenceService/ModelMetadata"
INFER = "/inference.GRPCInferenceService/ModelInfer"
LOG = "/inference.GRPCInferenceService/LogSettings"
REGIONS = "/inference.GRPCInferenceService/SystemSharedMemoryStatus"
SECOND_NS = 10**9


class Names(Authenticator):
    """Takes ``Bearer NAME`` for that name; counts how often it is asked."""

    expects = "a name"

    def __init__(self, **identity: Any) -> None:
        self.identity = identity
        self.asked = 0
        self.has_changed = False
        self.error: Exception | None = None

    async def authenticate(self, credentials: Credentials) -> Identity | None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        name = credentials.bearer
        return None if name is None else Identity(**{"name": name, "method": AuthMethod.TOKEN, **self.identity})

    async def refresh(self) -> bool:
        has_changed, self.has_changed = self.has_changed, False
        return has_changed


def bearer(name: str) -> Credentials:
    return Credentials((f"Bearer {name}".encode(),))


def open_names(*bindings: RoleBinding, **more: Any) -> tuple[Gate, Names]:
    names = Names()
    return Gate([names], Policy(bindings), **more), names


async def test_what_was_found_out_is_remembered_until_something_changes() -> None:
    now = [100 * SECOND_NS]
    gate, names = open_names(clock=lambda: now[0])
    names.identity["expires_ns"] = 200 * SECOND_NS
    for _ in range(3):
        await gate.enter(METADATA, bearer("alice"))
    assert names.asked == 1
    await gate.look()
    await gate.enter(METADATA, bearer("alice"))
    assert names.asked == 1
    names.has_changed = True
    await gate.look()
    await gate.enter(METADATA, bearer("alice"))
    assert names.asked == 2
    now[0] = 200 * SECOND_NS
    with pytest.raises(NotAuthenticated, match="have expired"):
        await gate.enter(METADATA, bearer("alice"))
    assert names.asked == 3


async def test_a_decision_from_before_a_change_is_not_remembered() -> None:
    gate, names = open_names()
    original = names.authenticate

    async def forget_meanwhile(credentials: Credentials) -> Identity | None:
        found = await original(credentials)
        gate.forget()
        return found

    names.authenticate = forget_meanwhile  # type: ignore[method-assign]
    await gate.enter(METADATA, bearer("alice"))
    names.authenticate = original  # type: ignore[method-assign]
    await gate.enter(METADATA, bearer("alice"))
    assert names.asked == 2


async def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "MAX_REMEMBERED", 3)
    gate, names = open_names()
    for name in "abcada":
        await gate.enter(METADATA, bearer(name))
    assert names.asked == 4, "the one that was used last was forgotten"
    await gate.enter(METADATA, bearer("b"))
    assert names.asked == 5 and len(gate._remembered) == 3


@pytest.mark.parametrize("tenant", ["a\nb", "a\x00", "\ud800", "x" * 129])
async def test_tenants_that_nobody_may_have(tenant: str) -> None:
    """They would have no quota, and stand in refusals and on /metrics."""
    gate, names = open_names(quotas=QuotaBook([QuotaBounds("*", requests_per_s=1)]))
    names.identity["tenant"] = tenant
    with pytest.raises(NotAuthenticated, match="the credentials name a tenant"):
        await gate.enter(METADATA, bearer("x"))


@pytest.mark.parametrize("name", ["", "group:admins", "a\nb", "x" * 257, "a\x00"])
async def test_names_that_nobody_may_have(name: str) -> None:
    gate, names = open_names()
    names.identity["name"] = name
    with pytest.raises(NotAuthenticated, match="the credentials name a"):
        await gate.enter(METADATA, bearer("x"))


async def test_what_others_authenticators_do_wrong(caplog: pytest.LogCaptureFixture) -> None:
    """Neither their errors' texts nor what they were shown is told."""
    gate, names = open_names()
    names.error = RuntimeError("cannot parse secret-of-alice")
    with caplog.at_level(logging.DEBUG), pytest.raises(InternalError) as raised:
        await gate.enter(METADATA, bearer("secret-of-alice"))
    assert "secret" not in str(raised.value) + caplog.text and "Names failed with RuntimeError" in caplog.text
    names.error = IdentityUnavailable("away")
    with pytest.raises(CapacityError, match="away"):
        await gate.enter(METADATA, bearer("alice"))


async def test_scopes() -> None:
    gate, _ = open_names(RoleBinding("alice", Role.ADMIN, "own-*"), RoleBinding("root", Role.ADMIN))
    with pytest.raises(PermissionDenied, match="needs the role admin on all models"):
        await gate.enter(LOG, bearer("alice"))
    await gate.enter(LOG, bearer("root"))
    await gate.enter(REGIONS, bearer("alice"))
    with pytest.raises(PermissionDenied, match="on some model"):
        await gate.enter(REGIONS, bearer("bob"))
    with pytest.raises(PermissionDenied, match="is not in the table"):
        await gate.enter("/some.Service/Method", bearer("root"))
    with pytest.raises(NotAuthenticated):
        await gate.enter("/some.Service/Method", Credentials())


async def test_permits() -> None:
    gate, _ = open_names(RoleBinding("alice", Role.CLIENT, "own-*"), RoleBinding("alice", Role.VIEWER, "shown"))
    access = await gate.enter(INFER, bearer("alice"))
    assert access.permit("own-1") and access.model == "own-1"
    assert not access.permit("other") and not access.permit("own") and not access.permit("")
    with pytest.raises(PermissionDenied, match="'alice' needs the role client on model 'shown'"):
        access.permit("shown")
    token = current_access.set(access)
    try:
        assert sees("shown") and not sees("other") and permit("own-2") and not permit("other")
        found = keep_seen([RoleNamed("own-1"), RoleNamed("other"), RoleNamed("shown")])
        assert [each.name for each in found] == ["own-1", "shown"]
    finally:
        current_access.reset(token)
    assert permit("anything") and sees("anything") and current_access.get() is UNRESTRICTED


class RoleNamed:
    def __init__(self, name: str) -> None:
        self.name = name


async def test_groups_and_roles_of_credentials() -> None:
    gate, names = open_names(RoleBinding("group:ml", Role.DEPLOYER, "a"), RoleBinding("ml", Role.ADMIN, "b"))
    names.identity.update(groups=("ml",), roles=(RoleBinding("alice", Role.CLIENT, "c"),))
    principal = await gate.identify(bearer("alice"))
    assert principal.may(Role.DEPLOYER, "a") and principal.may(Role.CLIENT, "c")
    assert not principal.may(Role.VIEWER, "b"), "a group is no caller of that name"


class Registry:
    """What a registry would say."""

    def __init__(self) -> None:
        self.generation = 1
        self.bindings: list[RoleBinding] = []
        self.bounds: list[QuotaBounds] = []
        self.error: Exception | None = None

    async def read_generation(self) -> int:
        if self.error is not None:
            raise self.error
        return self.generation

    async def read_rules(self) -> tuple[Sequence[RoleBinding], Sequence[QuotaBounds]]:
        return self.bindings, self.bounds


async def test_rules_of_the_registry(caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry()
    gate, _ = open_names(RoleBinding("alice", Role.VIEWER), source=registry)
    await gate.look()
    assert not (await gate.identify(bearer("alice"))).may(Role.ADMIN)
    registry.bindings.append(RoleBinding("alice", Role.ADMIN))
    await gate.look()
    assert not (await gate.identify(bearer("alice"))).may(Role.ADMIN), "the number is the same"
    registry.generation = 2
    await gate.look()
    assert (await gate.identify(bearer("alice"))).may(Role.ADMIN)
    registry.error = CapacityError("away")
    for _ in range(3):
        await gate.look()
    assert (await gate.identify(bearer("alice"))).may(Role.ADMIN), "what was known stays in force"
    assert len([each for each in caplog.records if "stays in force" in each.message]) == 1
    registry.error, registry.bindings, registry.generation = None, [], 3
    await gate.look()
    assert not (await gate.identify(bearer("alice"))).may(Role.ADMIN)
    assert (await gate.identify(bearer("alice"))).may(Role.VIEWER), "those of the settings stay"


async def test_rules_that_cannot_be_honoured_keep_nobody_in() -> None:
    """A bound that cannot be counted, say: what was decided before is decided again all the same."""
    registry = Registry()
    gate, names = open_names(source=registry, quotas=QuotaBook([QuotaBounds("alice", requests_per_s=1)]))
    await gate.look()
    await gate.enter(METADATA, bearer("alice"))
    registry.bounds, registry.generation = [QuotaBounds("alice", requests_per_s=-1)], 2
    await gate.look()
    names.error = NotAuthenticated("revoked")
    with pytest.raises(NotAuthenticated):
        await gate.identify(bearer("alice"))


def test_quotas() -> None:
    book = QuotaBook([QuotaBounds("red", requests_per_s=1), QuotaBounds("*", max_in_flight=1), QuotaBounds("free")])
    red = book.find("red")
    assert red is not None and red is book.find("red") and book.find("free") is None
    with red.admit(1, 0), pytest.raises(QuotaExceeded):
        red.admit(1, 0)
    blue = book.find("blue")
    assert blue is not None and blue.max_in_flight == 1
    book.replace([QuotaBounds("blue", max_in_flight=2), QuotaBounds("red")])
    assert blue is book.find("blue") and blue.max_in_flight == 2
    assert book.find("red") is None
    book.replace([])
    assert blue.max_in_flight == 1
    assert book.find("red") is red and red.requests_per_s == 1, "a fresh one would be full"


async def test_api_keys() -> None:
    key, other = make_key(), make_key()
    assert key.text.startswith(f"aio_{key.id}_") and key.sha256 == hash_secret(key.text[-43:])

    class Others:
        async def find_key(self, id: str) -> KnownKey | None:
            return KnownKey(id, other.sha256, "bob") if id == other.id else None

    keys = ApiKeyAuthenticator([KnownKey(key.id, key.sha256, "alice", "red")], Others())
    found = await keys.authenticate(bearer(key.text))
    assert found == Identity("alice", AuthMethod.API_KEY, "red")
    bob = await keys.authenticate(bearer(other.text))
    assert bob is not None and bob.name == "bob"
    assert await keys.authenticate(bearer("a.b.c")) is None and await keys.authenticate(Credentials()) is None
    wrong = [
        key.text[:-1] + ("A" if key.text[-1] != "A" else "B"),
        f"aio_{key.id}_",
        "aio_",
        f"aio_{other.id}_{key.text[-43:]}",
    ]
    for text in (*wrong, key.text + "A", f"aio_unknown1_{key.text[-43:]}", key.text.replace("aio_", "aio_-")):
        with pytest.raises(NotAuthenticated, match="the API key is unknown or revoked"):
            await keys.authenticate(bearer(text))


def test_credentials_show_nothing_of_themselves() -> None:
    credentials = Credentials((b"Bearer secret",), b"certificate")
    assert "secret" not in repr(credentials) and "certificate" not in repr(credentials)
    access = Access(UNRESTRICTED.principal, None, credentials)
    assert "secret" not in repr(access)


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (b"Bearer abc", "abc"), (b"bearer  abc ", "abc"), (b"BEARER abc", "abc"), (b"Basic abc", None),
        (b"Bearer", None), (b"Bearer ", None), (b"abc", None), (b"", None), (b"Bearer \xff", None),
    ],
)  # fmt: skip
def test_bearers(header: bytes, token: str | None) -> None:
    assert Credentials((header,)).bearer == token


def make_names() -> Names:
    return Names()


async def test_authenticators_by_name() -> None:
    config = SecurityConfig(enabled=True, authenticators=[f"{__name__}:make_names"])
    gate = open_gate(config)
    assert gate is not None and (await gate.identify(bearer("alice"))).name == "alice"
    assert open_gate(SecurityConfig()) is None
    for name, text in (
        ("nowhere:Thing", "cannot be had: ModuleNotFoundError"),
        (f"{__name__}:Registry", "gives a Registry, no Authenticator"),
        ("missing", "there is no authenticator 'missing'"),
    ):
        with pytest.raises(InvalidSettings, match=text):
            open_gate(SecurityConfig(enabled=True, authenticators=[name]))


def test_the_table_is_whole() -> None:
    """Whoever needs a role needs it on something, and changing never needs less than reading."""
    from aiorch_server.security import TABLE

    for permission in TABLE.values():
        needs_role = permission.scope in (Scope.MODEL, Scope.ANYWHERE, Scope.SERVER)
        assert needs_role == (permission.role is not None), permission.call
        assert permission.change is None or permission.role is None or permission.change >= permission.role
