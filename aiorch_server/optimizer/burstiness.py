"""How bursty traffic is, from counts of requests in slots of time, and a process that is as bursty. Pure.

The index of dispersion (variance of the requests in a slot over their mean) is 1 for independent callers in slots of
any length. Bursts raise it, the more the longer the slot, until slots are much longer than bursts: so dispersions at
two or more lengths tell how strong bursts are and how long they last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aiorch_server.optimizer.arrivals import OnOff, remembered

SLOT_S = 0.01
#: Standard errors by which a dispersion must exceed 1 to be called bursts.
_PLAIN_ERRORS = 3.0
_MIN_SLOTS = 8
#: How long states are thought to last: from, to, and how many guesses between.
_SHORTEST_S, _LONGEST_S, _GUESSES = 0.002, 30.0, 48
#: The least part of the time that bursts are thought to take.
_LEAST_PART = 0.02


@dataclass(frozen=True, slots=True)
class Slots:
    """Counts of requests in ``slots`` slots of ``slot_s`` seconds: their sum, and the sum of their squares."""

    slot_s: float
    slots: float
    requests: float
    squares: float

    @property
    def rate(self) -> float:
        """Requests/s."""
        return self.requests / (self.slots * self.slot_s) if self.slots else 0.0

    @property
    def dispersion(self) -> float:
        """Index of dispersion; 1 where too little was seen."""
        if self.slots <= 1 or self.requests <= 0:
            return 1.0
        mean = self.requests / self.slots
        return max(0.0, self.squares / self.slots - mean**2) * self.slots / (self.slots - 1) / mean

    @property
    def error(self) -> float:
        """Standard error of the dispersion for plain Poisson traffic."""
        if self.slots <= 1 or self.requests <= 0:
            return math.inf
        mean = self.requests / self.slots
        return math.sqrt((2.0 + 1.0 / mean) / (self.slots - 1))

    @classmethod
    def of(cls, counts: npt.NDArray[np.int64], slot_s: float) -> Slots:
        """Of counts one by one."""
        values = counts.astype(np.float64)
        return cls(slot_s, len(values), float(values.sum()), float((values**2).sum()))

    def faded(self, factor: float) -> Slots:
        """The same with less weight."""
        return Slots(self.slot_s, self.slots * factor, self.requests * factor, self.squares * factor)

    def __add__(self, other: Slots) -> Slots:
        return Slots(
            self.slot_s, self.slots + other.slots, self.requests + other.requests, self.squares + other.squares
        )


def measure(counts: npt.NDArray[np.int64], slot_s: float = SLOT_S) -> list[Slots]:
    """Slots of that length, and of 4, 16, ... times it as long as there are enough of them."""
    found = []
    while len(counts) >= _MIN_SLOTS:
        found.append(Slots.of(counts, slot_s))
        counts = counts[: len(counts) // 4 * 4].reshape(-1, 4).sum(axis=1)
        slot_s *= 4
    return found


def fit(scales: Iterable[Slots], rate: float | None = None) -> OnOff:
    """The on/off process that is as bursty at those lengths; at ``rate``, or the rate that was seen."""
    known: Sequence[Slots] = [each for each in scales if each.slots >= 2 and each.requests > 0]
    seen = known[0].rate if known else 0.0
    wanted = rate if rate is not None else seen
    if not any(each.dispersion - 1.0 > _PLAIN_ERRORS * each.error for each in known):
        return OnOff.steady(wanted)
    excess = np.array([max(0.0, each.dispersion - 1.0) for each in known])
    # the sampling error of a dispersion grows with itself
    weights = np.array([1.0 / (each.error * max(1.0, each.dispersion)) ** 2 for each in known])
    best = math.inf, 0.0, 1.0
    for memory_s in np.geomspace(_SHORTEST_S, _LONGEST_S, _GUESSES).tolist():
        shape = np.array([remembered(each.slot_s / memory_s) for each in known])
        height = float((weights * shape * excess).sum() / (weights * shape**2).sum())
        cost = float((weights * (excess - height * shape) ** 2).sum())
        if cost < best[0]:
            best = cost, height, memory_s
    _, height, memory_s = best
    return _make_process(seen, height / (2.0 * memory_s * seen), memory_s).at_rate(wanted)


def _make_process(rate: float, variance: float, memory_s: float) -> OnOff:
    """From the variance of the rate relative to its square: two equal parts, or, if that is not enough, on and off."""
    if variance <= 1.0:
        swing = math.sqrt(variance)
        return OnOff(rate * (1.0 + swing), rate * (1.0 - swing), 2.0 * memory_s, 2.0 * memory_s)
    part = max(_LEAST_PART, 1.0 / (1.0 + variance))
    return OnOff(rate / part, 0.0, memory_s / (1.0 - part), memory_s / part)


class Traffic:
    """What came of late: a rate that follows within seconds, and bursts learnt over a longer time.

    Feed it once a window with the counts of its short slots; whole windows are the long slots. Old ones fade.
    """

    def __init__(self, *, rate_half_life_s: float = 3.0, burst_half_life_s: float = 60.0) -> None:
        self._rate_half_life_s, self._burst_half_life_s = rate_half_life_s, burst_half_life_s
        self._recent: Slots | None = None
        self._short: Slots | None = None
        self._long: Slots | None = None

    def observe(self, slots: Slots) -> None:
        """Takes the short slots of the window that has just ended."""
        length_s = slots.slots * slots.slot_s
        if length_s <= 0:
            return
        fade = 0.5 ** (length_s / self._burst_half_life_s)
        window = Slots(length_s, 1, slots.requests, slots.requests**2)
        self._recent = _fade_into(self._recent, slots, 0.5 ** (length_s / self._rate_half_life_s))
        self._short = _fade_into(self._short, slots, fade)
        self._long = _fade_into(self._long, window, fade)

    @property
    def rate(self) -> float:
        """Requests/s of late."""
        return self._recent.rate if self._recent else 0.0

    @property
    def dispersion(self) -> float:
        """Of the requests in a short slot."""
        return self._short.dispersion if self._short else 1.0

    def process(self, rate: float | None = None) -> OnOff:
        """Traffic that is like it, at the rate of late or another."""
        wanted = self.rate if rate is None else rate
        # bursts as long as windows are changes of the load, which the rate follows: only what is within counts in full
        return fit([each for each in (self._short, self._long) if each is not None and each.slots >= 2], wanted)


def _fade_into(before: Slots | None, now: Slots, factor: float) -> Slots:
    return before.faded(factor) + now if before is not None else now
