"""How decisions are counted by what became of them, and what is shown of a version that has seen nothing yet."""

from __future__ import annotations

import math

import pytest
from prometheus_client.registry import CollectorRegistry

from aiorch_server.config.objective import parse_objective
from aiorch_server.errors import ModelNotReady
from aiorch_server.optimizer.metrics import TunerCollector
from aiorch_server.optimizer.predict import Knobs
from aiorch_server.optimizer.sight import Sight
from aiorch_server.optimizer.tuned import TunedVersion
from aiorch_server.optimizer.tuner import Move, Situation, State, Tuner
from aiorch_server.types import BatchingPolicy, SchedulerObservation

LABELS = {"model": "m", "version": "3"}


class Levers:
    largest_rows = 8
    serving = 1
    can_grow = True

    def __init__(self) -> None:
        self.seconds = 0

    def observe(self) -> SchedulerObservation:
        self.seconds += 1
        numbers = dict.fromkeys(SchedulerObservation.__dataclass_fields__, 0)
        told = {"at_ns": self.seconds * 10**9, "instances": 1, "in_time": 5, "runs": (), "durations": {}}
        return SchedulerObservation(**{**numbers, **told})

    def policy(self) -> BatchingPolicy:
        return BatchingPolicy(8, 0, 0, 0, False, False, 1, ())

    def set_policy(self, **fields: object) -> None:
        pass

    async def set_instances(self, count: int) -> None:
        raise ModelNotReady("no room")


class Scripted(Tuner):
    """Moves and judges as it is told, a step at a time."""

    script: list[tuple[Move | None, str]]

    def step(self, now_s: float, sight: Sight, situation: Situation) -> Move | None:
        move, self.verdict = self.script.pop(0)
        return move


def read(tuned: TunedVersion, name: str, **labels: str) -> float | None:
    registry = CollectorRegistry()
    registry.register(TunerCollector(lambda: [tuned]))
    return registry.get_sample_value(name, {**LABELS, **labels})


def make() -> TunedVersion:
    return TunedVersion("m", 3, Levers(), parse_objective("p99=10ms"), cores=2, written_instances=1)


async def test_decisions_are_counted_by_what_became_of_them() -> None:
    tuned = make()
    tuned.tuner = tuner = Scripted(tuned.tuner.knobs, tuned.bounds)
    wide, narrow, two = Knobs(8), Knobs(4), Knobs(8, instances=2)
    tuner.state = State.STEADY
    tuner.script = [
        (Move("max_batch_size", wide, narrow, "try"), ""),
        (None, "good"),
        (Move("max_batch_size", narrow, wide, "try"), ""),
        (Move("max_batch_size", wide, narrow, "harm", is_undone=True), "bad"),
        (Move("instances", wide, two, "more"), ""),
    ]
    for _ in range(len(tuner.script) + 1):
        await tuned.tick()
    assert [each.effect[:9] for each in tuned.decisions] == ["good", "bad", "", "it could "]
    name = "aiorch_tuner_decisions_total"
    counts = {outcome: read(tuned, name, knob="max_batch_size", outcome=outcome) for outcome in ("kept", "undone")}
    assert counts == {"kept": 1, "undone": 1}
    assert read(tuned, name, knob="instances", outcome="failed") == 1
    assert read(tuned, name, knob="delay", outcome="kept") == 0
    assert read(tuned, "aiorch_objective_requests_total", end="in_time") == 5


def test_what_is_not_known_yet_is_no_number() -> None:
    tuned = make()
    assert read(tuned, "aiorch_objective_latency_seconds") == pytest.approx(0.01)
    for name in ("measured", "predicted"):
        value = read(tuned, f"aiorch_tuner_{name}_latency_seconds")
        assert value is not None
        assert math.isnan(value)
    assert read(tuned, "aiorch_objective_requests_total", end="in_time") is None
    assert read(tuned, "aiorch_tuner_state", state="learning") == 1


def test_of_two_generations_the_later_is_shown() -> None:
    older, newer = make(), make()
    newer.cpu_s = 2.0
    registry = CollectorRegistry()
    registry.register(TunerCollector(lambda: [older, newer]))
    assert registry.get_sample_value("aiorch_tuner_cpu_seconds_total", LABELS) == 2.0
    families = list(TunerCollector(lambda: [older, newer]).collect())
    assert [len(each.samples) for each in families if each.name == "aiorch_tuner_instances"] == [1]
    assert list(TunerCollector(list).collect()) == []
