"""The rules that the tuner is compared with, against observations that are told to them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from aiorch_server.config.objective import parse_objective
from aiorch_server.optimizer.baselines import LOOKS, Aimd, Linear, RuledVersion, Setting
from aiorch_server.optimizer.burstiness import Slots
from aiorch_server.optimizer.runs import Runs
from aiorch_server.optimizer.tuned import Decision
from aiorch_server.optimizer.window import Window
from aiorch_server.types import BatchingPolicy, RunObservation, SchedulerObservation

MS, US = 1_000_000, 1_000
TARGET_US = 10_000


def see(runs: Mapping[int, tuple[int, float]], *, arrivals: int = 0, latency_us: float = 0.0) -> Window:
    """50 ms with runs, by rows: how many and how long in us; everyone waited ``latency_us`` in all."""
    answers = sum(rows * count for rows, (count, _) in runs.items())
    made = tuple(
        Runs(rows, count, count * run_us * US, count * (run_us * US) ** 2) for rows, (count, run_us) in runs.items()
    )
    durations = {round(latency_us * US): answers} if answers else {}
    counts = dict.fromkeys(("failed", "refused_full", "refused_late", "dropped_late", "waiting", "waiting_rows"), 0)
    return Window(
        end_s=1.0, length_s=0.05, arrivals=arrivals, arrived_rows=arrivals, answered=answers, answered_rows=answers,
        in_time=answers, late=0, instances=1, slots=Slots(0.01, 5, arrivals, 0.0), runs=made, durations=durations,
        **counts,
    )  # fmt: skip


def test_aimd_goes_up_by_one_row_and_down_by_a_tenth() -> None:
    rule = Aimd(32, TARGET_US)
    seen = [rule.setting.max_rows]
    for _ in range(40):  # a batch takes half a millisecond for each row: 20 are just within the objective
        rows = rule.setting.max_rows
        rule.step(see({rows: (3, 500.0 * rows)}))
        seen.append(rule.setting.max_rows)
    assert seen[:21] == list(range(1, 22))
    assert seen[21:26] == [18, 19, 20, 21, 19]  # 21 is too long: 18.9, 19.9, 20.9, 21.9, 19.71
    assert set(seen[21:]) <= set(range(18, 23))
    assert rule.setting == Setting(rule.setting.max_rows, delay_us=0, curve=())


def test_aimd_is_moved_by_full_batches_alone() -> None:
    rule = Aimd(32, TARGET_US)
    for _ in range(9):
        rule.step(see({rule.setting.max_rows: (1, 100.0)}))
    assert rule.setting.max_rows == 10
    rule.step(see({9: (100, 100.0)}))
    rule.step(see({}))
    assert rule.setting.max_rows == 10
    rule.step(see({1: (1, 10_001.0)}))
    assert rule.setting.max_rows == 9


def test_aimd_counts_in_requests() -> None:
    rule = Aimd(64, TARGET_US)
    for _ in range(4):  # a batch of 24 rows is full under a cap of 25 where each request has 8
        window = see({rule.setting.max_rows // 8 * 8 or 8: (3, 100.0)}, arrivals=5)
        rule.step(replace(window, arrived_rows=40))
    assert rule.setting.max_rows == 33


def test_aimd_stays_between_one_and_the_most() -> None:
    rule = Aimd(4, TARGET_US)
    for _ in range(10):
        rule.step(see({4: (1, 9_999.0), 3: (1, 1.0), 2: (1, 1.0), 1: (1, 1.0)}))
    assert rule.setting.max_rows == 4
    for _ in range(50):
        rule.step(see({1: (1, 20_000.0)}))
    assert rule.setting.max_rows == 1


def test_linear_fits_a_line() -> None:
    rule = Linear(32, TARGET_US)
    assert rule.setting == Setting(32, 0, ())
    rule.step(see({1: (5, 1100.0), 8: (5, 1800.0), 4: (5, 1400.0)}))
    assert dict(rule.setting.curve) == {
        1: 1_100_000, 2: 1_200_000, 4: 1_400_000, 8: 1_800_000, 16: 2_600_000, 32: 4_200_000,
    }  # fmt: skip


def test_linear_forgets_but_the_last_fifty_runs() -> None:
    rule = Linear(8, TARGET_US)
    rule.step(see({1: (30, 9000.0), 8: (30, 9000.0)}))
    rule.step(see({1: (25, 1000.0), 8: (25, 8000.0)}))
    assert dict(rule.setting.curve)[4] == 4_000_000


def test_linear_has_a_guess_from_one_size_and_no_time_below_nothing() -> None:
    rule = Linear(8, TARGET_US)
    rule.step(see({4: (10, 1700.0)}))
    assert dict(rule.setting.curve)[4] == pytest.approx(1_700_000, abs=1)
    falling = Linear(8, TARGET_US)
    falling.step(see({1: (5, 2000.0), 8: (5, 1000.0)}))
    assert {ns for _, ns in falling.setting.curve} == {1_500_000}


@pytest.mark.parametrize(
    ("arrivals", "latency_us", "delay_us"),
    [
        (50, 1_000.0, 0),  # nobody had to wait: neither is anybody waited for
        (50, 9_000.0, 6_000),  # 7.6 ms of the wait, 1 ms + 0.1 ms for each: 6 more
        (500, 3_000.0, 900),  # 1.9 ms, 0.2 ms for each: 9 more, 0.1 ms apart
        (50, 90_000.0, 5_800),  # as many as may be, so that 32 rows in 4.2 ms still end in time
    ],
)
def test_linear_waits_by_what_others_waited(arrivals: int, latency_us: float, delay_us: int) -> None:
    rule = Linear(32, TARGET_US)
    for _ in range(2 * LOOKS):
        rule.step(see({1: (10, 1_000.0)}, arrivals=arrivals, latency_us=latency_us))
        rule._runs.extend([(1.0, 1.1 * MS), (11.0, 2.1 * MS)] * 25)  # a = 0.1 ms, b = 1 ms
    assert rule.setting.delay_us == pytest.approx(delay_us, abs=1)


@dataclass
class FakeLevers:
    """A version that tells one observation after the other."""

    observations: list[SchedulerObservation]
    set: list[dict[str, Any]] = field(default_factory=list)
    largest_rows: int = 16
    serving: int = 1
    can_grow: bool = False

    def observe(self) -> SchedulerObservation:
        return self.observations.pop(0) if len(self.observations) > 1 else self.observations[0]

    def policy(self) -> BatchingPolicy:
        return BatchingPolicy(16, 500, 0, 0, False, False, 1, ())

    def set_policy(self, **policy: Any) -> None:
        self.set.append(policy)

    async def set_instances(self, count: int) -> None:
        raise AssertionError("instances are left alone")


def observe_full_batches(count: int) -> SchedulerObservation:
    """So many batches of each size, 1 ms long, and as many seconds."""
    runs = tuple(RunObservation(rows, count, count * MS, count * 1e12) for rows in range(1, 17))
    kept = dict.fromkeys(SchedulerObservation.__slots__, 0) | {"gap_squares": 0.0, "slot_squares": 0.0}
    kept |= {
        "at_ns": count * 1000 * MS,
        "arrivals": 10 * count,
        "arrived_rows": 10 * count,
        "answered": 10 * count,
        "instances": 1,
    }
    return SchedulerObservation(**(kept | {"runs": runs, "durations": {2 * MS: 10 * count}}))  # type: ignore[arg-type]


def test_a_version_under_a_rule() -> None:
    levers = FakeLevers([observe_full_batches(count) for count in range(1, 7)])
    told: list[Decision] = []
    version = RuledVersion(
        "m", 1, levers, parse_objective("p99=10ms"), "aimd", looks=3, look_s=0.0,
        on_decision=lambda _, decision: told.append(decision),
    )  # fmt: skip
    assert levers.set[0] == {
        "max_rows": 1, "delay_us": 0, "target_us": 10_000, "margin_us": 0, "is_deferring": False,
        "is_shedding": False, "curve": (),
    }  # fmt: skip
    asyncio.run(version.tick())
    asyncio.run(version.tick())
    assert [policy["max_rows"] for policy in levers.set] == [1, 2, 3, 4, 5, 6]
    assert [(each.knob, each.before, each.after) for each in told] == [
        ("max_batch_size", 1, 3),
        ("max_batch_size", 3, 6),
    ]
    assert (version.knobs["max_batch_size"], version.state, version.rate) == (6, "aimd", 10.0)
    version.give_back(levers.policy())
    assert (levers.set[-1]["max_rows"], levers.set[-1]["delay_us"], levers.set[-1]["target_us"]) == (16, 500, 0)


def test_without_a_target_nothing_is_moved() -> None:
    levers = FakeLevers([observe_full_batches(count) for count in range(1, 7)])
    version = RuledVersion("m", 1, levers, parse_objective("max_batch_size=8"), "linear", looks=3, look_s=0.0)
    asyncio.run(version.tick())
    assert levers.set == []
