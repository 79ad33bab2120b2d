"""Arrival processes: when each request of an open loop is due."""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

_NS_PER_S = 1_000_000_000


class Arrival(enum.Enum):
    """How the requests of an open loop are spread over time, at the same mean rate."""

    CONSTANT = "constant"  #: equal gaps
    POISSON = "poisson"  #: independent callers: exponential gaps
    BURST = "burst"  #: Poisson in "on" phases, silence in "off" phases


def schedule_arrivals(
    arrival: Arrival,
    rate: float,
    duration_s: float,
    *,
    burst_on_s: float = 0.1,
    burst_off_s: float = 0.4,
    seed: int = 0,
) -> npt.NDArray[np.int64]:
    """Due times in nanoseconds from the start, sorted, int64 ``[n]``, all below ``duration_s``.

    ``rate`` is the mean in requests/s over whole on/off cycles, so bursts are ``(on + off) / on`` times as dense.
    The same seed gives the same times.
    """
    if arrival is Arrival.CONSTANT:
        count = int(np.ceil(rate * duration_s))
        due_s = np.arange(count, dtype=np.float64) / rate
    elif arrival is Arrival.POISSON:
        due_s = _draw_poisson(rate, duration_s, seed)
    else:
        cycle_s = burst_on_s + burst_off_s
        cycles = np.floor(duration_s / cycle_s)
        busy_s = cycles * burst_on_s + min(duration_s - cycles * cycle_s, burst_on_s)
        busy_due_s = _draw_poisson(rate * cycle_s / burst_on_s, busy_s, seed)
        due_s = busy_due_s + np.floor(busy_due_s / burst_on_s) * burst_off_s
    return (due_s[due_s < duration_s] * _NS_PER_S).astype(np.int64)


def _draw_poisson(rate: float, duration_s: float, seed: int) -> npt.NDArray[np.float64]:
    # Given their number, the points of a Poisson process are uniform: exact, and one draw instead of a loop.
    generator = np.random.default_rng(seed)
    count = int(generator.poisson(rate * duration_s))
    return np.sort(generator.uniform(0.0, duration_s, count))
