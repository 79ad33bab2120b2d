"""The knee of a curve, and a tuner that keeps the cap there: against curves that are told to it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from aiorch_server.optimizer.knee import KneeTuner, find_knee
from aiorch_server.optimizer.predict import Knobs
from aiorch_server.optimizer.service_time import Estimate
from aiorch_server.optimizer.sight import Sight
from aiorch_server.optimizer.tuner import Bounds, Move, Outlook, Situation

BOUNDS = Bounds(max_rows=32, max_delay_us=0, min_instances=1, max_instances=1)
Cost = Callable[[int], float]


def falling(rows: int) -> float:
    """ms of a row in a batch of so many: as of a small network, each doubling is worth it."""
    return 0.5 / rows + 0.02


def bent(rows: int) -> float:
    """As of a transformer on one core: batches of 8 are cheapest."""
    return 9.0 + 2.0 * abs(math.log2(rows / 8)) ** 2 / 9


def curve(cost: Cost, error: float = 0.005) -> list[Estimate]:
    return [Estimate(rows, cost(rows) * rows * 1e6, error * cost(rows) * rows * 1e6, 0.01) for rows in range(1, 33)]


@pytest.mark.parametrize(("cost", "cap"), [(falling, 32), (bent, 4), (lambda rows: 5.0, 1)])
def test_the_knee_is_where_rows_get_no_cheaper(cost: Cost, cap: int) -> None:
    found = find_knee(curve(cost), cap=32, largest_seen=32, most=32)
    assert (found.rows if found else 32) == cap


def test_what_was_not_seen_is_not_presumed() -> None:
    assert find_knee(curve(bent), cap=32, largest_seen=5, most=32) is None
    assert find_knee(curve(bent), cap=32, largest_seen=0, most=32) is None
    assert find_knee(curve(bent, error=0.09), cap=32, largest_seen=32, most=32) is None
    found = find_knee(curve(bent), cap=32, largest_seen=12, most=32)
    assert found is not None
    assert found.rows == 4


def test_a_cap_is_raised_where_larger_batches_proved_better() -> None:
    found = find_knee(curve(falling), cap=4, largest_seen=32, most=32)
    assert found is not None
    assert found.rows > 24
    assert "rows are cheaper in larger batches" in found.reason
    assert find_knee(curve(lambda rows: 10 - rows / 100), cap=4, largest_seen=32, most=32) is None, "4 % are not enough"


def live(tuner: KneeTuner, believed: Cost, true_ms: Cost, seconds: range) -> list[Move]:
    """Steps once a second under a steady load of full batches."""
    moves = []
    for second in seconds:
        cap = tuner.knobs.max_rows
        sight = Sight(1.0, 500, 500, 0, 0, 3e3 * cap * true_ms(cap), rows=500, busy_us=500e3 * true_ms(cap))
        knee = find_knee(curve(believed), cap=cap, largest_seen=32, most=32)
        move = tuner.step(second, sight, Situation(1000.0, lambda knobs: Outlook(0, 0, 0), knee=knee))
        moves += [move] if move else []
    return moves


def test_the_cap_goes_there_once_and_stays() -> None:
    tuner = KneeTuner(Knobs(32), BOUNDS)
    (move,) = live(tuner, bent, bent, range(3600))
    assert (move.after, move.is_undone) == (Knobs(4), False)
    assert "rows get no cheaper" in move.reason
    assert "percentile" in tuner.verdict


def test_harm_is_undone_and_tried_less_and_less_often() -> None:
    tuner = KneeTuner(Knobs(32), BOUNDS)
    moves = live(tuner, bent, lambda rows: 9.0 if rows == 32 else 50.0 / rows + 1000, range(3600))
    assert tuner.knobs == Knobs(32)
    assert len(moves) <= 20
    assert all(move.is_undone for move in moves[1::2])


def test_a_queue_that_grows_anyway_is_no_reason_to_go_back() -> None:
    tuner = KneeTuner(Knobs(32), BOUNDS)
    for second in range(60):
        knee = find_knee(curve(bent), cap=tuner.knobs.max_rows, largest_seen=32, most=32)
        sight = Sight(1.0, 500, 300, 0, 0, 1e5 * (second + 1), rows=300, busy_us=1e6)
        tuner.step(second, sight, Situation(1000.0, lambda knobs: Outlook(0, 0, 0), knee=knee))
    assert tuner.knobs == Knobs(4)
