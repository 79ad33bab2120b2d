"""The state machine of rollouts: every step is in the table, everything ends, and what should run follows."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.deployments.rollout import (
    COMMANDS,
    TRANSITIONS,
    Command,
    Move,
    Observation,
    abandon,
    advance,
    begin,
    command,
)
from aiorch_server.deployments.samples import StepSamples, Window
from aiorch_server.deployments.wish import plan_wish
from aiorch_server.errors import InternalError, PreconditionFailed
from aiorch_server.registry.records import CanaryStep, Gates, Rollout, RolloutPlan, RolloutState, Strategy

S = RolloutState
NOW = datetime(2026, 1, 1, tzinfo=UTC)
STEPS = (CanaryStep(10.0, 10.0), CanaryStep(50.0, 10.0))
GATES = Gates(max_error_rate=0.01, max_p99_ratio=1.5, min_agreement=0.9, min_samples=100)


def rollout(strategy: Strategy = Strategy.CANARY, state: S = S.PENDING, old: int = 1, **plan: object) -> Rollout:
    options = {"steps": STEPS, "bake_s": 10.0, **plan}
    return Rollout("r1", "m", old, 2, RolloutPlan(strategy, **options), state, NOW, "ada")  # type: ignore[arg-type]


def good(count: int = 1000, agreed: int | None = None) -> Window:
    return Window(count, 0, {1_000_000: count}, count, count if agreed is None else agreed)


def seen(old: Window | None = None, new: Window | None = None, **options: object) -> Observation:
    samples = StepSamples("s", {1: old or good(), 2: new or good()}, ("a difference",))
    return Observation(**{"n_servers": 2, "samples": samples, **options})  # type: ignore[arg-type]


DONE = seen()
DEAD = seen(failures={"one": "its instances ended"})


def shares(move: Move) -> dict[int, int]:
    return {each.version: each.share for each in move.wish.traffic}


def drive(start: Rollout, *, until: S | None = None, observation: Observation = DONE, most: int = 50) -> list[Move]:
    moves, now = [begin(start)], NOW
    for _ in range(most):
        if moves[-1].rollout.state is until or moves[-1].rollout.state.is_end:
            return moves
        now += timedelta(seconds=5)
        moves.append(advance(moves[-1].rollout, observation, now))
    return moves


def states(moves: list[Move]) -> list[S]:
    found = [move.rollout.state for move in moves]
    return [state for index, state in enumerate(found) if not index or found[index - 1] is not state]


def test_canary_goes_step_by_step() -> None:
    moves = drive(rollout(gates=GATES))
    assert states(moves) == [S.PENDING, S.LOADING, S.RUNNING, S.PROMOTING, S.SUCCEEDED]
    taken = [shares(move).get(2, 0) for move in moves]
    assert [share for index, share in enumerate(taken) if not index or taken[index - 1] != share] == [
        0,
        1000,
        5000,
        10000,
    ]
    assert moves[0].wish.loaded == (1,)
    assert moves[-1].wish.loaded == (2,)
    assert moves[-1].rollout.ended_at is not None
    pairs = itertools.pairwise(moves)
    assert all(after.text for before, after in pairs if before.rollout.state is not after.rollout.state)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Strategy.REPLACE, [S.PENDING, S.LOADING, S.PROMOTING, S.SUCCEEDED]),
        (Strategy.BLUE_GREEN, [S.PENDING, S.LOADING, S.RUNNING, S.PROMOTING, S.SUCCEEDED]),
        (Strategy.SHADOW, [S.PENDING, S.LOADING, S.RUNNING, S.SUCCEEDED]),
        (Strategy.AB, [S.PENDING, S.LOADING, S.RUNNING]),
    ],
)
def test_the_other_strategies(strategy: Strategy, expected: list[S]) -> None:
    moves = drive(rollout(strategy))
    assert states(moves) == expected
    last = moves[-1].wish
    running = next((move for move in moves if move.rollout.state is S.RUNNING), None)
    match strategy:
        case Strategy.REPLACE:
            assert last.loaded == (2,)
        case Strategy.BLUE_GREEN:
            assert running and shares(running) == {1: 0, 2: 10000} and running.wish.loaded == (1, 2)
            assert last.loaded == (2,)
        case Strategy.SHADOW:
            assert running and shares(running) == {1: 10000, 2: 0}
            assert (running.wish.shadow, running.wish.sampled) == (2, 1000)
            assert last.loaded == (1,) and shares(moves[-1]) == {1: 10000}
            assert "1000 of 1000 answers agree" in moves[-1].rollout.reason
        case Strategy.AB:
            assert last.is_sticky and shares(moves[-1]) == {1: 5000, 2: 5000}


def test_the_first_version_is_loaded_at_once() -> None:
    for strategy in Strategy:
        moves = drive(rollout(strategy, old=0))
        assert states(moves) == [S.LOADING, S.PROMOTING, S.SUCCEEDED]
        assert {move.wish.loaded for move in moves} == {(2,)}
        assert len({move.wish for move in moves}) == 1, "what runs is not touched again"
    failed = drive(rollout(old=0), observation=DEAD)[-1]
    assert failed.rollout.state is S.FAILED and failed.wish.loaded == () and "on one: its inst" in failed.rollout.reason


def test_a_candidate_that_does_not_load_leaves_the_old_version_alone() -> None:
    moves = drive(rollout(), until=S.FAILED, observation=DEAD)
    assert states(moves) == [S.PENDING, S.LOADING, S.FAILED]
    assert all(shares(move).get(2, 0) == 0 for move in moves)
    assert moves[-1].wish.loaded == (1,)


@pytest.mark.parametrize("strategy", [Strategy.CANARY, Strategy.BLUE_GREEN, Strategy.SHADOW, Strategy.AB])
@pytest.mark.parametrize(
    ("observation", "words"),
    [
        (DEAD, "version 2 does not serve on one: its instances ended"),
        (seen(new=Window(3, 3)), "3 of 3 requests failed"),
        (seen(new=Window(1000, 0, {9_000_000: 1000}, 1000, 1000)), "its p99 is 9 ms, 9 times the 1 ms"),
        (seen(new=good(1000, agreed=500)), "500 of 1000 compared answers agree"),
    ],
)
def test_a_bad_candidate_is_rolled_back_at_once(strategy: Strategy, observation: Observation, words: str) -> None:
    running = drive(rollout(strategy, gates=GATES), until=S.RUNNING)[-1].rollout
    move = advance(running, observation, NOW + timedelta(seconds=16))
    assert move.rollout.state is S.ROLLING_BACK, "before the end of its time"
    assert words in move.rollout.reason and words in move.text
    assert move.wish.loaded == (1,)
    end = advance(move.rollout, seen(), NOW + timedelta(seconds=17))
    assert end.rollout.state is S.ROLLED_BACK and words in end.rollout.reason
    assert end.rollout.disagreements == ("a difference",), "what was measured stays"


def test_a_breach_pauses_where_a_person_is_to_decide() -> None:
    running = drive(rollout(gates=GATES, is_rollback_manual=True), until=S.RUNNING)[-1].rollout
    breached = seen(new=Window(3, 3))
    paused = advance(running, breached, NOW)
    assert paused.rollout.state is S.PAUSED and paused.wish == plan_wish(running)
    assert advance(paused.rollout, breached, NOW).rollout.reason == paused.rollout.reason
    assert advance(paused.rollout, DEAD, NOW).rollout.state is S.ROLLING_BACK, "what does not serve gets no requests"
    resumed = command(paused.rollout, Command.RESUME, NOW + timedelta(seconds=60), actor="ada")
    assert resumed.rollout.step_began_at == NOW + timedelta(seconds=60), "with its whole time, and new windows"


def test_the_gates_are_watched_while_it_is_paused() -> None:
    running = drive(rollout(gates=GATES), until=S.RUNNING)[-1].rollout
    paused = command(running, Command.PAUSE, NOW, actor="ada", reason="lunch")
    assert paused.rollout.reason == "ada: pause (lunch)" and paused.wish == plan_wish(running)
    late = NOW + timedelta(days=1)
    assert advance(paused.rollout, DONE, late).rollout.state is S.PAUSED
    assert advance(paused.rollout, seen(new=Window(3, 3)), late).rollout.state is S.ROLLING_BACK


def test_too_few_samples_wait_or_go_on_and_both_are_told() -> None:
    few = seen(new=good(5))
    running = drive(rollout(gates=GATES), until=S.RUNNING)[-1].rollout
    begun = running.step_began_at
    assert begun
    waits = advance(running, few, begun + timedelta(seconds=1000))
    assert waits.rollout.state is S.RUNNING and waits.rollout.step == 0
    assert "waits: the candidate has answered 5 of the 100" in waits.rollout.reason
    patient = replace(running, plan=replace(running.plan, gates=replace(GATES, max_wait_s=60.0)))
    assert advance(patient, few, begun + timedelta(seconds=69)).rollout.step == 0
    went_on = advance(patient, few, begun + timedelta(seconds=70))
    assert went_on.rollout.step == 1
    assert "went on after 60 s although the candidate has answered 5" in went_on.rollout.reason


def test_what_few_samples_show_counts_when_no_more_are_waited_for() -> None:
    running = drive(rollout(gates=replace(GATES, max_wait_s=60.0)), until=S.RUNNING)[-1].rollout
    assert running.step_began_at
    poor = seen(new=Window(20, 2, {1_000_000: 18}))
    for seconds in (10, 40, 69):
        waits = advance(running, poor, running.step_began_at + timedelta(seconds=seconds))
        assert waits.rollout.state is S.RUNNING, "by chance, perhaps"
    given_up = advance(running, poor, running.step_began_at + timedelta(seconds=70))
    assert given_up.rollout.state is S.ROLLING_BACK and "2 of 20 requests failed" in given_up.rollout.reason


def test_who_is_waited_for_and_who_is_not_is_told() -> None:
    loading = drive(rollout(), until=S.LOADING)[-1].rollout
    waits = advance(loading, seen(waiting=("two",), silent=("three",)), NOW)
    assert waits.rollout.state is S.LOADING and not waits.text
    assert (
        waits.rollout.reason == "version 2 is being loaded; waits for two; not waited for, because not heard of: three"
    )
    nobody = advance(loading, Observation(silent=("three",)), NOW)
    assert nobody.rollout.state is S.LOADING and "no server has been heard of" in nobody.rollout.reason
    goes = advance(loading, seen(silent=("three",)), NOW)
    assert goes.rollout.state is S.RUNNING and "not heard of: three" in goes.rollout.reason


def test_a_step_lasts_its_time_from_its_recorded_beginning() -> None:
    running = drive(rollout(), until=S.RUNNING)[-1].rollout
    assert running.step_began_at
    for seconds, step in ((9.9, 0), (10.0, 1)):
        assert advance(running, DONE, running.step_began_at + timedelta(seconds=seconds)).rollout.step == step
    late = running.step_began_at + timedelta(seconds=99)
    assert advance(running, seen(waiting=("two",)), late).rollout.step == 0


windows = st.builds(
    Window,
    st.integers(0, 500),
    st.integers(0, 50),
    st.dictionaries(st.integers(1, 10**8), st.integers(1, 300), max_size=3),
    st.integers(0, 500),
    st.integers(0, 500),
)
observations = st.builds(
    lambda n, waiting, silent, failures, old, new: Observation(
        n, tuple(waiting), tuple(silent), failures, StepSamples("s", {1: old, 2: new})
    ),
    st.integers(0, 2),
    st.lists(st.sampled_from(["a", "b"]), max_size=1),
    st.lists(st.sampled_from(["c"]), max_size=1),
    st.dictionaries(st.sampled_from(["a", "b"]), st.just("no"), max_size=1),
    windows,
    windows,
)
plans = st.builds(
    RolloutPlan,
    st.sampled_from(Strategy),
    st.sampled_from([(), STEPS]),
    st.sampled_from([Gates(), GATES, replace(GATES, max_wait_s=1.0)]),
    st.sampled_from([0.0, 10.0]),
    st.sampled_from([0.0, 10.0]),
    st.sampled_from([0.0, 50.0, 100.0]),
    st.booleans(),
)
rollouts = st.builds(
    lambda plan, state, old, began: Rollout(
        "r1", "m", old, 2, plan, state, NOW, "ada", step_began_at=NOW if began or state is S.RUNNING else None
    ),
    plans,
    st.sampled_from([state for state in S if not state.is_end]),
    st.sampled_from([0, 1]),
    st.booleans(),
)
times = st.integers(-10, 10_000).map(lambda seconds: NOW + timedelta(seconds=seconds))


def check(before: Rollout, move: Move) -> None:
    after = move.rollout
    is_step = (before.state, after.state) in TRANSITIONS
    assert is_step or before.state is after.state
    assert (after.ended_at is not None) is after.state.is_end
    assert {each.version for each in move.wish.traffic} <= set(move.wish.loaded)
    assert not move.wish.traffic or sum(each.share for each in move.wish.traffic) == 10_000
    assert 0 not in move.wish.loaded
    assert move.wish.traffic or not before.from_version, "what was served is served by somebody"
    if not move.text:
        assert (after.state, after.step, after.step_began_at) == (before.state, before.step, before.step_began_at)
        assert move.wish == plan_wish(before)


@given(rollouts, st.lists(st.tuples(observations | st.sampled_from(Command), times), max_size=12))
def test_whatever_is_seen_or_asked_leads_to_a_legal_state(
    start: Rollout, happenings: list[tuple[Observation | Command, datetime]]
) -> None:
    """Also where nothing was served before, in any order, with clocks that go back."""
    if not start.from_version and start.state in (S.PENDING, S.RUNNING):
        start = replace(start, state=S.LOADING, step_began_at=None)
    if not start.from_version:
        start = replace(start, step_began_at=None)
    now = start
    for happening, time in happenings:
        if now.state.is_end:
            return
        if isinstance(happening, Command):
            if now.state not in COMMANDS[happening]:
                with pytest.raises(PreconditionFailed, match="r1"):
                    command(now, happening, time, actor="ada")
                continue
            move = command(now, happening, time, actor="ada")
        else:
            move = advance(now, happening, time)
        check(now, move)
        now = move.rollout


@given(rollouts)
def test_every_rollout_ends(start: Rollout) -> None:
    """By itself while all is well, unless its plan leaves the end to a person; and always if one asks for it."""
    if not start.from_version:
        start = replace(start, state=S.LOADING, step_began_at=None)
    for verb in (Command.PROMOTE, Command.ROLLBACK, Command.ABORT):
        if start.state in COMMANDS[verb]:
            ended, now = command(start, verb, NOW, actor="ada").rollout, NOW
            for _ in range(5):
                if not ended.state.is_end:
                    ended = advance(ended, DONE, now).rollout
            assert ended.state.is_end
    if start.state is S.PAUSED:
        start = command(start, Command.RESUME, NOW, actor="ada").rollout
    plan, now, ended = start.plan, NOW, start
    is_endless = plan.strategy is Strategy.AB or (plan.strategy is Strategy.SHADOW and not plan.bake_s)
    for _ in range(20):
        if ended.state.is_end:
            break
        now += timedelta(seconds=60)
        ended = advance(ended, DONE, now).rollout
    assert ended.state.is_end or (is_endless and ended.state is S.RUNNING)
    assert ended.state in (S.SUCCEEDED, S.ROLLED_BACK, S.RUNNING)


def test_the_first_version_comes_from_nowhere() -> None:
    assert " of 'm' to version 2 (canary) began" in begin(rollout(old=0)).text
    assert " of 'm' from version 1 to 2 (canary) began" in begin(rollout()).text


def test_commands_that_come_too_late_name_the_state() -> None:
    ended = rollout(state=S.SUCCEEDED)
    for verb in Command:
        with pytest.raises(PreconditionFailed, match=r"rollout r1 of 'm' from version 1 to 2 \(canary\) is succeeded"):
            command(ended, verb, NOW, actor="ada")
    with pytest.raises(PreconditionFailed, match="it cannot promote from there"):
        command(rollout(state=S.ROLLING_BACK), Command.PROMOTE, NOW, actor="ada")


def test_requests_that_do_not_come_back_are_waited_for_longer_than_max_wait() -> None:
    running = drive(rollout(gates=Gates(max_error_rate=0.01, min_samples=100, max_wait_s=5.0)), until=S.RUNNING)[-1]
    late = NOW + timedelta(hours=1)
    stuck = advance(running.rollout, seen(new=Window(3, stuck_s=4)), late)
    assert stuck.rollout.state is S.RUNNING and "waits: nothing has come back for 4 s" in stuck.rollout.reason
    hung = advance(stuck.rollout, seen(new=Window(3, stuck_s=10)), late)
    assert hung.rollout.state is S.ROLLING_BACK and "it hangs" in hung.rollout.reason
    well = advance(stuck.rollout, seen(new=Window(3)), late)
    assert well.rollout.step == 1, "few samples alone are no reason to wait for ever"


@pytest.mark.parametrize("state", [state for state in S if not state.is_end])
def test_a_deployment_that_is_taken_away_ends_its_rollout_as_the_table_says(state: S) -> None:
    ended = abandon(rollout(state=state), "ada: undeploy", NOW)
    assert (ended.state, ended.reason, ended.ended_at) == (S.ABORTED, "ada: undeploy", NOW)
    assert (state, S.ABORTED) in TRANSITIONS


def test_what_has_ended_is_not_ended_again() -> None:
    with pytest.raises(InternalError, match="cannot go from succeeded to aborted"):
        abandon(rollout(state=S.SUCCEEDED), "ada: undeploy", NOW)
