"""Plans refuse nonsense at once; arrival processes have the rate and the shape that they promise."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
from aiorch_client.loadgen import Arrival, LoadPlan, schedule_arrivals
from hypothesis import given, settings
from hypothesis import strategies as st

NS_PER_S = 1_000_000_000


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ValueError, match="load plan") as caught:
        LoadPlan(target="", requests=(), duration_s=0, channels=0, path="ModelInfer", warm_up_s=-1, rate=0)
    text = str(caught.value)
    for word in ("target", "requests", "duration_s", "channels", "path", "warm_up_s", "rate"):
        assert word in text


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
@pytest.mark.parametrize("name", ["duration_s", "timeout_s", "connect_timeout_s", "rate", "burst_on_s", "burst_off_s"])
def test_times_and_rates_must_be_finite_and_positive(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        LoadPlan(target="h:1", requests=[b""], **cast(Any, {name: value}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_warm_up_must_be_finite_and_not_negative(value: float) -> None:
    with pytest.raises(ValueError, match="warm_up_s"):
        LoadPlan(target="h:1", requests=[b""], warm_up_s=value)


def test_open_loop_that_needs_more_than_the_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="max_requests"):
        LoadPlan(target="h:1", requests=[b""], rate=1000, duration_s=10, warm_up_s=0, max_requests=9_999)
    LoadPlan(target="h:1", requests=[b""], rate=1000, duration_s=10, warm_up_s=0, max_requests=10_000)


def test_plan_dict_tells_the_loop_and_hides_credentials() -> None:
    closed = LoadPlan(target="h:1", requests=[b"abc"], streams=3, metadata=[("authorization", "secret")])
    assert closed.to_dict()["loop"] == "closed"
    assert closed.to_dict()["streams"] == 3
    assert "secret" not in str(closed.to_dict())
    opened = LoadPlan(target="h:1", requests=[b"abc"], rate=5, arrival=Arrival.BURST)
    assert opened.to_dict()["arrival"] == "burst"
    assert opened.to_dict()["burst_on_s"] == 0.1


@given(
    arrival=st.sampled_from(Arrival),
    rate=st.floats(0.5, 5_000),
    duration_s=st.floats(0.01, 4),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_due_times_are_sorted_and_within_the_run(arrival: Arrival, rate: float, duration_s: float, seed: int) -> None:
    due = schedule_arrivals(arrival, rate, duration_s, seed=seed)
    assert due.dtype == np.int64
    assert (np.diff(due) >= 0).all()
    assert due.size == 0 or (due[0] >= 0 and due[-1] < duration_s * NS_PER_S)


@pytest.mark.parametrize("arrival", list(Arrival))
def test_mean_rate_is_kept_by_every_arrival(arrival: Arrival) -> None:
    due = schedule_arrivals(arrival, 1000, 100, burst_on_s=0.1, burst_off_s=0.4, seed=3)
    assert due.size == pytest.approx(100_000, rel=0.02)


def test_constant_gaps_are_equal() -> None:
    assert (np.diff(schedule_arrivals(Arrival.CONSTANT, 1000, 1)) == NS_PER_S // 1000).all()


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(schedule_arrivals(Arrival.POISSON, 1000, 100, seed=5)) / NS_PER_S
    assert gaps.mean() == pytest.approx(1e-3, rel=0.02)
    assert gaps.std() == pytest.approx(1e-3, rel=0.03)
    assert (gaps > 2e-3).mean() == pytest.approx(math.exp(-2), rel=0.05)


def test_bursts_stay_in_their_phases() -> None:
    due = schedule_arrivals(Arrival.BURST, 1000, 100, burst_on_s=0.1, burst_off_s=0.4, seed=7) / NS_PER_S
    assert (due % 0.5 < 0.1 + 1e-6).all()
    assert np.unique(due // 0.5).size == 200


def test_same_seed_same_times() -> None:
    one, two, other = (schedule_arrivals(Arrival.POISSON, 100, 10, seed=seed) for seed in (1, 1, 2))
    assert (one == two).all()
    assert one.size != other.size or (one != other).any()
