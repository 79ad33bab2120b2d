"""What the comparison of batching policies makes of what it saw, without any server."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.goals import OPTIMIZER_GOALS, Figures
from benchmarks.machine import describe_machine
from benchmarks.optimizer import loads
from benchmarks.optimizer.cells import count_missed_windows, find_recovery_s, judge
from benchmarks.optimizer.comparison import Attempt, Plan
from benchmarks.optimizer.plots import draw_policies, draw_story
from benchmarks.optimizer.site import Point
from benchmarks.optimizer.workloads import Workload
from benchmarks.optimizer_figures import (
    find_changing_mean,
    find_decisions,
    find_grace,
    find_lead,
    find_least_of_best,
    find_least_of_rules,
    find_near_percent,
    find_ratio,
)
from benchmarks.optimizer_figures import (
    find_recovery_s as find_longest_recovery_s,
)
from benchmarks.optimizer_page import render_optimizer

MS, S = 1_000_000, 1_000_000_000


def test_goodput_counts_from_when_requests_were_due() -> None:
    times_ns = np.array([0, 1, 2, 3, 4], np.int64) * 500 * MS  # the first two are the ramp
    due_ns = times_ns + 77 * S
    out = {
        "due_ns": due_ns,
        "sent_ns": due_ns + np.array([0, 0, 9 * MS, 0, 0]),
        "answered_ns": due_ns + np.array([1, 1, 11, 9, 1]) * MS,  # the third was sent late, and is late
        "code": np.array([0, 0, 0, 0, 14], np.int16),
    }
    row = judge(out, times_ns, 10_000, ramp_s=1.0, seconds=1.5)
    assert (row["offered"], row["answered"], row["refused"], row["goodput"]) == (3, 2, 1, 1 / 1.5)
    assert (row["segments_offered"], row["segments_good"]) == ([1, 1, 1], [0, 1, 0])
    assert row["is_lagging"]
    assert row["p99_us"] == pytest.approx(11_000, rel=0.01)


def test_what_was_never_answered_is_not_good() -> None:
    times_ns = np.arange(4, dtype=np.int64) * MS
    out = {
        "due_ns": times_ns + S, "sent_ns": times_ns + S, "answered_ns": np.zeros(4, np.int64),
        "code": np.full(4, -1, np.int16),
    }  # fmt: skip
    row = judge(out, times_ns, 10_000, ramp_s=0.0, seconds=1.0)
    assert (row["offered"], row["answered"], row["goodput"], row["p99_us"]) == (4, 0, 0.0, None)


@pytest.mark.parametrize(
    ("good", "seconds"),
    [
        ([0, 0, 100, 100, 100, 100], 0.0),
        ([0, 0, 90, 98, 99, 100], 1.0),
        ([0, 0, 90, 100, 98, 99], None),  # one segment is not enough
        ([0, 0, 99, 98, 99, 99], 1.0),
    ],
)
def test_recovery_is_when_the_objective_holds_again(good: list[int], seconds: float | None) -> None:
    row = {"segments_offered": [100] * 6, "segments_good": good}
    assert find_recovery_s(row, step_s=1.0) == seconds


def test_windows_that_miss_after_a_move() -> None:
    looks = [(1.0, 100, 0, 0), (2.0, 100, 5, 0), (3.0, 100, 0, 5), (4.0, 100, 1, 0), (5.0, 100, 50, 0)]
    assert count_missed_windows({"looks": looks, "decisions": []}) == 0
    assert count_missed_windows({"looks": looks, "decisions": [{"at_s": 1.2}]}) == 2
    assert count_missed_windows({"looks": looks, "decisions": [{"at_s": 2.4}]}) == 1


@pytest.mark.parametrize("load", list(loads.LOADS))
def test_loads_are_the_same_by_the_same_seed(load: str) -> None:
    one, again, other = (loads.draw(load, 1000.0, 2.0, 40.0, seed) for seed in (3, 3, 4))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert np.all(np.diff(one) >= 0)
    part = {"poisson": 0.7, "bursts": 0.725, "day": 0.5, "step": 0.6}[load]
    assert (one >= 2 * S).sum() == pytest.approx(40_000 * part, rel=0.2)
    if load == "step":
        assert (one >= 22 * S).sum() == pytest.approx(20_000 * 0.9, rel=0.05)


def make_plan(**changed: Any) -> Plan:
    told: dict[str, Any] = {
        "workloads": ["mlp"], "loads": ["step", "bursts"], "policies": ["auto"], "seeds": [5], "tuning_seeds": [1],
        "ramp_s": 1.0, "seconds": 4.0, "grid_s": 0.0, "caps": [1, 8, 32], "delay_parts": [0.0, 0.1], "steady_s": 0.0,
        "overload_s": 0.0, "peers": ["triton"], "cache": Path(), "server_cpu": 0, "load_cpu": 1, "long_factor": 2.0,
    }  # fmt: skip
    return Plan(**(told | changed))


def test_the_grid() -> None:
    workload = Workload("forest", Path(), 20_000, {}, request_rows=8, max_requests=8)
    assert make_plan().list_points(workload) == [Point(1), Point(8), Point(8, 2000)]
    assert (str(Point(1)), str(Point(8, 2000))) == ("1 at most", "8 at most, 2 ms")
    assert (make_plan().length_s("bursts"), make_plan().length_s("step")) == (4.0, 8.0)
    assert make_plan(overload_s=3.0).estimate_s() > make_plan().estimate_s() > 0


def test_a_failure_is_told_and_goes_no_further() -> None:
    errors: list[str] = []
    with Attempt("a cell", errors) as attempt:
        raise KeyError("x")
    assert attempt.has_failed and errors == ["a cell: KeyError: 'x'"]
    with pytest.raises(KeyboardInterrupt), Attempt("another", errors):
        raise KeyboardInterrupt
    assert len(errors) == 1


def make_row(load: str, entrant: str, good: list[int], seed: int = 5, **more: Any) -> dict[str, Any]:
    offered = [100] * len(good)
    row = {"workload": "mlp", "load": load, "entrant": entrant, "seed": seed, "seconds": len(good) / 2}
    row |= {"offered": sum(offered), "segments_offered": offered, "segments_good": good, "is_lagging": False}
    row |= {"goodput": 2 * sum(good) / len(good), "good_share": sum(good) / sum(offered), "decisions": []}
    return row | more


def make_result() -> dict[str, Any]:
    move = {"at_s": 1.0, "knob": "delay", "before": 0.0, "after": 100.0, "reason": "", "effect": ""}
    foretold = [{"foretold": {"p99_us": 1000.0, "foretold_us": found}} for found in (1100.0, 900.0, 1300.0, 1140.0)]
    points = {"none": "1 at most", "fixed": "32 at most", "best": {"bursts": "8 at most", "step": "32 at most"}}
    about = {"objective_us": 50_000, "request_rows": 1, "curve_ms": {"1": 2.0, "32": 9.0}, "gain": 7.1}
    cells = [
        make_row("bursts", "auto", [90, 90, 90, 90]), make_row("bursts", "1 at most", [0, 0, 0, 0]),
        make_row("bursts", "8 at most", [100, 80, 100, 80]), make_row("bursts", "32 at most", [50, 50, 50, 50]),
        make_row("step", "auto", [99, 99, 95, 95], recovery_s=None, decisions=[move]),
        make_row("step", "32 at most", [97, 97, 97, 97], recovery_s=0.5), make_row("step", "linear", [90] * 4),
    ]  # fmt: skip
    overload = [
        make_row("", entrant, [good] * 4, factor=factor, p99_us=None, refused=7)
        for entrant, factor, good in (("auto", 1.0, 80), ("auto", 2.0, 76), ("triton", 1.0, 10), ("triton", 2.0, 0))
    ]
    steady = make_row("poisson", "auto", [100] * 60, decisions=[move], missed_windows=1, tuning_cores=0.004)
    return {
        "machine": describe_machine(), "seeds": {"tuning": [1, 2], "reported": [5]},
        "settings": {"is_quick": True, "seconds": 2.0, "ramp_s": 1.0, "loads": {"step": "up", "bursts": "on and off"}},
        "workloads": {"mlp": {**about, "capacity": 2000.0, "points": points}}, "cells": cells, "grid": foretold,
        "overload": overload, "steady": [steady], "errors": ["a cell: broke\nhere"], "skipped": [],
    }  # fmt: skip


def test_figures() -> None:
    result = make_result()
    assert find_ratio(result, "mlp", "bursts", "best") == pytest.approx((1.0, 0.9, 1.125))
    assert find_ratio(result, "mlp", "bursts", "none") is None
    assert find_ratio(result, "mlp", "step", "aimd") is None
    assert find_least_of_best(result) == pytest.approx(1.0)
    assert find_changing_mean(result) == pytest.approx(1.0)
    assert find_least_of_rules(result) == pytest.approx(1.0)
    assert find_lead(result) == pytest.approx(97 / 90)  # over linear, which has the step alone
    assert find_longest_recovery_s(result) == math.inf
    assert find_grace(result) == pytest.approx(0.95)
    assert find_decisions(result) == pytest.approx(2.0)
    assert find_near_percent(result) == 75.0


def test_goals_of_nothing() -> None:
    assert all(goal.cells(Figures({}))[2] == "not measured" for goal in OPTIMIZER_GOALS)
    empty = make_result() | {"cells": [], "grid": [], "overload": [], "steady": []}
    assert all(goal.cells(Figures({}, optimizer=empty))[2] == "not measured" for goal in OPTIMIZER_GOALS)


def test_the_page_and_its_pictures() -> None:
    result = make_result()
    text = render_optimizer(result)
    assert "| mlp | bursts | 200 | 180 | 180 | 0.0 | 100 | - | - | 1.000 (" in text
    assert "| mlp | Triton, its default queue | 20.0 | - | 0.0 | - | 0.00 |" in text
    assert "- a cell: broke" in text and "here" not in text.splitlines()[-1]
    for picture in (draw_policies(result), draw_story(result, "mlp", "step")):
        assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert "delay 0 to 100" in draw_story(result, "mlp", "step")
    assert draw_story(result, "mlp", "day") == ""
