"""Deployments, rollouts, servers, grants, keys, quotas; and lists in pages."""

from __future__ import annotations

import base64
from dataclasses import replace
from datetime import timedelta

import pytest
from registry_values import NOW, add_version, make_deployment, make_rollout
from sqlalchemy import update

from aiorch_server.errors import NotFoundError, PreconditionFailed, RequestError, UnknownVersion
from aiorch_server.registry import access, deployments, models, rollouts, servers
from aiorch_server.registry.database import Database
from aiorch_server.registry.paging import read_token, write_token
from aiorch_server.registry.records import (
    CanaryStep,
    Gates,
    RolloutPlan,
    RolloutState,
    ServerStatus,
    Strategy,
    TrafficTarget,
    VersionReport,
    VersionStatus,
)


def register(database: Database, *names: str) -> None:
    for name in names:
        database.run_blocking(lambda session, name=name: models.register(session, name, actor="al"))


def test_pages_are_stable_while_others_write(database: Database) -> None:
    register(database, *(f"m{number}" for number in range(1, 8)))
    first = database.read_blocking(lambda session: models.list_models(session, size=3))
    register(database, "m0", "m31", "m9")
    database.run_blocking(lambda session: models.delete_model(session, "m3"))
    names, token = [each.name for each in first.items], first.token
    while token:
        page = database.read_blocking(lambda session, token=token: models.list_models(session, size=3, token=token))
        names, token = names + [each.name for each in page.items], page.token
    assert names == ["m1", "m2", "m3", "m31", "m4", "m5", "m6", "m7", "m9"]


def test_pages_of_what_the_caller_may_see_are_full(database: Database) -> None:
    register(database, *(f"{owner}-{number}" for number in range(6) for owner in ("a", "b")))

    def page(token: str) -> object:
        return database.read_blocking(
            lambda s: models.list_models(s, size=4, token=token, is_visible=lambda name: name.startswith("b"))
        )

    first = page("")
    assert [each.name for each in first.items] == ["b-0", "b-1", "b-2", "b-3"]
    second = page(first.token)
    assert [each.name for each in second.items] == ["b-4", "b-5"] and not second.token


def test_page_sizes(database: Database) -> None:
    register(database, *(f"m{number:03}" for number in range(101)))
    for size, expected in ((0, 100), (1, 1), (101, 101), (10**9, 101)):
        page = database.read_blocking(lambda session, size=size: models.list_models(session, size=size))
        assert len(page.items) == expected and bool(page.token) == (expected < 101)
    with pytest.raises(RequestError, match="found -1 as page_size; it should be 0 to 1000"):
        database.read_blocking(lambda session: models.list_models(session, size=-1))


