"""The tuner as a state machine: against outlooks that are told to it, and against a server that is thought up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.optimizer.predict import Knobs
from aiorch_server.optimizer.sight import Sight
from aiorch_server.optimizer.tuner import TRANSITIONS, Bounds, Move, Outlook, Situation, State, Tuner

BOUNDS = Bounds(max_rows=64, max_delay_us=10_000, min_instances=1, max_instances=4)
START = Knobs(64, 0, instances=1)


@dataclass
class World:
    """Outlooks and sights of a server, by its knobs; ``truth`` is what happens, ``belief`` what is promised."""

    truth: Callable[[Knobs], Outlook]
    belief: Callable[[Knobs], Outlook] | None = None
    rate: float = 1000.0
    run_us: float = 2000.0

    def live(self, tuner: Tuner, seconds: int, since: int = 0) -> list[tuple[int, Move]]:
        """Steps once a second; gives the moves with their times."""
        moves = []
        for second in range(since, since + seconds):
            truth = self.truth(tuner.knobs)
            arrivals = round(self.rate)
            late = round(arrivals * (1 - truth.good))
            sight = Sight(1.0, arrivals, arrivals, late, 0, truth.percentile_us)
            move = tuner.step(second, sight, Situation(self.run_us, self.belief or self.truth))
            if move is not None:
                moves.append((second, move))
        return moves


def best_at(rows: int, good: float = 0.9) -> Callable[[Knobs], Outlook]:
    """A server that keeps its target the better, the nearer its cap is to ``rows``."""

    def look(knobs: Knobs) -> Outlook:
        octaves = abs(knobs.max_rows.bit_length() - rows.bit_length())
        return Outlook(max(0.0, 1.0 - octaves * (1 - good)), 0.0, 1000.0 * (1 + octaves) + knobs.delay_us)

    return look


def test_it_waits_until_run_times_are_known() -> None:
    tuner = Tuner(START, BOUNDS, allowed_misses=0.01)
    world = World(best_at(8), run_us=0.0)
    for second in range(60):
        assert tuner.step(second, Sight(1.0, 1000, 1000, 900), Situation(None, world.truth)) is None
    assert tuner.state is State.LEARNING


def test_it_walks_to_the_best_cap_and_stays() -> None:
    tuner = Tuner(START, BOUNDS, allowed_misses=0.01)
    world = World(best_at(8))
    moves = world.live(tuner, 120)
    assert tuner.knobs == Knobs(8, 0, instances=1)
    assert [move.after.max_rows for _, move in moves] == [32, 16, 8]
    assert world.live(tuner, 1800, since=120) == []


def test_a_suggestion_is_one_step() -> None:
    tuner = Tuner(START, BOUNDS, allowed_misses=0.01)
    look = best_at(8)
    for second in range(2):
        tuner.step(second, Sight(1.0, 1000, 1000, 300), Situation(2000.0, look, (Knobs(8, 0, instances=1),)))
    assert tuner.knobs.max_rows == 8


def test_a_move_that_does_harm_is_undone_and_its_knob_rests_longer_each_time() -> None:
    tuner = Tuner(START, BOUNDS, allowed_misses=0.01)

    def truth(knobs: Knobs) -> Outlook:
        return Outlook(0.98 if knobs == START else 0.5, 0.0, 5000.0)

    moves = World(truth, belief=lambda knobs: Outlook(0.98 if knobs == START else 1.0, 0.0, 5000.0)).live(tuner, 3600)
    undone = [second for second, move in moves if move.is_undone]
    assert tuner.knobs == START
    assert len(undone) * 2 == len(moves)
    assert all("did harm, in time 98.0 -> 50.0 %" in move.reason for _, move in moves if move.is_undone)
    last_ten_minutes = [second for second in undone if second >= 3000]
    assert len(last_ten_minutes) <= 3


def test_harm_is_seen_within_one_window() -> None:
    tuner = Tuner(START, BOUNDS, allowed_misses=0.01)

    def truth(knobs: Knobs) -> Outlook:
        return Outlook(0.985 if knobs == START else 0.2, 0.0, 5000.0)

    (first, _), (second, undo) = World(truth, lambda knobs: best_at(8)(knobs)).live(tuner, 12)[:2]
    assert undo.is_undone
    assert second - first <= 3


def test_an_instance_is_taken_where_it_helps_and_given_back_where_it_does_not() -> None:
    tuner = Tuner(Knobs(64, 0, instances=1), BOUNDS, allowed_misses=0.01)
    world = World(lambda knobs: Outlook(min(1.0, 0.6 * knobs.instances), 0.0, 9000.0 / knobs.instances))
    world.live(tuner, 60)
    assert tuner.knobs.instances == 2
    world.truth, world.rate = lambda knobs: Outlook(1.0, 0.0, 3000.0), 100.0
    world.live(tuner, 120, since=60)
    assert tuner.knobs.instances == 1


@pytest.mark.parametrize(("cost", "count"), [(1.0, 2), (5.0, 1)])
def test_a_dear_instance_has_to_bring_more(cost: float, count: int) -> None:
    tuner = Tuner(Knobs(64, 0, instances=1), BOUNDS, allowed_misses=0.01, instance_cost=cost)
    World(lambda knobs: Outlook(0.98 if knobs.instances == 1 else 1.0, 0.0, 5000.0)).live(tuner, 60)
    assert tuner.knobs.instances == count


@pytest.mark.parametrize(("cost", "count"), [(1.0, 2), (5.0, 1)])
def test_a_dear_instance_is_given_back_sooner(cost: float, count: int) -> None:
    tuner = Tuner(Knobs(64, 0, instances=2), BOUNDS, allowed_misses=0.01, instance_cost=cost)
    World(lambda knobs: Outlook(0.993 if knobs.instances == 1 else 0.997, 0.0, 5000.0)).live(tuner, 60)
    assert tuner.knobs.instances == count


def test_what_keeps_its_target_is_left_alone() -> None:
    tuner = Tuner(START, BOUNDS, allowed_misses=0.01)
    world = World(lambda knobs: Outlook(0.999, 0.0, 500.0 + 100 * knobs.max_rows))
    assert world.live(tuner, 120) == []


def test_what_keeps_its_target_just_about_is_not() -> None:
    tuner = Tuner(START, BOUNDS, allowed_misses=0.01, target_us=7000.0)
    World(lambda knobs: Outlook(0.999, 0.0, 500.0 + 100 * knobs.max_rows)).live(tuner, 30)
    assert tuner.knobs.max_rows < 64


def test_who_refuses_more_is_no_better_for_answering_the_others_sooner() -> None:
    tuner = Tuner(START, BOUNDS, allowed_misses=0.01)

    def look(knobs: Knobs) -> Outlook:
        return Outlook(0.6 + 0.004 * knobs.max_rows, 0.2, 1000.0 * knobs.max_rows)

    assert World(look).live(tuner, 120) == []
    assert tuner.knobs == START


def test_what_all_repetitions_say_is_sure_however_far_they_are_apart() -> None:
    tuner = Tuner(START, BOUNDS, allowed_misses=0.01)

    def look(knobs: Knobs) -> Outlook:
        good = 0.7 if knobs.max_rows == 64 else 0.75
        return Outlook(good, 0.1, 5000.0, (good - 0.1, good, good + 0.1))

    World(look).live(tuner, 20)
    assert tuner.knobs.max_rows < 64


def test_without_a_target_the_percentile_counts() -> None:
    tuner = Tuner(START, BOUNDS)
    world = World(lambda knobs: Outlook(1.0, 0.0, 500.0 + 100 * knobs.max_rows + knobs.delay_us))
    world.live(tuner, 120)
    assert tuner.knobs == Knobs(1, 0, instances=1)


def test_a_move_that_could_not_be_made() -> None:
    tuner = Tuner(START, BOUNDS, allowed_misses=0.01)
    look = best_at(8)
    tuner.step(0.0, Sight(1.0, 1000, 1000, 300), Situation(2000.0, look))
    move = tuner.step(1.0, Sight(1.0, 1000, 1000, 300), Situation(2000.0, look))
    assert move is not None
    tuner.reject(1.5, "no memory")
    assert (tuner.knobs, tuner.state, tuner.verdict) == (START, State.STEADY, "no memory")


def test_a_new_load_is_a_cause() -> None:
    tuner = Tuner(START, BOUNDS, allowed_misses=0.01)
    world = World(lambda knobs: Outlook(1.0, 0.0, 3000.0))
    world.live(tuner, 30)
    world.truth, world.rate = best_at(16), 5000.0
    moves = world.live(tuner, 10, since=30)
    assert moves
    assert moves[0][0] <= 33


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5000), st.floats(0, 1), st.floats(0, 1e6), st.one_of(st.none(), st.floats(1, 1e6)),
            st.floats(0, 1), st.floats(1, 1e6),
        ),
        max_size=200,
    ),
    st.one_of(st.none(), st.floats(0.001, 0.5)),
)  # fmt: skip
def test_whatever_is_seen_the_knobs_stay_in_bounds_and_moves_are_few(
    looks: list[tuple[int, float, float, float | None, float, float]], allowed: float | None
) -> None:
    tuner = Tuner(START, BOUNDS, allowed_misses=allowed)
    state, moves = tuner.state, 0
    for second, (arrivals, late, percentile_us, run_us, good, promised_us) in enumerate(looks):
        sight = Sight(1.0, arrivals, arrivals, round(arrivals * late), 0, percentile_us)

        def predict(knobs: Knobs, good: float = good, promised_us: float = promised_us) -> Outlook:
            return Outlook(good if knobs.max_rows % 3 else 1.0, 0.0, promised_us / knobs.instances)

        before = tuner.knobs
        move = tuner.step(second, sight, Situation(run_us, predict))
        moves += move is not None
        assert BOUNDS.hold(tuner.knobs)
        assert (move is None) == (tuner.knobs == before)
        if move is not None:
            assert move == replace(move, before=before, after=tuner.knobs)
            assert sum(a != b for a, b in zip(astuple(before), astuple(tuner.knobs), strict=True)) == 1
        assert tuner.state is state or tuner.state in TRANSITIONS[state] or state is State.JUDGING
        state = tuner.state
    assert moves <= 1 + len(looks) / 2


def test_a_miss_that_nothing_mends_is_looked_into_less_and_less_often() -> None:
    tuner, looks = Tuner(START, BOUNDS, allowed_misses=0.01), []

    def belief(knobs: Knobs) -> Outlook:
        looks.append(knobs)
        return Outlook(0.5, 0.0, 5000.0)

    world = World(lambda knobs: Outlook(0.5, 0.0, 5000.0), belief)
    world.live(tuner, 600)
    first, before = len(looks), tuner.knobs
    world.live(tuner, 600, since=600)
    assert before == tuner.knobs == START
    assert len(looks) - first <= 4 * 10


def test_states_that_do_not_follow_are_refused() -> None:
    with pytest.raises(ValueError, match="does not go from learning to judging"):
        Tuner(START, BOUNDS)._enter(State.JUDGING, 0.0)
