"""The best setting for a load that is known beforehand: every candidate through the simulation. Pure.

Best is the one with the fewest instances that keeps the objective; among those, the one with the lowest percentile,
unless a plainer one (no delay, a smaller batch) is as good within what a simulation can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from aiorch_server.config.objective import Objective
from aiorch_server.optimizer.arrivals import Ints, OnOff, Trace
from aiorch_server.optimizer.predict import Demand, Knobs, Prediction, Scenario, Surroundings
from aiorch_server.optimizer.service_time import ServiceTime

#: Of the target, kept free for what the curve does not know; as the tuner has it.
MARGIN: Final = 0.05
#: Requests of a repetition; a longer trace is cut there.
MAX_REQUESTS: Final = 20_000
_DRAWN, _REPETITIONS = 5000, 3
#: Percentiles that are closer to each other are alike.
_ALIKE: Final = 0.05
_LOADS: Final = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
_LARGEST_GROWTH, _GROWTH_STEPS = 64.0, 7


@dataclass(frozen=True, slots=True)
class Found:
    """A setting and what is predicted of it; ``good`` is the share of requests that are answered within the target."""

    prediction: Prediction
    good: float
    is_met: bool

    @property
    def knobs(self) -> Knobs:
        """The setting."""
        return self.prediction.knobs


@dataclass(frozen=True, slots=True)
class Point:
    """The best setting at a load of ``rate`` requests/s."""

    rate: float
    found: Found


class Search:
    """Tries settings of one model under ``traffic``. ``cores`` are those that instances and the door share.

    ValueError where the traffic has no two requests.
    """

    def __init__(self, service: ServiceTime, objective: Objective, traffic: Sequence[Trace], *, cores: int) -> None:
        if not traffic or any(len(each) < 2 or each.duration_s <= 0 for each in traffic):
            raise ValueError("the traffic holds no two requests at different times: there is nothing to tune for")
        self.objective, self.traffic = objective, traffic
        self._service = service
        self._limit = min(service.max_rows, objective.max_batch_size or service.max_rows)
        self._most = objective.max_instances or max(cores, objective.min_instances)
        counts = range(1, self._most + 2)
        self._around = Surroundings(
            cores=float(cores),
            slowdowns=tuple(service.contention(count, 1)[0] for count in counts),
            stalls=service.stalls(),
        )
        self._scenarios: dict[float, Scenario] = {}
        self.rate = float(np.mean([each.rate for each in traffic]))

    def list_candidates(self) -> list[Knobs]:
        """Batches by powers of two, delays by parts of the target, instances within the objective's bounds."""
        caps = sorted({min(1 << power, self._limit) for power in range(self._limit.bit_length() + 1)})
        target_us = self.objective.latency_us
        longest_us = min(self.objective.max_delay_us or target_us // 2, target_us // 2)
        delays = sorted({0, *(min(target_us // part, longest_us) for part in (32, 8, 4, 2))})
        return [
            Knobs(cap, delay, True, True, count)
            for count in range(self.objective.min_instances, self._most + 1)
            for cap in caps
            for delay in (delays if cap > 1 else [0])
        ]

    def try_all(self, on_progress: Callable[[float], None] = lambda part: None) -> list[Found]:
        """Every candidate, the best first."""
        candidates = self.list_candidates()
        found = []
        for number, knobs in enumerate(candidates, 1):
            found.append(self.predict(knobs))
            on_progress(number / len(candidates))
        return sorted(found, key=_rank)

    def predict(self, knobs: Knobs, load: float = 1.0) -> Found:
        """Of one setting at ``load`` times the traffic."""
        prediction = self._scenario(load).predict(knobs)
        good = max(0.0, 1.0 - prediction.late - prediction.lost)
        return Found(prediction, good, good >= 1.0 - self.objective.allowed_misses)

    def find_frontier(self, chosen: Knobs, instances: int) -> list[Point]:
        """The best batch and delay with so many instances at several loads."""
        caps = sorted({each.max_rows for each in self.list_candidates()})
        tried = {replace(chosen, max_rows=cap, delay_us=delay, instances=instances)
                 for cap in caps for delay in (0, chosen.delay_us)}  # fmt: skip
        ordered = sorted(tried, key=lambda each: (each.max_rows, each.delay_us))
        return [
            Point(self.rate * load, min((self.predict(knobs, load) for knobs in ordered), key=_rank)) for load in _LOADS
        ]

    def find_growth(self, knobs: Knobs) -> float:
        """How many times the traffic a setting can carry within the objective, to about 2 %; 0 where it never can."""
        low, high = 0.0, 1.0
        while high < _LARGEST_GROWTH and self.predict(knobs, high).is_met:
            low, high = high, high * 2
        if low == 0.0:
            return self._narrow(knobs, 0.0, 1.0)
        return self._narrow(knobs, low, high) if high < _LARGEST_GROWTH else low

    def _narrow(self, knobs: Knobs, low: float, high: float) -> float:
        for _ in range(_GROWTH_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.predict(knobs, middle).is_met else (low, middle)
        return low

    def _scenario(self, load: float) -> Scenario:
        if load not in self._scenarios:
            target_us = self.objective.latency_us
            drawn = Scenario.of(
                self._service.estimates(1),
                OnOff.steady(self.rate),
                demand=Demand(target_us, self.objective.percentile / 100.0, round(target_us * MARGIN)),
                surroundings=self._around,
                repetitions=len(self.traffic),
            )
            self._scenarios[load] = replace(drawn, traffic=[_scale(each, load) for each in self.traffic])
        return self._scenarios[load]


def draw_traffic(process: OnOff, rows: int, seed: int = 0) -> list[Trace]:
    """Repetitions of random traffic, each request of so many rows."""
    random = np.random.default_rng(seed)
    drawn = [process.draw(_DRAWN / process.rate, random) for _ in range(_REPETITIONS)]
    return [Trace(times_ns, np.full(len(times_ns), rows, np.int64)) for times_ns in drawn]


def repeat_trace(trace: Trace) -> list[Trace]:
    """A trace as often as random traffic is drawn: noise and doubts differ. Cut after ``MAX_REQUESTS``."""
    return [Trace(trace.times_ns[:MAX_REQUESTS], trace.rows[:MAX_REQUESTS])] * _REPETITIONS


def _scale(trace: Trace, load: float) -> tuple[Ints, Ints]:
    return np.round(trace.times_ns / load).astype(np.int64), trace.rows


def _rank(found: Found) -> tuple[float, ...]:
    knobs, prediction = found.knobs, found.prediction
    if not found.is_met:
        return (1.0, -round(found.good, 3), prediction.percentile_ns, knobs.instances)
    # latencies in steps of what is alike, so that the plainer one comes first within a step
    step = round(float(np.log(max(1.0, prediction.percentile_ns))) / _ALIKE)
    return (0.0, knobs.instances, step, knobs.delay_us, knobs.max_rows)
