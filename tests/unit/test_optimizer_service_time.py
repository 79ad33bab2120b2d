"""The learnt curve against models whose truth is known: how close it is, and whether its errors are honest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from aiorch_server.optimizer.runs import Runs, take_apart
from aiorch_server.optimizer.service_time import MAX_POINTS, ServiceTime

Truth = Callable[[float], float]
US = 1e3
#: Standard normal quantile: an interval of twice so many errors holds 90 %.
_TEN_PERCENT = 1.645


def line(rows: float) -> float:
    return 100 * US + 10 * US * rows


def slower_when_large(rows: float) -> float:
    """For each row 8 is the best size, 32 is worse than 1."""
    return 1000 * US * (0.3 + rows * (0.7 + 0.1 * max(0.0, math.log2(rows / 8)) + 0.02 * (rows > 16)))


def flat(rows: float) -> float:
    return 5000 * US + 0 * rows


def runs_of(random: np.random.Generator, rows: int, count: int, mean_ns: float, spread: float) -> Runs:
    """So many runs with lognormal times."""
    sigma = math.sqrt(math.log1p(spread**2))
    times = mean_ns * np.exp(random.normal(-(sigma**2) / 2, sigma, count))
    return Runs(rows, count, float(times.sum()), float((times**2).sum()))


def learn(
    random: np.random.Generator,
    truth: Truth,
    counts: Mapping[int, int],
    *,
    windows: int = 5,
    spread: float = 0.1,
    model: ServiceTime | None = None,
    start_s: float = 0.0,
    instances: int = 1,
) -> ServiceTime:
    """A model that saw so many runs of each size in each of the windows of a second."""
    model = model or ServiceTime(32)
    for window in range(windows):
        seen = [runs_of(random, rows, count, truth(rows), spread) for rows, count in counts.items()]
        model.observe(seen, instances=instances, now_s=start_s + window)
    return model


@pytest.mark.parametrize("truth", [line, slower_when_large, flat])
def test_all_sizes_seen_give_the_truth(truth: Truth) -> None:
    model = learn(np.random.default_rng(1), truth, dict.fromkeys([1, 2, 4, 8, 12, 16, 24, 32], 50))
    for rows in (1, 2, 4, 8, 16, 32):
        assert model.estimate(rows).mean_ns == pytest.approx(truth(rows), rel=0.04)
        assert model.is_trusted(rows)
    assert model.spread() == pytest.approx(0.1, rel=0.15)


def test_the_best_size_of_a_model_that_gets_slower_is_found() -> None:
    model = learn(np.random.default_rng(2), slower_when_large, dict.fromkeys([1, 2, 4, 8, 16, 32], 200))
    per_row = {rows: ns / rows for rows, ns in model.curve()}
    assert min(per_row, key=lambda rows: per_row[rows]) in range(6, 13)
    assert per_row[32] > per_row[8]


@pytest.mark.parametrize("truth", [line, slower_when_large, flat])
@pytest.mark.parametrize(("windows", "count"), [(1, 4), (2, 20), (8, 3), (20, 40)])
def test_intervals_of_seen_sizes_hold_as_often_as_they_say(truth: Truth, windows: int, count: int) -> None:
    sizes = [1, 2, 5, 8, 16, 30]
    held = trials = 0
    for seed in range(120):
        model = learn(np.random.default_rng(seed), truth, dict.fromkeys(sizes, count), windows=windows)
        for rows in sizes:
            estimate = model.estimate(rows)
            trials += 1
            held += abs(estimate.mean_ns - truth(rows)) <= _TEN_PERCENT * estimate.error_ns
    # a flat truth is where making the curve grow helps most, of which the errors do not know
    assert 0.85 <= held / trials <= (1.0 if truth is flat else 0.95)


def test_intervals_of_sizes_never_seen_hold() -> None:
    held = trials = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        share, bend = random.uniform(0.05, 0.95), random.uniform(-0.1, 0.1)

        def truth(rows: float, share: float = share, bend: float = bend) -> float:
            return 1000 * US * (share + (1 - share) * rows) * rows**bend

        model = learn(random, truth, {1: 40, 2: 30, 4: 20})
        for rows in (3, 8, 16, 32):
            estimate = model.estimate(rows)
            trials += 1
            held += abs(estimate.mean_ns - truth(rows)) <= _TEN_PERCENT * estimate.error_ns
    assert held / trials >= 0.85


def test_uncertainty_grows_with_the_distance_from_what_was_seen() -> None:
    model = learn(np.random.default_rng(3), line, {4: 100})
    errors = [model.estimate(rows).error_ns / model.estimate(rows).mean_ns for rows in (4, 6, 12, 32)]
    assert errors == sorted(errors)
    assert model.is_trusted(4) and not model.is_trusted(32)
    assert not model.is_trusted(1)


def test_one_size_says_something_of_the_others_but_not_more_than_it_can() -> None:
    for truth in (flat, lambda rows: 100 * US * rows):
        model = learn(np.random.default_rng(4), truth, {8: 100})
        for rows in (1, 2, 16, 32):
            estimate = model.estimate(rows)
            assert abs(estimate.mean_ns - truth(rows)) <= 2 * estimate.error_ns


def test_a_stall_does_not_move_the_curve() -> None:
    random = np.random.default_rng(5)
    model = learn(random, line, {1: 100, 4: 100}, windows=10)
    before = model.estimate(4)
    stalled = runs_of(random, 4, 100, line(4), 0.1)
    stalled = Runs(4, 100, stalled.sum_ns + 100e6, stalled.sum_ns2 + 100e6**2)
    model.observe([stalled], instances=1, now_s=10)
    assert stalled.mean_ns > 5 * before.mean_ns
    assert model.estimate(4).mean_ns == pytest.approx(before.mean_ns, rel=0.01)
    assert model.spread() == pytest.approx(0.1, rel=0.2)


def timed_runs(times_ns: np.ndarray, rows: int) -> Runs:
    """With a bucket for each eighth of a power of two, as the core counts them."""
    octaves = np.floor(np.log2(times_ns))
    uppers = (2**octaves * (1 + (np.floor((times_ns / 2**octaves - 1) * 8) + 1) / 8)).astype(np.int64)
    counts = dict(zip(*(each.tolist() for each in np.unique(uppers, return_counts=True)), strict=True))
    return Runs(rows, len(times_ns), float(times_ns.sum()), float((times_ns**2).sum()), counts)


def test_stalls_are_told_apart_where_run_times_were_kept() -> None:
    random = np.random.default_rng(13)
    usual = line(4) * np.exp(random.normal(0, 0.1, 1000))
    held_up = usual + np.where(random.random(1000) < 0.02, random.exponential(5e6, 1000) + 1e6, 0)
    runs, stalls = take_apart(timed_runs(held_up, 4))
    assert timed_runs(held_up, 4).mean_ns > 1.5 * usual.mean()
    assert runs.mean_ns == pytest.approx(usual.mean(), rel=0.06)
    assert math.sqrt(runs.variance_ns2) / runs.mean_ns == pytest.approx(0.1, abs=0.04)
    assert len(stalls.lengths_ns) == 1000 - runs.executions == (held_up > usual).sum()
    assert sum(stalls.lengths_ns) == pytest.approx((held_up - usual).sum(), rel=0.1)
    assert stalls.running_ns == pytest.approx(usual.sum(), rel=0.06)
    untold = runs_of(random, 4, 10, line(4), 0.1)
    assert take_apart(untold) == (untold, take_apart(untold)[1]) and not take_apart(untold)[1].lengths_ns


def test_stalls_in_every_window_do_not_move_the_curve_either() -> None:
    random = np.random.default_rng(14)
    model = ServiceTime(32)
    for window in range(10):
        seen = []
        for rows in (1, 8):
            times = line(rows) * np.exp(random.normal(0, 0.1, 200))
            seen.append(timed_runs(times + np.where(random.random(200) < 0.05, 20e6, 0), rows))
        model.observe(seen, instances=1, now_s=window)
    for rows in (1, 8):
        assert model.estimate(rows).mean_ns == pytest.approx(line(rows), rel=0.06)
    assert model.spread() < 0.2
    stalls = model.stalls()
    assert len(stalls.lengths_ns) == pytest.approx(200, rel=0.2)
    assert np.mean(stalls.lengths_ns) == pytest.approx(20e6, rel=0.1)
    assert stalls.running_ns == pytest.approx(10 * 200 * (line(1) + line(8)), rel=0.06)


def test_a_stall_at_the_beginning_makes_unsure() -> None:
    random = np.random.default_rng(6)
    stalled = runs_of(random, 4, 20, line(4), 0.1)
    model = ServiceTime(32)
    model.observe([Runs(4, 20, stalled.sum_ns + 100e6, stalled.sum_ns2 + 100e6**2)], instances=1, now_s=0)
    assert not model.is_trusted(4)


@pytest.mark.parametrize("ratio", [2.0, 0.5])
def test_a_model_that_changes_is_followed_within_a_few_windows(ratio: float) -> None:
    random = np.random.default_rng(7)
    model = learn(random, line, {1: 50, 8: 20}, windows=60)
    learn(random, lambda rows: ratio * line(rows), {8: 20}, windows=4, model=model, start_s=60)
    assert model.estimate(8).mean_ns == pytest.approx(ratio * line(8), rel=0.05)
    # the size that was not seen since is thought to have changed as well, but not trusted
    assert model.estimate(1).mean_ns == pytest.approx(ratio * line(1), rel=0.15)
    assert not model.is_trusted(1)
    learn(random, lambda rows: ratio * line(rows), {1: 50}, windows=1, model=model, start_s=64)
    assert model.is_trusted(1)


def test_noise_alone_is_no_change() -> None:
    random = np.random.default_rng(8)
    model = learn(random, line, {1: 5, 8: 5}, windows=300, spread=0.3)
    assert model.estimate(8).error_ns < 0.05 * line(8), "old windows were dropped"


def test_what_is_old_counts_less() -> None:
    model = learn(np.random.default_rng(9), line, {8: 10})
    fresh = model.estimate(8).error_ns
    model.observe([], instances=1, now_s=4 + 120.0)
    assert model.estimate(8).error_ns == pytest.approx(4 * fresh, rel=0.05)


def test_contention_between_instances_is_learnt() -> None:
    random = np.random.default_rng(10)
    model = ServiceTime(32, cores=2)
    learn(random, line, {1: 50, 8: 50}, model=model, windows=10)
    assert model.estimate(8, 2).mean_ns == pytest.approx(line(8), rel=0.02)
    assert model.estimate(8, 4).mean_ns == pytest.approx(2 * line(8), rel=0.02)
    assert not model.is_trusted(8, 2)
    learn(random, lambda rows: 1.6 * line(rows), {8: 50}, model=model, windows=10, start_s=10, instances=2)
    assert model.estimate(8, 2).mean_ns == pytest.approx(1.6 * line(8), rel=0.03)
    # what was seen at one instance tells of the other sizes at two
    assert model.estimate(1, 2).mean_ns == pytest.approx(1.6 * line(1), rel=0.05)
    assert model.is_trusted(1, 2)
    assert model.estimate(1, 1).mean_ns == pytest.approx(line(1), rel=0.05)


@pytest.mark.parametrize("max_rows", [1, 7, 16, 33, 64, 1000, 4096])
def test_the_curve_has_few_points_and_grows(max_rows: int) -> None:
    random = np.random.default_rng(11)
    model = ServiceTime(max_rows)
    assert model.curve() == ()
    sizes = {rows for rows in (1, 3, 7, 40, 1000) if rows <= max_rows}
    learn(random, line, dict.fromkeys(sizes, 2), model=model, spread=0.5)
    curve = model.curve()
    assert len(curve) <= MAX_POINTS
    assert curve[0][0] == 1 and curve[-1][0] == max_rows
    assert all(a[0] < b[0] and 0 < a[1] <= b[1] for a, b in itertools.pairwise(curve))


def test_nothing_seen_is_said_so() -> None:
    model = ServiceTime(8)
    assert not model.is_known and not model.is_trusted(1)
    with pytest.raises(ValueError, match="nothing was seen"):
        model.estimate(1)


def test_it_costs_little() -> None:
    import time

    random = np.random.default_rng(12)
    model = learn(random, line, dict.fromkeys(range(1, 33), 20), windows=64)
    seen = [runs_of(random, rows, 20, line(rows), 0.1) for rows in range(1, 33)]
    best_s = math.inf
    for at in range(5):
        before = time.thread_time()
        model.observe(seen, instances=1, now_s=64 + at)
        model.curve()
        best_s = min(best_s, time.thread_time() - before)
    assert best_s < 0.05
