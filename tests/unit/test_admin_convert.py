"""What the admin API says of a record is all of it, and what it says of a plan is taken back as the same plan."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiorch_proto.admin.v1 import deployments_pb2 as pb
from aiorch_proto.admin.v1 import registry_pb2
from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.deployments.wish import DEFAULT_STEPS
from aiorch_server.frontends.admin.convert_deployments import (
    decode_traffic,
    encode_deployment,
    encode_event,
)
from aiorch_server.frontends.admin.convert_models import (
    decode_provenance,
    encode_model,
    encode_provenance,
    encode_version,
)
from aiorch_server.frontends.admin.convert_rollouts import decode_plan, encode_plan, encode_rollout
from aiorch_server.frontends.admin.fields import InvalidField, check_paths, check_texts, read_time
from aiorch_server.registry import records
from aiorch_server.registry.records import CanaryStep, Gates, RolloutPlan, Strategy, TrafficTarget

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WHOLE = st.integers(0, 2**63 - 1)
SMALL = st.integers(0, 2**31 - 1)
TIMES = st.datetimes(datetime(1970, 1, 1), datetime(9999, 1, 1), timezones=st.just(UTC))
LABELS = st.dictionaries(TEXT, TEXT, max_size=3)
FLOATS = st.floats(allow_nan=False)
TENSORS = st.lists(
    st.builds(records.TensorSignature, TEXT, TEXT, st.lists(st.integers(-1, 2**62), max_size=4).map(tuple)), max_size=3
).map(tuple)
PROVENANCE = st.builds(
    records.Provenance,
    TEXT,
    TEXT,
    TENSORS,
    TENSORS,
    st.dictionaries(TEXT, FLOATS, max_size=3),
    TEXT,
    TEXT,
    TEXT,
    LABELS,
)
FILES = st.lists(st.builds(records.ArtefactFile, TEXT, st.integers(0, 2**40), TEXT), max_size=4).map(tuple)
MODELS = st.builds(
    records.Model, TEXT, TIMES, TEXT, TEXT, LABELS, st.dictionaries(TEXT, WHOLE, max_size=3), WHOLE, TEXT
)
VERSIONS = st.builds(
    records.ModelVersion, TEXT, WHOLE, st.builds(records.Manifest, TEXT, FILES), PROVENANCE, TIMES, TEXT, st.booleans(),
    st.lists(TEXT, max_size=3).map(tuple),
)  # fmt: skip
#: To the microsecond, as durations are told.
SECONDS = st.integers(0, 10**12).map(lambda number: number / 1e6)
RATES = st.none() | st.floats(0, 1, allow_subnormal=False)
PERCENT = st.integers(1, 10_000).map(lambda share: share / 100)
GATES = st.builds(
    Gates,
    RATES,
    st.none() | st.floats(0.01, 1e6),
    st.none() | st.floats(0.01, 1),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
    st.integers(1, 2**40),
    SECONDS,
)


@st.composite
def plans(draw: Any) -> RolloutPlan:
    strategy = draw(st.sampled_from(Strategy))
    steps: tuple[CanaryStep, ...] = ()
    if strategy is Strategy.CANARY:
        shares = sorted(draw(st.sets(PERCENT, min_size=1, max_size=6)))
        steps = tuple(CanaryStep(share, draw(SECONDS)) for share in shares)
    return RolloutPlan(
        strategy, steps, draw(GATES), draw(SECONDS), draw(PERCENT), draw(PERCENT), draw(st.booleans())
    )  # fmt: skip


REPORTS = st.builds(records.VersionReport, WHOLE, WHOLE, WHOLE, FLOATS, FLOATS, WHOLE, WHOLE)
ROLLOUTS = st.builds(
    records.Rollout, TEXT, TEXT, WHOLE, WHOLE, plans(), st.sampled_from(records.RolloutState), TIMES, TEXT, TEXT, SMALL,
    st.none() | TIMES, st.none() | TIMES,
    st.lists(REPORTS, max_size=2).map(tuple),
    st.lists(TEXT, max_size=2).map(tuple),
)  # fmt: skip
TARGETS = st.lists(st.builds(TrafficTarget, WHOLE, st.integers(0, 10_000), TEXT), max_size=3).map(tuple)
DEPLOYMENTS = st.builds(
    records.Deployment, TEXT, WHOLE, WHOLE, TIMES, TEXT, st.just(()), TARGETS, instances=SMALL, previous_version=WHOLE,
    is_on_demand=st.booleans(),
)  # fmt: skip


@given(MODELS)
def test_a_model_says_all(model: records.Model) -> None:
    message = encode_model(model)
    assert model == records.Model(
        message.name,
        message.created_at.ToDatetime(UTC),
        message.created_by,
        message.description,
        dict(message.labels),
        dict(message.aliases),
        message.latest_version,
        message.etag,
    )


@given(VERSIONS)
def test_a_version_says_all(version: records.ModelVersion) -> None:
    message = encode_version(version)
    files = tuple(records.ArtefactFile(each.path, each.size_bytes, each.sha256) for each in message.files)
    assert message.size_bytes == sum(each.size_bytes for each in files)
    assert version == records.ModelVersion(
        message.model,
        message.version,
        records.Manifest(message.digest, files),
        decode_provenance(message.provenance),
        message.created_at.ToDatetime(UTC),
        message.created_by,
        message.has_code,
        tuple(message.aliases),
    )


@given(PROVENANCE)
def test_provenance_comes_back(provenance: records.Provenance) -> None:
    assert decode_provenance(encode_provenance(provenance)) == provenance


@given(plans())
def test_a_plan_comes_back(plan: RolloutPlan) -> None:
    assert decode_plan(pb.RolloutPlan.FromString(encode_plan(plan).SerializeToString())) == plan


@given(ROLLOUTS)
def test_a_rollout_says_all(rollout: records.Rollout) -> None:
    message = encode_rollout(rollout)
    reports = tuple(
        records.VersionReport(
            each.version, each.requests, each.errors, each.p50_ms, each.p99_ms, each.compared, each.agreed
        )
        for each in message.reports
    )
    state = pb.RolloutState.Name(message.state).removeprefix("ROLLOUT_STATE_").lower().replace("_", "-")
    assert rollout == records.Rollout(
        message.id,
        message.model,
        message.from_version,
        message.to_version,
        decode_plan(message.plan),
        records.RolloutState(state),
        message.began_at.ToDatetime(UTC),
        message.began_by,
        message.reason,
        message.step,
        read_time(message, "step_began_at"),
        read_time(message, "ended_at"),
        reports,
        tuple(message.disagreements),
    )


@given(DEPLOYMENTS, st.none() | ROLLOUTS)
def test_a_deployment_says_all(deployment: records.Deployment, rollout: records.Rollout | None) -> None:
    message = encode_deployment(deployment, (), rollout)
    targets = tuple(TrafficTarget(each.version, round(each.percent * 100), each.tag) for each in message.traffic)
    assert deployment == records.Deployment(
        message.model,
        message.generation,
        message.version,
        message.updated_at.ToDatetime(UTC),
        message.updated_by,
        traffic=targets,
        instances=message.instances,
        previous_version=message.previous_version,
        is_on_demand=message.is_on_demand,
    )
    assert message.HasField("rollout") == (rollout is not None)
    if rollout is not None:
        assert message.rollout == encode_rollout(rollout)


@given(st.builds(records.Event, WHOLE, TIMES, TEXT, TEXT, TEXT, TEXT, WHOLE, TEXT))
def test_an_event_says_all(event: records.Event) -> None:
    message = encode_event(event)
    assert event == records.Event(
        message.number,
        message.time.ToDatetime(UTC),
        message.kind,
        message.actor,
        message.text,
        message.model,
        message.version,
        message.rollout,
    )


def test_what_a_plan_leaves_out() -> None:
    assert decode_plan(pb.RolloutPlan()) == RolloutPlan()
    canary = decode_plan(pb.RolloutPlan(strategy=pb.STRATEGY_CANARY))
    assert canary.steps == DEFAULT_STEPS
    assert decode_plan(pb.RolloutPlan(gates={"max_error_rate": -0.5})).gates.max_error_rate == 0.0


NAN = math.nan


@pytest.mark.parametrize(
    ("plan", "field", "problem"),
    [
        ({"strategy": 17}, "strategy", "is 17; expected one of STRATEGY_REPLACE, STRATEGY_BLUE_GREEN, STRATEGY_CANARY"),
        ({"steps": [{"percent": 1}]}, "steps", "are for STRATEGY_CANARY"),
        ({"strategy": 3, "steps": [{"percent": 101}]}, "steps[0].percent", "is 101; expected 0 to 100"),
        ({"strategy": 3, "steps": [{"percent": NAN}]}, "steps[0].percent", "is nan; expected 0 to 100"),
        ({"strategy": 3, "steps": [{"percent": 0.015}]}, "steps[0].percent", "is 0.015; expected steps of 0.01"),
        ({"strategy": 3, "steps": [{}]}, "steps[0].percent", "is 0; expected more than 0"),
        ({"strategy": 3, "steps": [{"percent": 9}, {"percent": 8}]}, "steps[1].percent", "is 8; expected more than 9"),
        ({"strategy": 3, "steps": [{"percent": 1}] * 101}, "steps", "are 101; expected at most 100"),
        ({"strategy": 3, "steps": [{"percent": 1, "bake_time": {"seconds": -1}}]}, "steps[0].bake_time", "is -1 s"),
        ({"bake_time": {"seconds": 2**62}}, "bake_time", "expected 0 to 3.16224e+07 s"),
        ({"bake_time": {"nanos": 2**31 - 1}}, "bake_time", "is 2.14748 s"),
        ({"sample_percent": -1}, "sample_percent", "is -1; expected 0 to 100"),
        ({"candidate_percent": math.inf}, "candidate_percent", "is inf; expected 0 to 100"),
        ({"gates": {"max_error_rate": 1.5}}, "gates.max_error_rate", "is 1.5; expected -inf to 1"),
        ({"gates": {"max_error_rate": NAN}}, "gates.max_error_rate", "is nan"),
        ({"gates": {"max_p99_ratio": -1}}, "gates.max_p99_ratio", "is -1; expected 0 or more"),
        ({"gates": {"max_p99_ratio": math.inf}}, "gates.max_p99_ratio", "is inf; expected 0 or more"),
        ({"gates": {"min_agreement": 2}}, "gates.min_agreement", "is 2; expected 0 to 1"),
        ({"gates": {"agreement_rtol": NAN}}, "gates.agreement_rtol", "is nan"),
        ({"gates": {"min_samples": -1}}, "gates.min_samples", "is -1"),
    ],
)
def test_plans_that_nothing_can_keep_to(plan: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(InvalidField) as raised:
        decode_plan(pb.RolloutPlan(**plan))
    assert raised.value.field == field
    assert problem in raised.value.problem
    assert str(raised.value) == f"{field}: {raised.value.problem}"


def traffic(*targets: dict[str, Any]) -> tuple[TrafficTarget, ...]:
    return decode_traffic([pb.TrafficTarget(**target) for target in targets])


def test_traffic() -> None:
    assert traffic({"version": 1, "percent": 99.99}, {"version": 2, "percent": 0.01, "tag": "candidate"}) == (
        TrafficTarget(1, 9999),
        TrafficTarget(2, 1, "candidate"),
    )


@pytest.mark.parametrize(
    ("targets", "field", "problem"),
    [
        ([], "traffic", "adds up to 0 percent; expected 100"),
        ([{"version": 1, "percent": 50}], "traffic", "adds up to 50 percent"),
        ([{"version": 1, "percent": 50}] * 2, "traffic[1].version", "is 1; expected a version, each once"),
        ([{"percent": 100}], "traffic[0].version", "is 0"),
        ([{"version": -1, "percent": 100}], "traffic[0].version", "is -1"),
        ([{"version": 1, "percent": 33.333}], "traffic[0].percent", "expected steps of 0.01"),
        ([{"version": 1, "percent": 100, "tag": "x" * 10_000}], "traffic[0].tag", "is 'xxxx"),
        ([{"version": number + 1} for number in range(17)], "traffic", "has more than 16 targets"),
    ],
)
def test_traffic_that_cannot_be(targets: list[dict[str, Any]], field: str, problem: str) -> None:
    with pytest.raises(InvalidField) as raised:
        traffic(*targets)
    assert raised.value.field == field
    assert problem in raised.value.problem
    assert len(str(raised.value)) < 300


def server(name: str, generation: int, *states: tuple[int, str, str]) -> records.ServerStatus:
    versions = tuple(records.VersionStatus(*each) for each in states)
    return records.ServerStatus(name, "m", generation, versions, datetime.now(UTC))


@pytest.mark.parametrize(
    ("servers", "state", "reason"),
    [
        ([], "PROGRESSING", "no server has reported yet"),
        ([server("a", 2, (1, "READY", ""))], "READY", ""),
        ([server("a", 1, (1, "READY", ""))], "PROGRESSING", "a has done generation 1 of 2"),
        ([server("a", 2)], "PROGRESSING", "version 1 on a is not loaded yet"),
        ([server("a", 2, (1, "LOADING", ""))], "PROGRESSING", "version 1 on a is LOADING"),
        (
            [server("a", 2, (1, "LOADING", "")), server("b", 2, (1, "UNAVAILABLE", "no such backend"))],
            "DEGRADED",
            "version 1 on b is UNAVAILABLE: no such backend",
        ),
    ],
)
def test_how_servers_add_up(servers: list[records.ServerStatus], state: str, reason: str) -> None:
    deployment = records.Deployment("m", 2, 1, datetime.now(UTC) - timedelta(seconds=1), "me", loaded=(1,))
    message = encode_deployment(deployment, servers)
    assert pb.DeploymentState.Name(message.state) == f"DEPLOYMENT_STATE_{state}"
    assert message.reason == reason
    assert [each.server for each in message.servers] == [each.server for each in servers]


def test_paths_of_a_mask() -> None:
    assert check_paths(["b", "a", "b"], ["a", "b"], "update_mask") == ("b", "a")
    with pytest.raises(InvalidField, match=r"update_mask: names 'c'; expected some of a, b"):
        check_paths(["a", "c"], ["a", "b"], "update_mask")
    with pytest.raises(InvalidField) as raised:
        check_paths(["x" * 10_000] * 3 + [str(number) for number in range(1000)], ["a"], "read_mask")
    assert len(str(raised.value)) < 300


def test_lists_that_are_too_long() -> None:
    """The first look at a request takes a bounded time, whoever sends it."""
    plan = pb.RolloutPlan(steps=[pb.CanaryStep()] * 1001)
    with pytest.raises(InvalidField, match=r"plan\.steps: has 1001 items; expected at most 1000"):
        check_texts(pb.DeployRequest(plan=plan))
    with pytest.raises(InvalidField, match="labels: has 1001 items"):
        check_texts(registry_pb2.RegisterModelRequest(labels={str(number): "" for number in range(1001)}))


@pytest.mark.parametrize("state", [state for state in records.RolloutState if not state.is_end])
def test_a_deployment_is_not_ready_while_a_rollout_is_under_way(state: records.RolloutState) -> None:
    """Also where all servers have done what is wanted of them now: more is to come."""
    now = datetime.now(UTC)
    deployment = records.Deployment("m", 2, 1, now, "me", loaded=(1,))
    rollout = records.Rollout("r1", "m", 1, 2, RolloutPlan(), state, now, "ada", "step 1 of 3")
    message = encode_deployment(deployment, [server("a", 2, (1, "READY", ""))], rollout)
    assert message.state == pb.DEPLOYMENT_STATE_PROGRESSING
    assert message.reason == f"rollout r1 to version 2 is {state.value}: step 1 of 3"
    candidate = records.Deployment("m", 2, 1, now, "me", loaded=(1, 2))
    failing = [server("a", 2, (1, "READY", ""), (2, "UNAVAILABLE", "no legs"))]
    message = encode_deployment(candidate, failing, rollout)
    assert message.state == pb.DEPLOYMENT_STATE_PROGRESSING, "the rollout decides about its candidate"
    failing = [server("a", 2, (1, "UNAVAILABLE", "no legs"), (2, "READY", ""))]
    message = encode_deployment(candidate, failing, rollout)
    assert message.state == pb.DEPLOYMENT_STATE_DEGRADED, "what serves does not any more"


@pytest.mark.parametrize("state", [state for state in records.RolloutState if state.is_end])
def test_a_deployment_is_ready_after_a_rollout(state: records.RolloutState) -> None:
    now = datetime.now(UTC)
    rollout = records.Rollout("r1", "m", 1, 2, RolloutPlan(), state, now, "ada")
    deployment = records.Deployment("m", 2, 1, now, "me", loaded=(1,))
    message = encode_deployment(deployment, [server("a", 2, (1, "READY", ""))], rollout)
    assert message.state == pb.DEPLOYMENT_STATE_READY


def test_what_failed_before_says_nothing_of_what_is_wanted_now() -> None:
    deployment = records.Deployment("m", 2, 1, datetime.now(UTC), "me", loaded=(1,))
    message = encode_deployment(deployment, [server("a", 1, (1, "UNAVAILABLE", "no legs"))])
    assert message.state == pb.DEPLOYMENT_STATE_PROGRESSING
    assert message.reason == "version 1 on a is UNAVAILABLE, of generation 1: no legs"
