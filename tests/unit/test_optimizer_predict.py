"""Windows say what happened, and predictions what would."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
import pytest

from aiorch_server._core import Histogram, simulate
from aiorch_server.optimizer.arrivals import OnOff
from aiorch_server.optimizer.predict import Demand, Knobs, Scenario, Surroundings
from aiorch_server.optimizer.runs import Stalls
from aiorch_server.optimizer.service_time import Estimate
from aiorch_server.optimizer.window import Window, find_percentile
from aiorch_server.types import RunObservation, SchedulerObservation

MLP = tuple(Estimate(rows, 150e3 + 20e3 * rows, 2e3, 0.1) for rows in (1, 2, 4, 8, 16, 32))
NOTHING = SchedulerObservation(
    at_ns=5_000_000_000, arrivals=0, arrived_rows=0, answered=0, answered_rows=0, failed=0, refused_full=0,
    refused_late=0, dropped_late=0, in_time=0, late=0, waiting=0, waiting_rows=0, running=0, instances=2,
    busy_instances=0, gaps_ns=0, gap_squares=0.0, slots=0, slot_squares=0.0, runs=(), durations={},
)  # fmt: skip
LATER = dataclasses.replace(
    NOTHING, at_ns=7_000_000_000, arrivals=100, arrived_rows=250, answered=80, answered_rows=200, in_time=60, late=20,
    refused_late=5, dropped_late=4, refused_full=1, waiting=10, waiting_rows=25, slots=200, slot_squares=150.0,
    runs=(RunObservation(1, 10, 1_000_000, 1.1e11), RunObservation(8, 20, 6_000_000, 2e12)),
    durations={1088: 40, 2176: 40},
)  # fmt: skip


def test_a_window_is_the_difference() -> None:
    window = Window.between(NOTHING, LATER)
    assert window.length_s == 2.0 and window.rate == 50.0 and window.rows_per_request == 2.5
    assert window.goodput == 30.0 and window.lost == 10
    assert window.busy == pytest.approx(7e-3 / 2 / 2)
    assert window.slots.rate == 50.0
    more = dataclasses.replace(
        LATER, at_ns=8_000_000_000, arrivals=110, runs=(*LATER.runs[:1], RunObservation(8, 21, 6_300_000, 2.09e12))
    )
    window = Window.between(LATER, more)
    assert [(run.rows, run.executions, run.sum_ns) for run in window.runs] == [(8, 1, 300_000)]
    assert window.durations == {} and window.percentile(0.99) is None and window.part_above(1.0) == 0.0


def test_observations_that_make_no_window_are_refused() -> None:
    for before, after in ((LATER, NOTHING), (LATER, LATER), (LATER, dataclasses.replace(NOTHING, at_ns=9_000_000_000))):
        with pytest.raises(ValueError, match="two observations"):
            Window.between(before, after)


def test_run_times_are_differences_even_where_counts_ran_over() -> None:
    before = dataclasses.replace(LATER, runs=(RunObservation(1, 10, 1_000_000, 1.1e11, {1152: 2**32 - 2, 1280: 5}),))
    runs = (RunObservation(1, 20, 2_000_000, 2.2e11, {1152: 3, 1280: 5, 1408: 1}),)
    after = dataclasses.replace(LATER, at_ns=8_000_000_000, runs=runs)
    assert Window.between(before, after).runs[0].times == {1152: 5, 1408: 1}


def histogram_of(values: np.ndarray) -> dict[int, int]:
    histogram = Histogram()
    for value in values.tolist():
        histogram.record(int(value))
    return dict(histogram.bounds())


def test_percentiles_are_those_of_what_was_recorded() -> None:
    values = np.random.default_rng(1).lognormal(14, 0.7, 20_000)
    durations = histogram_of(values)
    for quantile in (0.5, 0.9, 0.99):
        found = find_percentile(durations, quantile)
        assert found is not None and found.answers == 20_000
        assert found.value_ns == pytest.approx(np.quantile(values, quantile), rel=0.02)
        assert found.low_ns < found.value_ns < found.high_ns
    window = dataclasses.replace(Window.between(NOTHING, LATER), durations=durations)
    limit = float(np.quantile(values, 0.95))
    assert window.part_above(limit) == pytest.approx(0.05, abs=0.003)


def test_bounds_of_percentiles_hold_as_often_as_they_say() -> None:
    held = 0
    truth = math.exp(14 + 0.7 * 2.3263)
    for seed in range(200):
        found = find_percentile(histogram_of(np.random.default_rng(seed).lognormal(14, 0.7, 2000)), 0.99)
        assert found is not None
        held += found.low_ns <= truth <= found.high_ns
    assert held >= 182


def test_too_few_answers_have_no_upper_bound() -> None:
    found = find_percentile({1088: 50}, 0.99)
    assert found is not None and found.high_ns == math.inf and found.low_ns < 1088
    assert find_percentile({}, 0.99) is None
    with pytest.raises(ValueError):
        find_percentile({1088: 1}, 1.0)


def test_predictions_are_those_of_the_truth_in_the_long_run() -> None:
    scenario = Scenario.of(MLP, OnOff.steady(3000.0), demand=Demand(target_us=3000), repetitions=8)
    predicted = scenario.predict(Knobs(max_rows=16))
    random = np.random.default_rng(99)
    times = np.cumsum(random.exponential(1e9 / 3000, 400_000)).astype(np.int64)
    long = simulate(
        times, truth=[(each.rows, round(each.mean_ns)) for each in MLP], max_rows=16, spreads=[0.1] * len(MLP),
        noise=random.standard_normal(9999),
    )  # fmt: skip
    assert predicted.percentile_ns == pytest.approx(np.quantile(long.latencies_ns, 0.99), rel=0.1)
    assert predicted.median_ns == pytest.approx(np.median(long.latencies_ns), rel=0.05)
    assert predicted.goodput == pytest.approx(3000, rel=0.05)
    busy = (long.batch_ends_ns - long.batch_starts_ns).sum() / times[-1]
    assert predicted.busy == pytest.approx(busy, rel=0.03)
    assert predicted.lost == 0 and predicted.late < 0.05


def test_candidates_are_told_apart() -> None:
    scenario = Scenario.of(MLP, OnOff.steady(10_000.0), demand=Demand(target_us=10_000))
    alone, batched = scenario.predict(Knobs(max_rows=1)), scenario.predict(Knobs(max_rows=32))
    assert batched.goodput > 0.95 * 10_000 > 2 * alone.goodput
    assert batched.rows_per_batch > 1.9 and alone.rows_per_batch == 1.0
    overload = Scenario.of(MLP, OnOff.steady(80_000.0), demand=Demand(target_us=10_000))
    waiting, shedding = overload.predict(Knobs(32)), overload.predict(Knobs(32, is_shedding=True))
    assert shedding.goodput > 2 * waiting.goodput
    assert shedding.lost > 0.3 and shedding.late < 0.1
    two = overload.predict(Knobs(32, is_shedding=True, instances=2))
    assert two.goodput > 1.5 * shedding.goodput
    one_core = Scenario.of(
        MLP, OnOff.steady(80_000.0), demand=Demand(target_us=10_000), surroundings=Surroundings(slowdowns=(1.0, 2.0))
    )
    assert one_core.predict(Knobs(32, is_shedding=True, instances=2)).goodput < 1.2 * shedding.goodput


def test_the_same_seed_predicts_the_same() -> None:
    first, second = (Scenario.of(MLP, OnOff.steady(3000.0), seed=5).predict(Knobs(8)) for _ in range(2))
    assert first == second
    assert Scenario.of(MLP, OnOff.steady(3000.0), seed=6).predict(Knobs(8)) != first


def test_what_is_not_known_of_the_model_makes_unsure() -> None:
    vague = tuple(Estimate(each.rows, each.mean_ns, 0.2 * each.mean_ns, each.spread) for each in MLP)
    sure, unsure = (Scenario.of(curve, OnOff.steady(3000.0)).predict(Knobs(8)) for curve in (MLP, vague))
    assert unsure.percentile_error_ns > 2 * sure.percentile_error_ns


def test_stalls_lengthen_the_tail_and_not_the_middle() -> None:
    stalls = Surroundings(stalls=Stalls(1e9, (20e6,) * 5))
    quiet, held_up = (
        Scenario.of(MLP, OnOff.steady(1000.0), surroundings=each).predict(Knobs(8)) for each in (None, stalls)
    )
    assert held_up.percentile_ns > 5 * quiet.percentile_ns
    assert held_up.median_ns < 1.1 * quiet.median_ns


def test_nothing_that_could_be_answered_is_no_error() -> None:
    none = Scenario.of(MLP, OnOff.steady(1.0), demand=Demand(target_us=1)).predict(Knobs(8, is_shedding=True))
    assert none.goodput == 0.0
    Scenario.of(MLP, OnOff.steady(0.0)).predict(Knobs(8))


def test_a_prediction_costs_little() -> None:
    scenario = Scenario.of(MLP, OnOff(6000, 100, 0.1, 0.1), requests=5000, repetitions=1)
    best_s = math.inf
    for _ in range(7):
        before = time.thread_time()
        scenario.predict(Knobs(32, is_shedding=True, is_deferring=True, delay_us=500, instances=2))
        best_s = min(best_s, time.thread_time() - before)
    assert best_s < 0.005
