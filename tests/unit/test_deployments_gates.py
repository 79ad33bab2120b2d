"""Verdicts on a candidate: what is plain shows early, what may be chance does not."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.deployments.gates import Verdict, find_tail, judge
from aiorch_server.deployments.samples import Window
from aiorch_server.registry.records import Gates


def judged(gates: Gates, stable: Window, candidate: Window, **options: Any) -> Verdict:
    return judge(gates, stable, candidate, **{"is_final": False, "can_stable_grow": True, "sampled": 1000, **options})


def window_of(values_ms: list[float], errors: int = 0) -> Window:
    latencies: dict[int, int] = {}
    for value in values_ms:
        ns = int(value * 1e6)
        upper = (ns >> 14 << 14) + (1 << 14)
        latencies[upper] = latencies.get(upper, 0) + 1
    return Window(len(values_ms) + errors, errors, latencies)


@given(st.integers(0, 60), st.integers(0, 60), st.floats(0.001, 0.999))
def test_the_tail_is_the_binomial_one(bad: int, total: int, rate: float) -> None:
    if bad > total:
        bad, total = total, bad
    exact = sum(math.comb(total, i) * rate**i * (1 - rate) ** (total - i) for i in range(bad, total + 1))
    found = find_tail(bad, total, rate)
    if bad <= total * rate:
        assert found == 1.0
    else:
        assert found == pytest.approx(exact, rel=1e-6, abs=1e-12)


def test_the_tail_of_many_is_quick_and_finite() -> None:
    assert find_tail(1_100_000, 100_000_000, 0.01) == pytest.approx(0.0, abs=1e-12)
    assert 0.0 < find_tail(10_100, 1_000_000, 0.01) < 0.5
    assert find_tail(3, 3, 0.0) == 0.0
    assert find_tail(0, 0, 0.0) == 1.0
    assert find_tail(1, 0, 0.01) == find_tail(1, -3, 0.01) == 1.0, "counts that cannot be"


def test_one_error_in_three_is_no_breach_but_failing_everything_is() -> None:
    gates = Gates(max_error_rate=0.01)
    assert not judged(gates, Window(), Window(3, 1)).breach
    assert not judged(gates, Window(), Window(1, 1)).breach
    assert "3 of 3 requests failed (100.00%, at most 1.00% may)" in judged(gates, Window(), Window(3, 3)).breach


def test_no_error_allowed_means_the_first_one_counts() -> None:
    assert judged(Gates(max_error_rate=0.0), Window(), Window(1000, 1)).breach
    assert not judged(Gates(max_error_rate=0.0), Window(), Window(1000, 0)).breach


def test_what_is_likely_no_chance_is_a_breach_at_the_end_only() -> None:
    gates, candidate = Gates(max_error_rate=0.01), Window(200, 6)
    assert not judged(gates, Window(), candidate).breach
    assert judged(gates, Window(), candidate, is_final=True).breach


def test_few_samples_are_no_more_of_a_breach_because_the_step_is_over() -> None:
    """A step that waits for samples is looked at four times a second: chance would get many tries."""
    gates = Gates(max_error_rate=0.01, min_agreement=0.99, min_samples=200)
    found = judged(gates, Window(), Window(3, 1), is_final=True)
    assert not found.breach and "3 of the 200" in found.missing
    assert not judged(gates, Window(), Window(300, compared=3, agreed=2), is_final=True).breach
    assert judged(gates, Window(), Window(3, 3), is_final=True).breach


def test_agreement() -> None:
    gates = Gates(min_agreement=0.99, min_samples=100)
    assert judged(gates, Window(), Window(100, compared=3, agreed=0)).breach
    assert not judged(gates, Window(), Window(100, compared=3, agreed=2)).breach
    told = judged(Gates(min_agreement=1.0), Window(), Window(10, compared=50, agreed=49)).breach
    assert told == "49 of 50 compared answers agree (98.00%, at least 100.00% must)"
    assert "9 of the 10 answers" in judged(gates, Window(), Window(100, compared=9, agreed=9)).missing
    assert judged(gates, Window(), Window(100, compared=10, agreed=10)) == Verdict()


def test_latency_needs_samples_of_both() -> None:
    gates = Gates(max_p99_ratio=1.5, min_samples=200)
    few, many, slow = window_of([1.0] * 199), window_of([1.0] * 200), window_of([5.0] * 200)
    assert not judged(gates, few, slow).breach
    assert "stable version has answered 199 of the 200" in judged(gates, few, slow).missing
    assert judged(gates, few, slow, can_stable_grow=False) == Verdict()
    assert "candidate has answered 199" in judged(gates, many, few).missing
    assert "4.94 times the 1.02 ms of the stable version" in judged(gates, many, slow).breach
    assert judged(gates, many, many) == Verdict()


def test_a_candidate_like_the_stable_version_passes_and_a_slower_one_does_not() -> None:
    """Over many trials with noisy latencies: rarely a false alarm, hardly ever a miss."""
    dice = random.Random(7)
    gates = Gates(max_p99_ratio=1.5, min_samples=200)

    def draw(scale: float, count: int) -> Window:
        return window_of([scale * dice.lognormvariate(0.0, 0.5) for _ in range(count)])

    false_alarms = sum(bool(judged(gates, draw(1, 400), draw(1, 400), is_final=True).breach) for _ in range(200))
    hits = sum(bool(judged(gates, draw(1, 400), draw(3, 400), is_final=True).breach) for _ in range(200))
    early = sum(bool(judged(gates, draw(1, 400), draw(1, 400)).breach) for _ in range(200))
    assert false_alarms <= 6
    assert early == 0
    assert hits >= 190


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.booleans(), st.booleans())
def test_more_errors_never_help(
    requests: int, errors: int, compared: int, agreed: int, final: bool, grow: bool
) -> None:
    gates = Gates(max_error_rate=0.05, min_agreement=0.9, min_samples=10)
    errors, agreed = min(errors, requests), min(agreed, compared)
    options = {"is_final": final, "can_stable_grow": grow}
    if judged(gates, Window(), Window(requests, errors, {}, compared, agreed), **options).breach:
        worse = Window(requests, min(errors + 1, requests), {}, compared, max(0, agreed - 1))
        assert judged(gates, Window(), worse, **options).breach


def test_lost_requests_count_where_the_stable_version_loses_fewer() -> None:
    gates = Gates(max_error_rate=0.01, min_samples=100)
    stable, lossy = Window(1000, lost=2), Window(1000, lost=200)
    assert "30 of 130 requests were not answered (23.08%; of the stable version's 2 of 1002)" in judged(
        gates, stable, Window(100, lost=30)
    ).breach  # fmt: skip
    assert not judged(gates, lossy, Window(100, lost=20)).breach, "callers that give up soon give up on both"
    assert not judged(gates, stable, Window(100, lost=1), is_final=True).breach
    assert not judged(gates, Window(), Window(100, lost=30)).breach, "there is nothing to compare with"
    assert not judged(Gates(), stable, Window(100, lost=30)).breach, "nobody asked for a gate"


def test_nothing_answered_is_a_breach_when_no_more_is_waited_for() -> None:
    gates = Gates(max_error_rate=0.01)
    assert not judged(gates, Window(), Window(lost=3), is_final=True).breach
    found = judged(gates, Window(), Window(lost=3), is_final=True, is_given_up=True)
    assert found.breach == "none of its 3 requests was answered"
    assert not judged(gates, Window(), Window(), is_final=True, is_given_up=True).breach, "nobody asked it anything"


def test_what_does_not_come_back_is_waited_for_and_then_a_breach() -> None:
    assert judged(Gates(), Window(), Window(5, stuck_s=10)).breach.startswith(
        "it hangs: nothing has come back for 10 s"
    )
    waiting = judged(Gates(), Window(), Window(5, stuck_s=9), is_final=True, is_given_up=True)
    assert waiting.is_stuck and not waiting.breach
    slow = Window(5, slowest_s=20.0)
    assert not judged(Gates(), slow, Window(stuck_s=79)).breach, "the model takes its time, as it always did"
    assert judged(Gates(), slow, Window(stuck_s=80)).breach
    assert not judged(Gates(), Window(), Window(5, stuck_s=3, slowest_s=2.0)).is_stuck