def test_tokens_are_good_for_their_list_alone() -> None:
    token = write_token("m1", "models", "prefix")
    assert read_token(token, "models", "prefix") == "m1" and read_token("", "x") is None
    assert read_token(write_token(2**62, "audit"), "audit") == 2**62
    flipped = bytearray(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    flipped[-2] ^= 1
    wrong = [
        (token, ("models", "other")),
        (token, ("versions", "prefix")),
        (token[:-1], ("models", "prefix")),
        (token + "A", ("models", "prefix")),
        (base64.urlsafe_b64encode(flipped).decode(), ("models", "prefix")),
        ("' OR 1=1 --", ("models", "prefix")),
        ("é\0", ("models", "prefix")),
        ("A" * 10_000, ("models", "prefix")),
        ("A", ("models", "prefix")),
    ]
    for text, scope in wrong:
        with pytest.raises(RequestError, match="page_token is none that this list gave"):
            read_token(text, *scope)


def test_a_deployment_and_its_ways(database: Database) -> None:
    run = database.run_blocking
    with pytest.raises(NotFoundError, match="model 'digits' is not registered"):
        run(lambda s: deployments.get_deployment(s, "digits"))
    for _ in range(3):
        add_version(database, "digits")
    with pytest.raises(NotFoundError, match="model 'digits' has no deployment"):
        run(lambda s: deployments.get_deployment(s, "digits"))
    wanted = replace(
        make_deployment("digits", 1),
        loaded=(1, 2),
        traffic=(TrafficTarget(1, 9_999, "stable"), TrafficTarget(2, 1, "candidate")),
        is_sticky=True,
        shadow=3,
        sampled=1_000,
        instances=4,
        previous_version=1,
        is_on_demand=True,
        rollout="r",
    )
    put = run(lambda s: deployments.put_deployment(s, wanted, actor="bo"))
    assert put == replace(wanted, generation=1, updated_at=put.updated_at, updated_by="bo")
    assert database.read_blocking(deployments.read_deployments) == (put,)
    page = database.read_blocking(lambda s: deployments.list_deployments(s, is_visible=lambda name: False))
    assert page.items == () and not page.token
    assert run(lambda s: deployments.withdraw(s, "digits", expected_generation=1)) == put
    with pytest.raises(NotFoundError):
        run(lambda s: deployments.withdraw(s, "digits"))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"version": 9}, UnknownVersion, "model 'digits' has no version 9"),
        ({"loaded": (1, 9)}, UnknownVersion, "no version 9"),
        ({"shadow": 9}, UnknownVersion, "no version 9"),
        ({"traffic": (TrafficTarget(1, 9_999),)}, RequestError, "must add up to 100 percent"),
        ({"traffic": (TrafficTarget(1, 5_000), TrafficTarget(1, 5_000))}, RequestError, "two shares"),
        ({"traffic": (TrafficTarget(2, 10_000),)}, RequestError, "a version that is not to be loaded"),
        ({"sampled": 10_001}, RequestError, "between 0 and 100 percent"),
        ({"instances": -1}, RequestError, "found -1 instances"),
    ],
)
def test_deployments_that_cannot_be(database: Database, change: dict, error: type[Exception], text: str) -> None:
    for _ in range(2):
        add_version(database, "digits")
    wanted = replace(make_deployment("digits", 1), **change)
    with pytest.raises(error, match=text):
        database.run_blocking(lambda session: deployments.put_deployment(session, wanted, actor="al"))
    assert database.read_blocking(deployments.read_deployments) == ()


def test_a_rollout_and_its_ways(database: Database) -> None:
    run = database.run_blocking
    for _ in range(2):
        add_version(database, "digits")
    plan = RolloutPlan(
        strategy=Strategy.CANARY,
        steps=(CanaryStep(1.5, 60.0), CanaryStep(50.0, 0.25)),
        gates=Gates(max_error_rate=0.01, min_agreement=None, agreement_rtol=1e-6),
    )
    begun = run(lambda s: rollouts.begin_rollout(s, make_rollout("digits", plan=plan)))
    assert begun.plan == plan and begun.began_at == NOW
    further = replace(
        begun,
        state=RolloutState.RUNNING,
        step=1,
        step_began_at=NOW + timedelta(seconds=1),
        reports=(VersionReport(1, 10, 1, 0.5, 2.5), VersionReport(2)),
        disagreements=("é differs",),
        reason="step 1",
    )
    assert run(lambda s: rollouts.put_rollout(s, further)) == further
    assert run(rollouts.read_open_rollouts) == (further,)
    assert run(lambda s: rollouts.find_open_rollout(s, "digits")) == further
    ended = replace(further, state=RolloutState.ROLLED_BACK, ended_at=NOW)
    run(lambda s: rollouts.put_rollout(s, ended))
    assert run(rollouts.read_open_rollouts) == () and run(lambda s: rollouts.find_open_rollout(s, "digits")) is None
    with pytest.raises(PreconditionFailed, match="has ended: it is rolled-back"):
        run(lambda s: rollouts.put_rollout(s, further))
    for _ in range(3):
        other = run(lambda s: rollouts.begin_rollout(s, make_rollout("digits")))
        run(lambda s, other=other: rollouts.put_rollout(s, replace(other, state=RolloutState.SUCCEEDED)))
    last = run(lambda s: rollouts.begin_rollout(s, make_rollout("digits")))
    assert run(lambda s: rollouts.find_newest_rollout(s, "digits")) == last
    listed = run(lambda s: rollouts.list_rollouts(s, "digits", size=2))
    assert [each.id for each in listed.items] == [last.id, other.id]
    assert run(lambda s: rollouts.forget_rollouts(s, "digits", kept=2)) == 3
    assert len(run(lambda s: rollouts.list_rollouts(s, "digits")).items) == 2
    with pytest.raises(NotFoundError, match="there is no rollout 'nope'"):
        run(lambda s: rollouts.get_rollout(s, "nope"))


