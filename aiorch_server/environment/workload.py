"""What an episode is about: a model on a machine, an objective, and the traffic that comes. Pure.

All is drawn from one generator: models that gain much from batches and models that gain nothing, machines on which
instances hinder each other more or less, targets of a few to many run times, loads from idle to more than all instances
together can answer, steady, bursty, a day in short, or a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from aiorch_server.optimizer.arrivals import Ints, OnOff, draw_day, draw_pieces, draw_poisson
from aiorch_server.optimizer.simulated import Machine

LARGEST_ROWS: Final = 32
MOST_INSTANCES: Final = 4
KINDS: Final = ("steady", "bursty", "day", "step")
#: Of an answer within its target, in the reward; an instance costs as much for each second.
DEFAULT_COST: Final = 0.02
_SIZES: Final = (1, 2, 4, 8, 16, 32)
#: So many requests a second at most, so that episodes are quick.
_MOST_RATE: Final = 1500.0
_NOISE: Final = 4096


@dataclass(frozen=True, slots=True)
class Workload:
    """``load`` is the mean rate, in parts of what all instances can answer at their best; ``cost`` is that of one
    instance for a second, in parts of what all of a second's requests bring that are answered in time.
    """

    machine: Machine
    target_us: int
    kind: str
    load: float
    cost: float
    duration_s: float
    times_ns: Ints
    rows: Ints

    @property
    def rate(self) -> float:
        """Requests/s in the mean."""
        return max(1.0, len(self.times_ns)) / self.duration_s


def find_capacity(machine: Machine, target_us: int, instances: int) -> float:
    """Rows/s that so many instances can answer, with the best batch that takes at most half of the target."""
    fitting = [rows for rows in _SIZES if machine.run_ns(rows) <= 500.0 * target_us] or [1]
    best = max(rows / machine.run_ns(rows) for rows in fitting)
    return 1e9 * best * instances / machine.slowdowns[instances - 1]


def draw_workload(
    random: np.random.Generator, duration_s: float, *, kind: str = "", cost: float | None = None
) -> Workload:
    """One of any kind, or of that one."""
    run_ns = float(np.exp(random.uniform(np.log(5e6), np.log(50e6))))
    per_row = float(np.exp(random.uniform(np.log(0.03), np.log(1.1))))
    curve = [(rows, round(run_ns * (1 + per_row * (rows - 1)))) for rows in _SIZES]
    hindrance = float(random.uniform(0.0, 0.4))
    machine = Machine(
        curve,
        LARGEST_ROWS,
        slowdowns=[1.0 + hindrance * others for others in range(MOST_INSTANCES)],
        spread=float(random.uniform(0.02, 0.2)),
        noise=random.standard_normal(_NOISE),
    )
    target_us = round(run_ns / 1000 * float(np.exp(random.uniform(np.log(3.0), np.log(20.0)))))
    capacity = find_capacity(machine, target_us, MOST_INSTANCES)
    rate = min(_MOST_RATE, capacity * float(random.uniform(0.05, 1.3)))
    kind = kind or str(random.choice(KINDS))
    times_ns = _draw_times(kind, rate, duration_s, random)
    return Workload(
        machine,
        target_us,
        kind,
        rate / capacity,
        DEFAULT_COST if cost is None else cost,
        duration_s,
        times_ns,
        np.ones(len(times_ns), np.int64),
    )


def _draw_times(kind: str, rate: float, duration_s: float, random: np.random.Generator) -> Ints:
    if kind == "steady":
        return draw_poisson(rate, duration_s, random)
    if kind == "bursty":
        return OnOff(2.5 * rate, 0.25 * rate, 0.5, 1.0).at_rate(rate).draw(duration_s, random)
    if kind == "day":
        return draw_day(rate, duration_s, random)
    if kind == "step":
        return draw_pieces([(0.5 * rate, duration_s / 2), (1.5 * rate, duration_s / 2)], random)
    raise ValueError(f"'{kind}' is no kind of traffic; one of {', '.join(KINDS)} is right")
