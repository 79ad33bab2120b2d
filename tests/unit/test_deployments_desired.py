"""What is kept for a start without the database, what a driver sees, what a server measures."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aiorch_server.deployments.desired import Wanted, read_last_known, write_last_known
from aiorch_server.deployments.driver import observe
from aiorch_server.deployments.sampler import Sampler
from aiorch_server.deployments.samples import StepSamples, Window, name_step
from aiorch_server.registry.records import (
    ArtefactFile,
    Deployment,
    Manifest,
    Rollout,
    RolloutPlan,
    RolloutState,
    ServerStatus,
    TrafficTarget,
    VersionStatus,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DEPLOYMENT = Deployment(
    "m",
    7,
    1,
    NOW,
    "ada",
    (1, 2),
    (TrafficTarget(1, 9_000, "stable"), TrafficTarget(2, 1_000, "candidate")),
    instances=2,
)
ROLLOUT = Rollout("r", "m", 1, 2, RolloutPlan(), RolloutState.RUNNING, NOW, "ada", step_began_at=NOW)


def test_what_was_known_is_known_again(tmp_path: Path) -> None:
    manifests = {1: Manifest("d1", (ArtefactFile("a/b", 3, "c" * 64),)), 2: Manifest("d2", ())}
    path = tmp_path / "cache" / "last-known.json"
    write_last_known(path, [Wanted(DEPLOYMENT, ROLLOUT, manifests)])
    assert read_last_known(path) == {"m": Wanted(DEPLOYMENT, None, manifests)}
    write_last_known(path, [])
    assert read_last_known(path) == {}
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "deployments": [{}]}', "\x00"])
def test_a_strange_file_is_told_and_left_out(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "last-known.json"
    path.write_text(text)
    assert read_last_known(path) is None
    assert read_last_known(tmp_path / "none") is None


def status(server: str, generation: int, state: str = "READY", reason: str = "", samples: str = "") -> ServerStatus:
    return ServerStatus(server, "m", generation, (VersionStatus(2, state, reason),), NOW, samples)


def test_what_a_driver_sees() -> None:
    samples = StepSamples(name_step(ROLLOUT), {2: Window(5)}).to_json()
    statuses = [
        status("done", 7, samples=samples),
        status("behind", 6, "UNAVAILABLE", "of before"),
        status("dead", 7, "UNAVAILABLE", "it left", samples),
        status("silent", 3),
    ]
    heard = {each.server: NOW for each in statuses} | {"new": NOW}
    heard["silent"], heard["forgotten"] = NOW - timedelta(seconds=11), NOW - timedelta(days=1)
    seen = observe(ROLLOUT, DEPLOYMENT, {each.server: each for each in statuses}, heard, NOW)
    assert (seen.n_servers, seen.waiting, seen.silent) == (4, ("behind", "new"), ("silent",))
    assert seen.failures == {"dead": "it left"}
    assert seen.window(2).requests == 10 and seen.window(1) == Window()


class Counted:
    """As much of a servable as is measured."""

    def __init__(self) -> None:
        self.durations: dict[int, int] = {}
        self.errors = self.cancelled = self.rejected = 0
        self.signature = SimpleNamespace(is_decoupled=False)
        self.scheduler: Any = SimpleNamespace(
            durations=lambda: dict(self.durations),
            counters=lambda: SimpleNamespace(failures=self.failures),
            in_flight=0,
        )

    @property
    def failures(self) -> dict[str, int]:
        return {"BACKEND": self.errors, "CANCELED": self.cancelled, "REJECTED": self.rejected}

    def serve(self, count: int, errors: int = 0) -> None:
        self.durations[100] = self.durations.get(100, 0) + count
        self.errors += errors


def test_a_step_counts_from_its_beginning_over_reloads() -> None:
    sampler, old, new = Sampler(), Counted(), Counted()
    servables: Any = {1: old, 2: new}
    old.serve(100, 1)
    new.serve(10)
    assert sampler.read(servables) == StepSamples("")
    sampler.begin("first", servables, whole=[1])
    new.serve(5, 2)
    sampler.note(2, "")
    sampler.note(2, "differs")
    found = sampler.read(servables)
    quick = {"slowest_s": 1e-7}
    assert found.windows[1] == Window(101, 1, {100: 100}, **quick), "it gets no requests: its whole life counts"
    assert found.windows[2] == Window(7, 2, {100: 5}, 2, 1, **quick)
    assert found.disagreements == ("differs",)
    again = Counted()
    again.serve(3)
    servables = {1: old, 2: again}
    assert sampler.read(servables).windows[2].requests == 10, "it was loaded again"
    again.serve(1)
    assert sampler.read(servables).windows[2].requests == 11
    sampler.begin("first", servables)
    assert sampler.read(servables).windows[2].requests == 11
    sampler.begin("second", servables)
    assert sampler.read(servables) == StepSamples("second", {1: Window(**quick), 2: Window(**quick)})
    assert sampler.read({}).windows == {1: Window(**quick), 2: Window(**quick)}
    sampler.begin("", {})
    assert not sampler.read({}).windows


def test_what_is_lost_and_for_how_long_nothing_comes_back() -> None:
    now_s = 100.0
    sampler, model = Sampler(lambda: now_s), Counted()
    servables: Any = {2: model}
    model.cancelled = 5
    model.scheduler.in_flight = 3
    sampler.begin("step", servables)
    now_s += 4.0
    assert sampler.read(servables).windows[2].stuck_s == 4
    model.cancelled, model.rejected = 7, 1
    now_s += 4.0
    found = sampler.read(servables).windows[2]
    assert (found.lost, found.requests, found.stuck_s) == (3, 0, 8), "who gives up is no sign of life"
    model.serve(1)
    assert sampler.read(servables).windows[2].stuck_s == 0
    now_s += 4.0
    assert sampler.read(servables).windows[2].stuck_s == 4
    model.scheduler.in_flight = 0
    assert sampler.read(servables).windows[2].stuck_s == 0, "nothing is under way"
    now_s += 4.0
    assert sampler.read(servables).windows[2].stuck_s == 0
    model.scheduler.in_flight = 1
    assert sampler.read(servables).windows[2].stuck_s == 0
    now_s += 4.0
    fresh = Counted()
    fresh.scheduler.in_flight = 1
    assert sampler.read({2: fresh}).windows[2].stuck_s == 0, "it was loaded anew"  # type: ignore[dict-item]


def test_a_clock_that_was_set_back_keeps_no_dead_server_alive() -> None:
    heard = {"alive": NOW, "dead": NOW + timedelta(hours=1)}
    statuses = {"alive": status("alive", DEPLOYMENT.generation)}
    seen = observe(ROLLOUT, DEPLOYMENT, statuses, heard, NOW)
    assert (seen.n_servers, seen.waiting, seen.silent) == (1, (), ("dead",))
