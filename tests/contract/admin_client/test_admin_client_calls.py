"""Every call of the admin client against a scripted server: values, pages, errors, repetition."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime

import grpc
import pytest
from aiorch_client import NotFoundError, RequestError, ServerError, UnavailableError, UnreachableError
from aiorch_client.admin import (
    AdminClient,
    AsyncAdminClient,
    CanaryStep,
    DeploymentState,
    Gates,
    Objective,
    Role,
    RolloutPlan,
    RolloutState,
    Strategy,
    TrafficTarget,
)
from aiorch_client.admin.calls import ADMIN_RETRIES, AdminLayer
from aiorch_client.admin.follow import Watch
from aiorch_proto.admin.v1 import deployments_pb2
from aiorch_proto.admin.v1.service import METHODS
from scripted_admin import STATUS, Refusal, ScriptedAdmin


def make_rollout(state: str, **fields: object) -> deployments_pb2.Rollout:
    number = deployments_pb2.RolloutState.Value(f"ROLLOUT_STATE_{state}")
    return deployments_pb2.Rollout(id="r1", model="digits", from_version=1, to_version=2, state=number, **fields)


def test_models(server: ScriptedAdmin, client: AdminClient) -> None:
    made = client.register_model("digits", description="d", labels={"team": "a"})
    assert (made.name, made.description, made.labels, made.created_at) == ("digits", "d", {"team": "a"}, None)
    assert client.get_model("digits") == made
    assert client.update_model("digits", labels={"team": "b"}).labels == {"team": "b"}
    assert list(server.requests["UpdateModel"][0].update_mask.paths) == ["labels"]
    for name in "abcdefgh":
        client.register_model(name)
    assert [model.name for model in client.list_models()] == [*"abcd", "digits", *"efgh"]
    assert [request.page_token for request in server.requests["ListModels"]] == ["", "3", "6"]
    client.delete_model("digits")
    with pytest.raises(NotFoundError) as raised:
        client.get_model("digits")
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")
    assert raised.value.details == "model 'digits' is not registered"


def test_plans_travel_whole(server: ScriptedAdmin, client: AdminClient) -> None:
    gates = Gates(0.0, 1.5, 0.99, 1e-3, 1e-2, 500, 30.0)
    plan = RolloutPlan(Strategy.CANARY, (CanaryStep(1, 0.5), CanaryStep(10, 60)), gates, 5.0, 20.0, 30.0, True)
    client.register_model("digits")
    server.models["digits"].latest_version = 2
    client.deploy("digits", plan=plan, instances=3, is_on_demand=True, expected_generation=4)
    request = server.requests["Deploy"][0]
    assert (request.instances, request.is_on_demand, request.expected_generation) == (3, True, 4)
    assert request.plan.gates.max_error_rate < 0, "no error at all is allowed"
    server.rollouts.append(make_rollout("RUNNING", plan=request.plan))
    assert client.get_rollout("r1").plan == plan
    server.rollouts[0].plan.strategy = 77  # of a newer server
    assert client.get_rollout("r1").plan.strategy is Strategy.UNSPECIFIED


def test_deployments(server: ScriptedAdmin, client: AdminClient) -> None:
    client.register_model("digits")
    server.models["digits"].latest_version = 2
    made = client.deploy("digits", 2)
    assert (made.generation, made.version, made.state, made.rollout) == (1, 2, DeploymentState.READY, None)
    assert made.traffic == (TrafficTarget(2, 100.0, "stable"),)
    assert client.scale("digits", 4).instances == 4
    shares = [TrafficTarget(1, 99.5), TrafficTarget(2, 0.5, "candidate")]
    assert client.set_traffic("digits", shares).traffic == tuple(shares)
    assert [each.model for each in client.list_deployments()] == ["digits"]
    assert client.wait_ready("digits") == client.get_deployment("digits")
    with pytest.raises(RequestError, match="no rollout is under way") as raised:
        client.promote("digits")
    assert raised.value.reason == "PRECONDITION_FAILED"
    report = deployments_pb2.VersionReport(version=2, requests=300, p99_ms=1.5)
    server.rollouts.append(make_rollout("ROLLED_BACK", reason="too slow", reports=[report]))
    calls = (client.promote, client.pause, client.resume, client.abort, client.rollback)
    for call in calls:
        assert call("digits").state is RolloutState.ROLLED_BACK
    assert client.rollback("digits", reason="because").reason == "too slow"
    assert server.requests["Rollback"][-1].reason == "because"
    (rollout,) = client.list_rollouts("digits")
    found = rollout.report(2)
    assert found is not None and (found.requests, found.p99_ms, rollout.report(1)) == (300, 1.5, None)
    client.undeploy("digits")
    with pytest.raises(NotFoundError):
        client.get_deployment("digits")


def test_access_and_audit(server: ScriptedAdmin, client: AdminClient) -> None:
    identity = client.who_am_i()
    assert (identity.principal, identity.bindings[0].role, identity.expires_at) == ("ann", Role.DEPLOYER, None)
    assert client.list_permissions()[0].role is Role.DEPLOYER
    assert [each.id for each in client.list_bindings("ann")] == ["b1"]
    granted = client.grant("bob", Role.VIEWER, "digits")
    assert (granted.principal, granted.role, granted.models) == ("bob", Role.VIEWER, "digits")
    client.revoke("b2")
    until = datetime(2030, 1, 2, tzinfo=UTC)
    made = client.create_key("bob", tenant="t", expires_at=until)
    assert (made.secret, made.key.expires_at) == ("aio_k123_hush", until)
    assert "hush" not in repr(made)
    with pytest.raises(RequestError, match="no time zone"):
        client.create_key("bob", expires_at=datetime(2030, 1, 2))
    assert [each.id for each in client.list_keys()] == ["k123"]
    client.revoke_key("k123")
    assert client.get_quota("ann").requests_per_s == 5
    assert client.set_quota("ann", max_in_flight=0, rows_per_s=2.5).rows_per_s == 2.5
    assert list(server.requests["SetQuota"][0].update_mask.paths) == ["rows_per_s", "max_in_flight"]
    assert [each.tenant for each in client.list_quotas()] == ["ann"]
    (entry,) = client.query_audit(model="digits", since=until)
    assert (entry.number, entry.outcome, entry.time) == (7, "OK", None)
    assert client.verify_audit().is_intact
    assert client.verify_audit(known_number=3, known_hash="bad").broken_at == 3


def test_objectives(server: ScriptedAdmin, client: AdminClient) -> None:
    with pytest.raises(NotFoundError, match="has no objective"):
        client.get_objective("digits")
    made = client.set_objective("digits", percentile=99.0, latency_us=50_000, priority=0)
    assert made == Objective("digits", percentile=99.0, latency_us=50_000) == client.get_objective("digits")
    assert list(server.requests["SetObjective"][0].update_mask.paths) == ["percentile", "latency_us", "priority"]
    assert client.set_objective("digits", min_instances=2, error_budget=0.01).latency_us == 50_000
    with pytest.raises(RequestError, match="nothing to set"):
        client.set_objective("digits")
    assert len(server.requests["SetObjective"]) == 2
    explanation = client.explain("digits")
    assert (explanation.knobs, explanation.objective) == ({"instances": 2.0}, client.get_objective("digits"))
    (decision,) = explanation.decisions
    assert (decision.knob, decision.before, decision.after, decision.reason) == ("instances", 1, 2, "p99 was 61 ms")
    assert decision.time == datetime.fromtimestamp(1_700_000_000, UTC)
    assert client.explain("other").objective is None


def test_a_server_without_an_optimizer_explains_nothing(server: ScriptedAdmin, client: AdminClient) -> None:
    server.refusals["Explain"].append(Refusal(STATUS.UNIMPLEMENTED, "this server has no optimizer", "UNSUPPORTED"))
    with pytest.raises(RequestError, match="no optimizer") as raised:
        client.explain("digits")
    assert (raised.value.code, raised.value.reason) == (STATUS.UNIMPLEMENTED, "UNSUPPORTED")


def test_a_change_keeps_its_key_over_repetitions(server: ScriptedAdmin, client: AdminClient) -> None:
    """The answer was lost twice after the change was made: it is made once, and its first answer comes."""
    late = Refusal(STATUS.UNAVAILABLE, "away", "OUTCOME_UNKNOWN", is_late=True)
    server.refusals["RegisterModel"].extend((late, late))
    assert client.register_model("digits").name == "digits"
    keys = [request.idempotency_key for request in server.requests["RegisterModel"]]
    assert len(keys) == 3 and len(set(keys)) == 1 and len(keys[0]) == 36
    client.register_model("other")
    assert server.requests["RegisterModel"][-1].idempotency_key != keys[0]
    assert not server.requests["GetModel"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (STATUS.FAILED_PRECONDITION, RequestError),
        (STATUS.ABORTED, UnavailableError),
        (STATUS.RESOURCE_EXHAUSTED, RequestError),
        (STATUS.INTERNAL, ServerError),
        (STATUS.PERMISSION_DENIED, RequestError),
        (STATUS.DATA_LOSS, ServerError),
        (STATUS.DEADLINE_EXCEEDED, UnavailableError),
    ],
)
def test_only_unavailable_is_tried_again(
    server: ScriptedAdmin, client: AdminClient, code: grpc.StatusCode, error: type[Exception]
) -> None:
    server.refusals["RegisterModel"].append(Refusal(code, "text", "WHY"))
    with pytest.raises(error, match="text") as raised:
        client.register_model("digits")
    assert raised.value.reason == "WHY"  # type: ignore[attr-defined]
    assert len(server.requests["RegisterModel"]) == 1


def test_repetition_ends(server: ScriptedAdmin, client: AdminClient) -> None:
    server.refusals["GetModel"].extend(
        [Refusal(STATUS.UNAVAILABLE, "the database is away", "REGISTRY_UNAVAILABLE")] * 9
    )
    with pytest.raises(UnavailableError, match="the database is away"):
        client.get_model("digits")
    assert len(server.requests["GetModel"]) == 6
    server.refusals["GetModel"].clear()
    server.refusals["GetModel"].append(Refusal(STATUS.UNAVAILABLE, "later", "X", retry_after_s=30.0))
    with pytest.raises(UnavailableError, match="later") as raised:
        client.get_model("digits", timeout_s=5.0)  # the pause would not fit
    assert raised.value.retry_after_s == 30.0
    with pytest.raises(RequestError, match="timeout_s is -1"):
        client.get_model("digits", timeout_s=-1)


def test_credentials_go_along(server: ScriptedAdmin) -> None:
    with AdminClient(server.url, token="aio_k_s", metadata={"x-team": "a"}) as client:
        client.who_am_i()
    assert server.metadata[-1]["authorization"] == "Bearer aio_k_s"
    assert server.metadata[-1]["x-team"] == "a"


def test_nobody_there_and_closed() -> None:
    client = AdminClient("127.0.0.1:1")
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1"):
        client.connect(2.0)
    client.close()
    with pytest.raises(RequestError, match="closed"):
        client.get_model("digits")


def test_waiting_for_an_end(server: ScriptedAdmin, client: AdminClient) -> None:
    for state in ("PENDING", "LOADING", "RUNNING", "ROLLED_BACK"):
        server.rollouts.append(make_rollout(state, reason=state.lower()))
    seen: list[RolloutState] = []
    ended = client.wait("r1", look_s=0.01, on_look=lambda rollout: seen.append(rollout.state))
    assert (ended.state, ended.reason, ended.state.is_end) == (RolloutState.ROLLED_BACK, "rolled_back", True)
    assert [state.value for state in seen] == ["pending", "loading", "running", "rolled-back"]
    server.rollouts[0].state = deployments_pb2.ROLLOUT_STATE_PROMOTING
    with pytest.raises(UnavailableError, match=r"is promoting, and has not ended within 0\.05 s"):
        client.wait(ended, timeout_s=0.05, look_s=0.01)


UNDECIDED = [
    make_rollout("PAUSED", reason="by ann"),
    make_rollout("RUNNING", plan=deployments_pb2.RolloutPlan(strategy="STRATEGY_AB", bake_time={"seconds": 9})),
    make_rollout("RUNNING", plan=deployments_pb2.RolloutPlan(strategy="STRATEGY_SHADOW")),
]


@pytest.mark.parametrize("rollout", UNDECIDED)
def test_waiting_ends_where_only_a_person_can_go_on(
    server: ScriptedAdmin, client: AdminClient, rollout: deployments_pb2.Rollout
) -> None:
    server.rollouts.extend((make_rollout("LOADING"), rollout))
    found = client.wait("r1", timeout_s=5, look_s=0.01)
    assert found.is_undecided and not found.state.is_end and found.reason == rollout.reason
    state = deployments_pb2.DEPLOYMENT_STATE_PROGRESSING
    server.deployments["digits"] = deployments_pb2.Deployment(model="digits", state=state, rollout=rollout)
    deployment = client.wait_ready("digits", timeout_s=5, look_s=0.01)
    assert deployment.state is DeploymentState.PROGRESSING and deployment.rollout == found


def test_waiting_goes_on_where_no_person_is_needed(server: ScriptedAdmin, client: AdminClient) -> None:
    shadow = deployments_pb2.RolloutPlan(strategy="STRATEGY_SHADOW", bake_time={"seconds": 9})
    server.rollouts.extend((make_rollout("RUNNING", plan=shadow), make_rollout("SUCCEEDED", plan=shadow)))
    assert client.wait("r1", look_s=0.01).state is RolloutState.SUCCEEDED


def test_a_watch_that_was_silent_and_well_was_no_failed_attempt() -> None:
    now = [100.0]
    layer = AdminLayer(timeout_s=60.0, retry=ADMIN_RETRIES, clock_s=lambda: now[0], draw=lambda: 0.5)
    watch = Watch(layer, "", 0, patience_s=60.0)
    away = UnavailableError("the connection is too old", code=STATUS.UNAVAILABLE)
    pauses = []
    for _ in range(10):
        watch.begin(())
        now[0] += 1800.0
        pauses.append(watch.pause_s(away))
    assert pauses == [pauses[0]] * 10
    begun = now[0]
    with pytest.raises(UnavailableError):  # it answers, and ends at once, again and again
        while True:
            watch.begin(())
            now[0] += watch.pause_s(away)
    assert 50.0 <= now[0] - begun <= 60.0


def make_event(number: int) -> deployments_pb2.Event:
    return deployments_pb2.Event(number=number, kind="rollout.step", model="digits", text=f"step {number}")


def test_a_watch_goes_on_behind_the_last_event(server: ScriptedAdmin, client: AdminClient) -> None:
    away = Refusal(STATUS.UNAVAILABLE, "the server is stopping")
    server.watches.extend([([make_event(3), make_event(5)], away), ([], away), ([make_event(9)], None)])
    watch = client.watch("digits", after=2)
    assert [next(watch).number for _ in range(3)] == [3, 5, 9]
    assert [request.after for request in server.requests["WatchEvents"]] == [2, 5, 5]
    watch.close()
    server.watches.append(([make_event(1)], Refusal(STATUS.FAILED_PRECONDITION, "not kept any more")))
    watch = client.watch(after=0)
    assert next(watch).text == "step 1"
    with pytest.raises(RequestError, match="not kept"):
        next(watch)
    server.watches.extend([([], away)] * 50)
    with pytest.raises(UnavailableError, match="stopping"):
        next(client.watch(patience_s=0.2))


def test_a_watch_from_now_on_keeps_its_place_before_its_first_event(server: ScriptedAdmin, client: AdminClient) -> None:
    """What happens between a lost connection and the next one must be seen."""
    away = Refusal(STATUS.UNAVAILABLE, "the server is stopping")
    server.last_event = 7
    server.watches.extend([([], away), ([], away), ([make_event(9)], None)])
    watch = client.watch()
    assert next(watch).number == 9
    assert [request.after for request in server.requests["WatchEvents"]] == [-1, 7, 7]
    watch.close()
    server.last_event = None  # of an older server, nothing better is known
    server.watches.extend([([], away), ([make_event(11)], None)])
    watch = client.watch()
    assert next(watch).number == 11
    assert [request.after for request in server.requests["WatchEvents"][3:]] == [-1, -1]
    watch.close()


async def test_an_asyncio_watch_from_now_on_keeps_its_place(
    server: ScriptedAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Watch.begin

    def begin_and_tell(watch: Watch, metadata: object) -> None:
        begin(watch, metadata)
        server.may_end.set()

    monkeypatch.setattr(Watch, "begin", begin_and_tell)
    server.may_end.clear()
    away = Refusal(STATUS.UNAVAILABLE, "the server is stopping")
    server.last_event = 7
    server.watches.extend([([], away), ([make_event(9)], None)])
    async with AsyncAdminClient(server.url) as client:
        watch = client.watch()
        assert (await anext(watch)).number == 9
        assert [request.after for request in server.requests["WatchEvents"]] == [-1, 7]
        await watch.aclose()  # type: ignore[attr-defined]


def test_closing_ends_a_watch(server: ScriptedAdmin, client: AdminClient) -> None:
    server.watches.append(([make_event(1)], None))
    watch = client.watch()
    next(watch)
    client.close()
    with pytest.raises(RequestError, match="closed"):
        next(watch)


async def test_asyncio(server: ScriptedAdmin) -> None:
    async with AsyncAdminClient(server.url) as client:
        await client.connect()
        for name in "abcde":
            await client.register_model(name)
        assert [model.name async for model in client.list_models()] == list("abcde")
        late = Refusal(STATUS.UNAVAILABLE, "away", is_late=True)
        server.refusals["DeleteModel"].append(late)
        await client.delete_model("a")
        assert len({request.idempotency_key for request in server.requests["DeleteModel"]}) == 1
        assert (await client.who_am_i()).principal == "ann"
        assert (await client.set_objective("b", latency_us=7)) == await client.get_objective("b")
        assert (await client.explain("b")).objective == Objective("b", latency_us=7)
        server.rollouts.extend((make_rollout("RUNNING"), make_rollout("SUCCEEDED")))
        assert (await client.wait("r1", look_s=0.01)).state is RolloutState.SUCCEEDED
        away = Refusal(STATUS.UNAVAILABLE, "the server is stopping")
        server.watches.extend([([make_event(3)], away), ([make_event(9)], None)])
        watch = client.watch(after=2)
        assert [(await anext(watch)).number for _ in range(2)] == [3, 9]
        await watch.aclose()  # type: ignore[attr-defined]
        watch = client.watch()
        server.watches.append(([make_event(1)], None))
        await anext(watch)
        await client.close()
        with pytest.raises(RequestError, match="closed"):
            await anext(watch)


def test_both_clients_have_the_same_calls() -> None:
    def describe(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(value).parameters)
            for name, value in inspect.getmembers(kind, callable)
            if not name.startswith("_") and name not in ("close", "connect")
        }

    assert describe(AdminClient) == describe(AsyncAdminClient)


def test_every_method_of_the_api_can_be_called() -> None:
    from aiorch_client.admin import access_calls, deployment_calls, push, registry_calls, tuning_calls

    modules = (access_calls, deployment_calls, registry_calls, push, tuning_calls)
    sources = "".join(map(inspect.getsource, modules))
    sources += '"Deployments.WatchEvents"'
    left = [
        method.path
        for method in METHODS.values()
        if f'"{method.service.rpartition(".")[2]}.{method.name}"' not in sources
    ]
    assert left == []
