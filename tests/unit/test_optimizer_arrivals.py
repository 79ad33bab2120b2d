"""Traffic has the rate and the bursts that were asked for, and those of traffic that was seen are found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorch_server.optimizer.arrivals import MAX_REQUESTS, OnOff, Trace, draw_day, draw_pieces, draw_poisson
from aiorch_server.optimizer.burstiness import SLOT_S, Slots, Traffic, fit, measure


def counts_of(times_ns: np.ndarray, duration_s: float, slot_s: float = SLOT_S) -> np.ndarray:
    edges = np.arange(0.0, duration_s + slot_s / 2, slot_s) * 1e9
    return np.histogram(times_ns, edges)[0]


def generator(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(rate=st.floats(0, 5000), duration_s=st.floats(0, 5), seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_poisson_is_in_order_within_its_time_and_near_its_rate(rate: float, duration_s: float, seed: int) -> None:
    times = draw_poisson(rate, duration_s, generator(seed))
    assert times.dtype == np.int64 and np.all(np.diff(times) >= 0)
    assert not len(times) or 0 <= times[0] <= times[-1] <= duration_s * 1e9
    expected = rate * duration_s
    assert abs(len(times) - expected) <= 6 * np.sqrt(expected) + 6


def test_the_same_seed_gives_the_same_traffic() -> None:
    process = OnOff(1000, 10, 0.1, 0.4)
    assert np.array_equal(process.draw(5, generator(3)), process.draw(5, generator(3)))
    assert not np.array_equal(process.draw(5, generator(3))[:10], process.draw(5, generator(4))[:10])


def test_poisson_has_no_bursts() -> None:
    for each in measure(counts_of(draw_poisson(2000, 100, generator()), 100)):
        assert abs(each.dispersion - 1) < 4 * each.error


def test_a_step_is_one() -> None:
    times = draw_pieces([(300, 10), (0, 5), (900, 10)], generator())
    seconds = np.bincount(times // 1_000_000_000, minlength=25)
    assert seconds[:10].mean() == pytest.approx(300, rel=0.1)
    assert not seconds[10:15].any()
    assert seconds[15:].mean() == pytest.approx(900, rel=0.1)


def test_a_day_has_its_mean_its_peak_and_its_night() -> None:
    times = draw_day(1000, 240, generator(), peak=2.0)
    assert len(times) == pytest.approx(240_000, rel=0.05)
    tens = np.bincount(times // 10_000_000_000, minlength=24) / 10
    assert tens.max() == pytest.approx(2000, rel=0.08)
    assert tens[:4].mean() < 500


@pytest.mark.parametrize(
    "process", [OnOff(2000, 100, 0.2, 0.8), OnOff(1500, 500, 0.05, 0.05), OnOff(3000, 0, 0.02, 0.1), OnOff.steady(800)]
)
def test_on_off_has_the_rate_and_the_dispersion_that_it_says(process: OnOff) -> None:
    duration_s = 400.0
    times = process.draw(duration_s, generator())
    assert np.all(np.diff(times) >= 0) and times[-1] <= duration_s * 1e9
    assert len(times) / duration_s == pytest.approx(process.rate, rel=0.1)
    for each in measure(counts_of(times, duration_s))[:4]:
        assert each.dispersion == pytest.approx(process.dispersion(each.slot_s), rel=0.2)


@pytest.mark.parametrize(
    "process", [OnOff(2000, 100, 0.2, 0.8), OnOff(1500, 500, 0.05, 0.05), OnOff(3000, 0, 0.02, 0.1)]
)
def test_bursts_that_were_seen_are_found_again(process: OnOff) -> None:
    found = fit(measure(counts_of(process.draw(200, generator()), 200)))
    assert found.rate == pytest.approx(process.rate, rel=0.1)
    for slot_s in (0.01, 0.1, 1.0):
        assert found.dispersion(slot_s) == pytest.approx(process.dispersion(slot_s), rel=0.35)


def test_plain_traffic_is_called_plain() -> None:
    steady = sum(
        fit(measure(counts_of(draw_poisson(500, 20, generator(seed)), 20))) == OnOff.steady(pytest.approx(500, rel=0.1))
        for seed in range(50)
    )
    assert steady >= 47


def test_what_cannot_be_said_is_plain() -> None:
    assert fit([]) == OnOff.steady(0.0)
    assert fit([], 100.0) == OnOff.steady(100.0)
    assert fit([Slots(SLOT_S, 100, 0, 0)]) == OnOff.steady(0.0)
    assert fit([Slots(SLOT_S, 1, 5, 25)], 10.0) == OnOff.steady(10.0)


def windows_of(times_ns: np.ndarray, duration_s: int) -> list[Slots]:
    return [Slots.of(each, SLOT_S) for each in counts_of(times_ns, duration_s).reshape(duration_s, -1)]


def test_traffic_follows_a_step_within_seconds_and_keeps_the_bursts() -> None:
    traffic = Traffic()
    process = OnOff(2000, 100, 0.1, 0.3)
    for window in windows_of(process.draw(60, generator()), 60):
        traffic.observe(window)
    assert traffic.dispersion == pytest.approx(process.dispersion(SLOT_S), rel=0.4)
    assert traffic.process(1000).dispersion(SLOT_S) > 3
    for window in windows_of(process.at_rate(3 * process.rate).draw(10, generator(2)), 10):
        traffic.observe(window)
    assert traffic.rate == pytest.approx(3 * process.rate, rel=0.25)
    assert traffic.process().rate == pytest.approx(traffic.rate)
    assert traffic.process(10).rate == pytest.approx(10)


@pytest.mark.parametrize("suffix", [".npz", ".csv"])
def test_a_trace_comes_back_as_it_was_kept(tmp_path: Path, suffix: str) -> None:
    trace = Trace(
        draw_poisson(100, 5, generator()), generator().integers(1, 9, size=len(draw_poisson(100, 5, generator())))
    )
    trace.save(tmp_path / f"trace{suffix}")
    back = Trace.load(tmp_path / f"trace{suffix}")
    assert np.array_equal(back.times_ns, trace.times_ns - trace.times_ns[0])
    assert np.array_equal(back.rows, trace.rows)


def test_a_trace_without_rows_has_single_ones(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("time_s\n1700000000.5\n1700000001.25\n")
    trace = Trace.load(tmp_path / "a.csv")
    assert trace.times_ns.tolist() == [0, 750_000_000] and trace.rows.tolist() == [1, 1]
    assert trace.at_rate(trace.rate * 2).times_ns.tolist() == [0, 375_000_000]


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a,b\n1,2\n", "names the columns"), ("time_s,rows\n1,x\n", "line 2"), ("time_s,rows\nnan,1\n", "line 2"),
     ("time_s,rows\n2,1\n1,1\n", "ascend"), ("time_s,rows\n2,-1\n", "at least one row")],
)  # fmt: skip
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=problem):
        Trace.load(tmp_path / "a.csv")


def test_arrays_that_are_no_trace_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", other=np.arange(3))
    with pytest.raises(ValueError, match="times_ns"):
        Trace.load(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="equal lists"):
        Trace(np.arange(3), np.ones(2, np.int64))


@pytest.mark.parametrize(
    "pieces", [[], [(-1.0, 1.0)], [(1.0, float("nan"))], [(float("inf"), 1.0)], [(1e9, MAX_REQUESTS)]]
)
def test_impossible_traffic_is_refused(pieces: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError):
        draw_pieces(pieces, generator())