def test_what_servers_report(database: Database) -> None:
    run = database.run_blocking
    status = ServerStatus("", "digits", 3, (VersionStatus(1, "READY"), VersionStatus(2, "LOADING", "why")), NOW, "{}")
    now = run(lambda s: servers.report(s, "a", [status, replace(status, model="other")]))
    run(lambda s: servers.report(s, "b", [status]))
    found = database.read_blocking(lambda s: servers.read_server_statuses(s, "digits", within_s=60.0))
    assert found[0] == replace(status, server="a", seen_at=now) and [each.server for each in found] == ["a", "b"]
    run(lambda s: servers.report(s, "a", [replace(status, observed_generation=4)]))
    found = database.read_blocking(servers.read_server_statuses)
    assert [(each.server, each.model, each.observed_generation) for each in found] == [
        ("a", "digits", 4),
        ("b", "digits", 3),
    ]
    long_ago = now - timedelta(hours=1)
    for table, key in ((servers.servers, "name"), (servers.server_statuses, "server")):
        run(lambda s, t=table, key=key: s.execute(update(t).where(t.c[key] == "b").values(seen_at=long_ago)))
    assert list(database.read_blocking(lambda s: servers.read_servers(s, within_s=60.0))) == ["a"]
    assert len(database.read_blocking(lambda s: servers.read_server_statuses(s, within_s=60.0))) == 1
    assert run(lambda s: servers.forget_silent_servers(s, after_s=60.0)) == ("b",)
    run(lambda s: servers.forget_server(s, "a"))
    assert database.read_blocking(servers.read_servers) == {}


def test_grants_keys_and_quotas(database: Database) -> None:
    run = database.run_blocking
    grant = run(lambda s: access.grant_role(s, "group:ml", 3, "team-a-*", actor="al"))
    assert run(lambda s: access.grant_role(s, "group:ml", 3, "team-a-*", actor="bo")) == grant
    assert run(access.access_revision) == 1
    run(lambda s: access.grant_role(s, "bo", 1, "*", actor="al"))
    assert {each.principal for each in run(access.read_grants)} == {"group:ml", "bo"}
    assert run(lambda s: access.list_grants(s, "group:ml")).items == (grant,)
    assert run(lambda s: access.revoke_role(s, grant.id)) == grant
    with pytest.raises(NotFoundError, match="there is no role binding"):
        run(lambda s: access.revoke_role(s, grant.id))
    for principal, role in (("", 1), (" al", 1), ("al\n", 1), ("al", 0), ("al", 5)):
        with pytest.raises(RequestError):
            run(lambda s, principal=principal, role=role: access.grant_role(s, principal, role, "*", actor="al"))

    expiry = NOW + timedelta(days=1)
    key = run(lambda s: access.add_api_key(s, "k1", "f" * 64, principal="bo", actor="al", expires_at=expiry))
    assert run(lambda s: access.find_api_key(s, "k1")) == key and key.expires_at == expiry
    assert [run(lambda s, id=id: access.find_api_key(s, id)) for id in ("K1", "k1 ", "k%", "")] == [None] * 4
    revoked = run(lambda s: access.revoke_api_key(s, "k1"))
    assert revoked.revoked_at is not None and run(lambda s: access.revoke_api_key(s, "k1")) == revoked
    assert run(lambda s: access.list_api_keys(s, "bo")).items == (revoked,)

    quota = access.Quota("team-a", 0.1, 1e6, 2**40)
    for _ in range(2):
        run(lambda s: access.set_quota(s, quota))
    assert run(lambda s: access.get_quota(s, "team-a")) == quota
    assert run(access.list_quotas).items == run(access.read_quotas) == (quota,)
    assert run(lambda s: access.get_quota(s, "other")) == access.Quota("other")
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="as requests_per_s; it should be 0"):
            run(lambda s, value=value: access.set_quota(s, replace(quota, requests_per_s=value)))
    assert run(access.access_revision) == 7
