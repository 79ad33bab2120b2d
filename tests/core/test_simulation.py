"""The simulation keeps the rules of the queue for any traffic, and agrees with queues whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorch_server._core import Fate, Simulation, simulate

US, MS, S = 1_000, 1_000_000, 1_000_000_000
LINE = [(1, 100 * US), (8, 240 * US), (32, 800 * US)]


@st.composite
def traffic(draw: st.DrawFn) -> dict[str, Any]:
    """A few hundred requests, dense and with gaps, some with levels, deadlines and shapes."""
    n = draw(st.integers(0, 300))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    times = np.cumsum(random.exponential(draw(st.sampled_from([5, 50, 300])) * US, n)).astype(np.int64)
    given: dict[str, Any] = {"arrivals_ns": times, "rows": random.integers(1, draw(st.sampled_from([2, 9, 40])), n)}
    if draw(st.booleans()):
        given["levels"] = random.integers(0, 3, n)
    if draw(st.booleans()):
        given["deadlines_ns"] = np.where(random.random(n) < 0.5, 0, times + random.integers(1, 5 * MS, n))
    if draw(st.booleans()):
        given["shapes"] = random.integers(0, 2, n)
    return given


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "max_rows": draw(st.sampled_from([1, 4, 32])),
        "delay_ns": draw(st.sampled_from([0, 200 * US, 3 * MS])),
        "target_ns": draw(st.sampled_from([0, 1 * MS, 10 * MS])),
        "margin_ns": draw(st.sampled_from([0, 100 * US])),
        "is_deferring": draw(st.booleans()),
        "is_shedding": draw(st.booleans()),
        "curve": draw(st.sampled_from([(), LINE, [(1, 50 * US)]])),
        "preferred": draw(st.sampled_from([(), (2, 4)])),
        "instances": draw(st.integers(1, 4)),
        "max_waiting": draw(st.sampled_from([1, 20, 16384])),
        "expiry_ns": draw(st.sampled_from([0, 2 * MS])),
    }


@st.composite
def machines(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "spreads": draw(st.sampled_from([(), (0.3, 0.2, 0.1)])),
        "noise": np.random.default_rng(draw(st.integers(0, 99))).standard_normal(64),
        "cores": draw(st.sampled_from([1.0, 2.0, 64.0])),
        "door_ns": draw(st.sampled_from([0, 10 * US])),
        "answer_ns": draw(st.sampled_from([0, 5 * US])),
        "wake_ns": draw(st.sampled_from([0, 30 * US])),
    }


@given(traffic(), policies(), machines())
@settings(max_examples=300, deadline=None)
def test_each_request_has_one_end_and_no_batch_is_too_large(
    coming: dict[str, Any], policy: dict[str, Any], machine: dict[str, Any]
) -> None:
    done = simulate(**coming, truth=LINE, **policy, **machine)
    rows, times = coming["rows"], coming["arrivals_ns"]
    served = done.batch_of >= 0
    assert np.array_equal(served, done.latencies_ns > 0)
    assert set(done.latencies_ns[~served].tolist()) <= {int(fate) for fate in Fate}
    assert np.array_equal(np.bincount(done.batch_of[served], rows[served], len(done.batch_rows)), done.batch_rows)
    members = np.bincount(done.batch_of[served], minlength=len(done.batch_rows))
    assert np.all((done.batch_rows <= policy["max_rows"]) | (members == 1))
    assert np.all(np.diff(done.batch_starts_ns) >= 0)
    # never before it came and was run
    batch = done.batch_of[served]
    begun, ended = done.batch_starts_ns[batch], done.batch_ends_ns[batch]
    assert np.all(begun >= times[served] + machine["door_ns"])
    assert np.all(times[served] + done.latencies_ns[served] >= ended + machine["answer_ns"])
    assert np.all(done.batch_ends_ns > done.batch_starts_ns)
    if not machine["spreads"]:
        assert np.all(ended - begun >= np.interp(done.batch_rows[batch], *zip(*LINE, strict=True)).astype(int))
    # no more at once than there are instances
    assert most_at_once(done) <= policy["instances"]
    # who has no end to keep is neither refused nor dropped for being late
    if not policy["is_shedding"] or not policy["curve"]:
        assert not np.isin(done.latencies_ns, [Fate.LATE_AT_DOOR, Fate.LATE_IN_QUEUE]).any()
    if "deadlines_ns" not in coming and not policy["expiry_ns"]:
        assert not (done.latencies_ns == Fate.EXPIRED).any()
    again = simulate(**coming, truth=LINE, **policy, **machine)
    assert np.array_equal(again.latencies_ns, done.latencies_ns)


def most_at_once(done: Simulation) -> int:
    """The most batches that ran at one time."""
    if not len(done.batch_rows):
        return 0
    starts, ends = np.sort(done.batch_starts_ns), np.sort(done.batch_ends_ns)
    return int((np.arange(1, len(starts) + 1) - np.searchsorted(ends, starts, side="right")).max())


@given(traffic(), st.sampled_from([1, 4, 32]), st.sampled_from([0, 200 * US]), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_without_deadlines_a_level_leaves_in_order(
    coming: dict[str, Any], max_rows: int, delay_ns: int, instances: int
) -> None:
    coming.pop("deadlines_ns", None)
    coming.pop("shapes", None)
    done = simulate(**coming, truth=LINE, max_rows=max_rows, delay_ns=delay_ns, instances=instances)
    for level in np.unique(coming.get("levels", np.zeros(0))):
        assert np.all(np.diff(done.batch_of[coming["levels"] == level]) >= 0)
    if "levels" not in coming:
        assert np.all(np.diff(done.batch_of) >= 0)


@given(traffic(), st.sampled_from([1, 4, 32]), st.integers(1, 3), st.sampled_from([0, 2 * MS]))
@settings(max_examples=100, deadline=None)
def test_nobody_waits_beside_a_free_instance_without_a_delay(
    coming: dict[str, Any], max_rows: int, instances: int, expiry_ns: int
) -> None:
    done = simulate(**coming, truth=LINE, max_rows=max_rows, instances=instances, expiry_ns=expiry_ns)
    times = coming["arrivals_ns"]
    for number in np.flatnonzero(done.batch_of >= 0):
        begun = done.batch_starts_ns[done.batch_of[number]]
        if begun > times[number]:
            # all instances ran all the time until its batch began
            moments = np.unique(
                np.clip([times[number], *done.batch_ends_ns, *done.batch_starts_ns], times[number], begun)
            )
            for moment in moments[:-1]:
                running = ((done.batch_starts_ns <= moment) & (done.batch_ends_ns > moment)).sum()
                assert running == instances


def test_the_urgent_level_goes_first() -> None:
    times = np.zeros(40, np.int64)
    levels = np.arange(40) % 2
    done = simulate(times, levels=levels, truth=[(1, MS)])
    assert done.latencies_ns[levels == 0].max() < done.latencies_ns[levels == 1][1:].min() + MS


def wait_of(done: Simulation, run_ns: float) -> tuple[float, float]:
    """Mean wait and its standard error, from the means of 40 parts (waits in a queue are alike for long)."""
    waits = done.latencies_ns[: len(done.latencies_ns) // 40 * 40] - run_ns
    parts = waits.reshape(40, -1).mean(axis=1)
    return float(parts.mean()), float(parts.std(ddof=1) / np.sqrt(len(parts)))


def poisson(gap_ns: float, n: int, seed: int) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).exponential(gap_ns, n)).astype(np.int64)


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_constant_runs_wait_as_long_as_pollaczek_and_khinchine_say(load: float) -> None:
    run_ns = 100_000
    done = simulate(poisson(run_ns / load, 800_000, 1), truth=[(1, run_ns)])
    wait, error = wait_of(done, run_ns)
    assert wait == pytest.approx(load * run_ns / (2 * (1 - load)), abs=4 * error)
    assert error < 0.05 * wait


def test_runs_with_noise_wait_as_long_as_pollaczek_and_khinchine_say() -> None:
    run_ns, load, sigma = 100_000, 0.7, 0.8
    noise = np.random.default_rng(2).standard_normal(500_000)
    done = simulate(poisson(run_ns / load, 500_000, 1), truth=[(1, run_ns)], spreads=[sigma], noise=noise)
    runs = done.batch_ends_ns - done.batch_starts_ns
    assert runs.mean() == pytest.approx(run_ns, rel=0.01)
    assert runs.std() / runs.mean() == pytest.approx(np.sqrt(np.expm1(sigma**2)), rel=0.03)
    wait, error = wait_of(done, runs)
    assert wait == pytest.approx(load * run_ns * np.exp(sigma**2) / (2 * (1 - load)), abs=4 * error)


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_exponential_runs_wait_as_long_as_they_should(load: float) -> None:
    # rows drawn so that the line through the origin gives exponential times, in steps of a thousandth
    random = np.random.default_rng(3)
    rows = np.maximum(1, np.round(random.exponential(1000, 400_000))).astype(np.int64)
    run_ns = 100_000
    done = simulate(poisson(run_ns / load, 400_000, 4), rows=rows, truth=[(1, 100), (1 << 20, 100 << 20)])
    runs = done.batch_ends_ns - done.batch_starts_ns
    wait, error = wait_of(done, runs)
    assert wait == pytest.approx(load * run_ns / (1 - load), abs=4 * error)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_two_instances_wait_as_erlang_says(load: float) -> None:
    random = np.random.default_rng(5)
    rows = np.maximum(1, np.round(random.exponential(1000, 400_000))).astype(np.int64)
    run_ns = 100_000
    done = simulate(
        poisson(run_ns / load / 2, 400_000, 6), rows=rows, truth=[(1, 100), (1 << 20, 100 << 20)], instances=2
    )
    wait, error = wait_of(done, (done.batch_ends_ns - done.batch_starts_ns)[done.batch_of])
    assert wait == pytest.approx(run_ns * load**2 / (1 - load**2), abs=4 * error)


def test_bulk_service_agrees_with_its_chain() -> None:
    """Batches of at most 4 that take the same time whatever their size: the queue at ends of runs is a Markov chain."""
    run_ns, rate, cap, states = 1_000_000, 3.0, 4, 200
    n = 300_000
    done = simulate(poisson(run_ns / rate, n, 7), truth=[(1, run_ns)], max_rows=cap)
    arrivals = np.zeros(states)
    arrivals[0] = np.exp(-rate)
    for count in range(1, states):
        arrivals[count] = arrivals[count - 1] * rate / count
    chain = np.zeros((states, states))
    for waiting in range(states):
        left = max(0, max(waiting, 1) - cap)  # an idle instance starts with the first that comes
        chain[waiting, left:] = arrivals[: states - left]
    chain[:, -1] += 1 - chain.sum(axis=1)
    steady = np.full(states, 1 / states)
    for _ in range(2000):
        steady = steady @ chain
    sizes = np.zeros(cap + 1)
    for waiting, part in enumerate(steady):
        sizes[min(max(waiting, 1), cap)] += part
    seen = np.bincount(done.batch_rows, minlength=cap + 1) / len(done.batch_rows)
    assert seen == pytest.approx(sizes, abs=0.012)


def test_shedding_keeps_goodput_at_twice_the_load() -> None:
    curve = [(1, 200 * US), (8, 550 * US), (32, 1800 * US)]
    best = 32 / (1800 * US)
    times = poisson(1 / (2 * best), 60_000, 8)
    target = 6 * MS
    policy = {"max_rows": 32, "target_ns": target, "truth": curve, "curve": curve}
    queued, shed = simulate(times, **policy), simulate(times, **policy, is_shedding=True)
    in_time = [np.mean((done.latencies_ns > 0) & (done.latencies_ns <= target)) for done in (queued, shed)]
    assert in_time[0] < 0.1
    assert in_time[1] > 0.4
    assert (shed.latencies_ns == Fate.LATE_AT_DOOR).any()


def test_instances_on_one_core_share_it() -> None:
    times = np.zeros(2, np.int64)
    alone = simulate(times, truth=[(1, MS)], instances=2)
    shared = simulate(times, truth=[(1, MS)], instances=2, slowdowns=[1, 2])
    assert alone.latencies_ns.tolist() == [MS, MS]
    assert shared.latencies_ns.tolist() == [2 * MS, 2 * MS]
    # the second comes in the middle of the first: half of that is left, at half the speed, then it is alone again
    later = simulate(np.array([0, MS // 2]), truth=[(1, MS)], instances=2, slowdowns=[1, 2])
    assert later.latencies_ns.tolist() == [3 * MS // 2, 3 * MS // 2]


def test_the_door_takes_its_time_and_that_of_a_shared_core() -> None:
    at = np.array([0, 0])
    done = simulate(at, truth=[(1, MS)], door_ns=10 * US, answer_ns=5 * US, wake_ns=3 * US)
    assert done.latencies_ns.tolist() == [MS + 18 * US, 2 * MS + 18 * US]
    shared = simulate(at, truth=[(1, MS)], door_ns=10 * US, answer_ns=5 * US, wake_ns=3 * US, cores=1)
    # reading the second holds up the first, and so does writing the first answer the second
    assert shared.latencies_ns.tolist() == [MS + 28 * US, 2 * MS + 33 * US]


def test_stalls_come_with_running() -> None:
    done = simulate(
        np.array([0, 10 * MS, 20 * MS]), truth=[(1, MS)], stall_gaps_ns=[1500 * US, MS], stalls_ns=[3 * MS, 5 * MS]
    )
    assert done.latencies_ns.tolist() == [MS, 4 * MS, 6 * MS]
    short = simulate(np.zeros(1, np.int64), truth=[(1, MS)], stall_gaps_ns=[400 * US], stalls_ns=[MS])
    assert short.latencies_ns.tolist() == [3 * MS]


@pytest.mark.parametrize(
    "wrong",
    [
        {"truth": []}, {"truth": [(1, 5), (1, 6)]}, {"arrivals_ns": np.array([3, 2])}, {"arrivals_ns": np.array([-1])},
        {"rows": np.array([0])}, {"rows": np.array([1, 1])}, {"levels": np.array([-1])}, {"instances": 0},
        {"instances": 65}, {"max_rows": 0}, {"delay_ns": -1}, {"spreads": [0.1, 0.1]}, {"spreads": [float("nan")]},
        {"noise": [float("inf")]}, {"slowdowns": [0]}, {"slowdowns": [1, 2]}, {"cores": 0}, {"cores": float("nan")},
        {"door_ns": -1},
        {"stalls_ns": [5]}, {"stalls_ns": [-1], "stall_gaps_ns": [5000]}, {"stalls_ns": [5], "stall_gaps_ns": [0]},
        {"max_waiting": 0}, {"expiry_ns": -1}, {"preferred": [0]}, {"deadlines_ns": np.array([-5])},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    given = {"arrivals_ns": np.array([5]), "truth": [(1, 100)], **wrong}
    with pytest.raises(ValueError):
        simulate(**given)


@given(traffic(), policies(), machines(), st.lists(st.integers(0, 20 * MS), max_size=12))
@settings(max_examples=150, deadline=None)
def test_pieces_change_nothing(
    coming: dict[str, Any], policy: dict[str, Any], machine: dict[str, Any], stops_ns: list[int]
) -> None:
    whole = simulate(**coming, truth=LINE, **policy, **machine)
    pieces = Simulation(**coming, truth=LINE, **policy, **machine)
    for stop_ns in sorted(stops_ns):
        pieces.advance(stop_ns)
        ended = pieces.batch_ends_ns
        assert np.all(ended <= stop_ns)
        assert pieces.running == np.count_nonzero(ended == 0)
    pieces.advance()
    assert (pieces.waiting, pieces.running) == (0, 0)
    for name in ("latencies_ns", "batch_of", "batch_starts_ns", "batch_ends_ns", "batch_rows"):
        assert np.array_equal(getattr(pieces, name), getattr(whole, name))


@given(traffic(), policies(), st.lists(policies(), min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_each_request_has_one_end_whatever_the_policy_becomes(
    coming: dict[str, Any], policy: dict[str, Any], later: list[dict[str, Any]]
) -> None:
    world = Simulation(**coming, truth=LINE, **{**policy, "instances": 4})
    for number, each in enumerate(later):
        fixed = ("preferred", "max_waiting", "expiry_ns")
        world.set_policy(**{name: value for name, value in each.items() if name not in fixed})
        world.advance(2 * MS * (number + 1))
        assert world.running <= 4
    world.advance()
    assert (world.waiting, world.running) == (0, 0)
    served = world.batch_of >= 0
    assert np.array_equal(served, world.latencies_ns > 0)
    assert set(world.latencies_ns[~served].tolist()) <= {int(fate) for fate in Fate}


def test_a_policy_holds_from_when_it_is_changed() -> None:
    world = Simulation(np.zeros(8, np.int64), truth=[(1, MS), (2, MS)], max_rows=1, instances=2)
    world.set_policy(instances=1)
    world.advance(MS // 2)
    assert (world.waiting, world.running) == (7, 1)
    world.set_policy(instances=2)
    world.advance(MS - 1)
    assert (world.waiting, world.running) == (6, 2)
    world.set_policy(max_rows=2, instances=1)
    world.advance(MS)
    # the second one still runs, and what was one too many takes nothing more
    assert (world.waiting, world.running) == (6, 1)
    world.advance()
    assert world.batch_rows.tolist() == [1, 1, 2, 2, 2]
    assert world.batch_starts_ns.tolist()[2:] == [3 * MS // 2, 5 * MS // 2, 7 * MS // 2]


def test_a_shorter_delay_holds_at_once() -> None:
    world = Simulation(np.zeros(1, np.int64), truth=[(1, MS)], max_rows=4, delay_ns=S)
    world.advance(MS)
    assert (world.waiting, world.running) == (1, 0)
    world.set_policy(delay_ns=0)
    world.advance()
    assert world.latencies_ns.tolist() == [2 * MS]


def test_what_is_over_cannot_be_asked_for() -> None:
    world = Simulation(np.zeros(1, np.int64), truth=[(1, MS)], instances=2)
    world.advance(5)
    with pytest.raises(ValueError, match="is over"):
        world.advance(4)
    for wrong in ({"instances": 3}, {"instances": 0}, {"max_rows": 0}, {"delay_ns": -1}):
        with pytest.raises(ValueError, match="expected"):
            world.set_policy(**wrong)
    world.set_policy()
    world.advance()
    assert world.latencies_ns.tolist() == [MS]


@pytest.mark.parametrize("load", [1.05, 1.25, 2.0])
@pytest.mark.parametrize("margin_ns", [0, 6 * MS])
def test_overload_leaves_batches_full(load: float, margin_ns: int) -> None:
    """One small batch for a head that is nearly late must not make the next head as late, and so on."""
    curve = [(1, 7 * MS), (32, 20 * MS)]
    capacity = 32 / 0.02  # requests/s
    times = poisson(S / (load * capacity), 40_000, 3)
    target_ns = 117 * MS
    policy = {"max_rows": 32, "target_ns": target_ns, "margin_ns": margin_ns, "is_shedding": True, "curve": curve}
    done = simulate(times, truth=curve, **policy)
    good = np.count_nonzero((done.latencies_ns > 0) & (done.latencies_ns <= target_ns))
    assert good / (times[-1] / S) >= 0.93 * capacity
