"""What an agent moves and what it sees, as numbers. Pure.

An action has four whole numbers: rows of a batch - 1, the delay in 64ths of the target, instances - 1, and whether what
cannot be answered in time is refused (1) or queued (0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from aiorch_server.environment.workload import LARGEST_ROWS, MOST_INSTANCES, Workload
from aiorch_server.optimizer.window import Window

DELAYS: Final = 33  # 0 to half of the target
_DELAY_PART: Final = 64
#: How many values each number of an action has.
SHAPE: Final = (LARGEST_ROWS, DELAYS, MOST_INSTANCES, 2)
QUANTILE: Final = 0.99
#: No number of an observation is larger.
HIGHEST: Final = 4.0
#: What an observation has, in its order.
NAMES: Final = (
    "rate over what all instances can answer",
    "rate over what those of now can answer with batches of the cap",
    "index of dispersion of arrivals, log2, in eighths",
    "time to answer what waits, over the target",
    "part of time that instances are busy",
    "p99 over the target, 0 without answers",
    "part of requests that missed the target",
    "mean rows of a batch over the largest",
    "run of one row over the target",
    "run of the largest batch over the target",
    "run of the largest batch over as many runs of one row",
    "log2 of the cap, in fifths",
    "delay over the target",
    "instances, in quarters",
    "whether what cannot be in time is refused",
    "cost of an instance, in tenths",
)


@dataclass(frozen=True, slots=True)
class Choice:
    """An action in words."""

    max_rows: int = LARGEST_ROWS
    delay_us: int = 0
    instances: int = 1
    is_refusing: bool = False

    def encode(self, target_us: int) -> npt.NDArray[np.int64]:
        """The nearest action."""
        delay = round(self.delay_us * _DELAY_PART / target_us)
        if self.delay_us > 0:
            delay = max(1, delay)
        wanted = np.array([self.max_rows - 1, delay, self.instances - 1, int(self.is_refusing)], np.int64)
        return np.clip(wanted, 0, np.array(SHAPE) - 1)

    @classmethod
    def decode(cls, action: npt.NDArray[np.int64], target_us: int) -> Choice:
        """ValueError where it is none."""
        numbers = [int(each) for each in action]
        if len(numbers) != len(SHAPE) or not all(0 <= n < most for n, most in zip(numbers, SHAPE, strict=True)):
            raise ValueError(f"found {numbers}; an action has {len(SHAPE)} numbers from 0 to below {SHAPE}")
        rows, delay, instances, refusing = numbers
        return cls(rows + 1, delay * target_us // _DELAY_PART, instances + 1, bool(refusing))


def look(workload: Workload, choice: Choice, window: Window | None) -> npt.NDArray[np.float32]:
    """What is seen after a window; before the first one, of the model and the knobs alone."""
    machine, target_ns = workload.machine, workload.target_us * 1000.0
    one_ns, all_ns = machine.run_ns(1), machine.run_ns(LARGEST_ROWS)
    best = max(rows / machine.run_ns(rows) for rows in range(1, LARGEST_ROWS + 1)) * MOST_INSTANCES
    cap_ns = machine.run_ns(choice.max_rows) / choice.max_rows  # for each row
    seen = [0.0] * 8
    if window is not None:
        rate = window.arrived_rows / window.length_s / 1e9
        found = window.percentile(QUANTILE)
        ended = window.answered + window.lost
        executions = sum(run.executions for run in window.runs)
        seen = [
            rate / (best / machine.slowdowns[-1]),
            rate * cap_ns / choice.instances * machine.slowdowns[choice.instances - 1],
            math.log2(max(1.0, window.slots.dispersion)) / 8,
            window.waiting_rows * cap_ns / choice.instances / target_ns,
            window.busy,
            found.value_ns / target_ns if found is not None else 0.0,
            (window.late + window.lost) / ended if ended else 0.0,
            sum(run.rows * run.executions for run in window.runs) / executions / LARGEST_ROWS if executions else 0.0,
        ]
    known = [
        one_ns / target_ns,
        all_ns / target_ns,
        all_ns / (LARGEST_ROWS * one_ns),
        math.log2(choice.max_rows) / 5,
        choice.delay_us * 1000 / target_ns,
        choice.instances / 4,
        float(choice.is_refusing),
        10 * workload.cost,
    ]
    return np.clip(np.array(seen + known, np.float32), 0.0, HIGHEST)
