"""Counts are exact, percentiles within a bucket, merging is adding."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorch_server._core import Histogram

durations = st.lists(st.one_of(st.integers(0, 100), st.integers(0, 2**41)), min_size=1, max_size=200)


def filled(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


@given(durations, st.floats(0, 1))
def test_quantiles_are_never_flattering_and_within_a_bucket(values: list[int], q: float) -> None:
    exact = sorted(values)[max(0, math.ceil(q * len(values)) - 1)]
    found = filled(values).quantile(q)
    assert exact <= found <= exact * (1 + 1 / 16) + 1


@given(durations, durations)
def test_merging_is_adding(left: list[int], right: list[int]) -> None:
    merged = filled(left)
    merged.merge(filled(right))
    assert merged.buckets() == filled(left + right).buckets()
    assert (merged.count, merged.sum_ns) == (len(left) + len(right), sum(left) + sum(right))


@given(durations, st.integers(0, 40))
def test_counts_below_powers_of_two_are_exact(values: list[int], bit: int) -> None:
    assert filled(values).count_below(1 << bit) == sum(value < 1 << bit for value in values)


def test_edges() -> None:
    histogram = filled([-5, 0, 2**62])
    assert histogram.count == 3 and histogram.sum_ns == 2**62
    assert histogram.quantile(0.5) == 0
    assert histogram.quantile(1.0) >= 2**42
    assert Histogram().quantile(0.99) == 0
    with pytest.raises(ValueError, match="between 0 and 1"):
        histogram.quantile(1.5)


@given(st.lists(st.integers(0, 2**45), max_size=50))
def test_bounds_are_above_what_was_recorded_by_a_sixteenth_at_most(values: list[int]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    bounds = histogram.bounds()
    assert sum(bounds.values()) == len(values)
    for value in values:
        if value < 2**42:  # what is longer shares one bucket
            assert any(value < bound <= value + max(1, value // 16) + 1 for bound in bounds)
