"""Windows of counters: they subtract, add up, and go through JSON."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.deployments.samples import StepSamples, Window, merge, name_step
from aiorch_server.registry.records import Rollout, RolloutPlan, RolloutState

NOW = datetime(2026, 1, 1, tzinfo=UTC)
counts = st.integers(0, 10**9)
windows = st.builds(
    Window,
    counts,
    counts,
    st.dictionaries(st.integers(1, 2**42), st.integers(1, 10**6), max_size=8),
    counts,
    counts,
    counts,
)


@given(windows, windows)
def test_what_was_added_is_what_came_since(earlier: Window, more: Window) -> None:
    assert (earlier + more).since(earlier) == more


@given(windows, windows, windows)
def test_servers_add_up_in_any_order(a: Window, b: Window, c: Window) -> None:
    texts = [StepSamples("s", {1: window}).to_json() for window in (a, b, c)]
    assert merge("s", texts) == merge("s", reversed(texts)) == StepSamples("s", {1: a + b + c})


@given(windows)
def test_samples_survive_json(window: Window) -> None:
    samples = StepSamples("r/0/", {1: window, 2: Window()}, ("a", "b"))
    assert StepSamples.from_json(samples.to_json()) == samples


@given(st.text() | st.sampled_from(['{"step": 1}', "[]", "null", '{"step":"s","windows":[],"disagreements":[]}']))
def test_strange_samples_are_left_out(text: str) -> None:
    assert merge("s", [text, StepSamples("other", {1: Window(5)}).to_json()]) == StepSamples("s")


def test_quantiles() -> None:
    window = Window(100, 0, {10: 98, 20: 1, 30: 1})
    assert [window.quantile_ns(q) for q in (0.0, 0.5, 0.98, 0.99, 1.0)] == [10, 10, 10, 20, 30]
    assert Window().quantile_ns(0.99) == 0
    assert window.count_slower(10) == 2
    report = Window(101, 1, {2_000_000: 100}, 4, 3).report(7)
    assert (report.version, report.p99_ms, report.requests, report.errors, report.agreed) == (7, 2.0, 101, 1, 3)


def test_steps_have_names_of_their_own() -> None:
    rollout = Rollout("r", "m", 1, 2, RolloutPlan(), RolloutState.RUNNING, NOW, "me", step_began_at=NOW)
    names = {name_step(rollout), name_step(replace(rollout, step=1)), name_step(replace(rollout, step_began_at=None))}
    assert len(names) == 3


def test_how_long_nothing_came_back_is_the_longest_of_all_servers() -> None:
    texts = [StepSamples("s", {1: Window(stuck_s=stuck, slowest_s=stuck / 2)}).to_json() for stuck in (3, 9, 0)]
    assert merge("s", texts).windows[1] == Window(stuck_s=9, slowest_s=4.5)


def test_what_a_server_of_the_release_before_tells_is_taken() -> None:
    window = '{"requests":2,"errors":1,"latencies":{"5":1},"compared":0,"agreed":0}'
    text = f'{{"step":"s","windows":{{"1":{window}}},"disagreements":[]}}'
    assert merge("s", [text]).windows == {1: Window(2, 1, {5: 1})}
