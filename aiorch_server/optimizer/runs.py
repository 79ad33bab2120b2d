"""What was seen of runs of one batch size at one number of instances: windows, and what they say together. Pure.

Where run times were kept one by one, a run that took several times the usual was held up by something else on the
machine: such stalls are told apart from the model's own time, and kept as what they are, a time of running after which
one comes and how long it is.

A window is the difference of two snapshots: how often, and the sums of run times and of their squares. Its mean says
little where one run in it was held up, so the mean of a cell is a robust one over windows (Tukey's biweight around
their weighted median), each weighted by its runs and by its age. Where three windows in a row differ plainly from those
before in one direction, the model itself has changed: what is older is dropped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_MAX_WINDOWS = 64
#: Windows in a row that have to agree on a change, and how much they have to differ: in standard errors, relatively.
_CHANGE_WINDOWS = 3
_CHANGE_ERRORS = 4.0
_CHANGE_RATIO = 0.05
#: Where the weight of a window ends, in its standard errors.
_BIWEIGHT = 6.0
#: From so many windows on they tell how far apart windows of one machine are for reasons of its own.
_MIN_WINDOWS_TO_SCALE = 5
#: The median of the absolute values of a standard normal variable, inverted.
_NORMAL_MAD = 1.4826
#: Runs that a window's own spread must exceed the usual one by (in variance) to say that something else happened in it.
_DISTURBED = 4.0
#: Times the median run that make a run a stalled one; and how wide buckets of run times are, relative to their bound.
_STALLED = 2.5
_BUCKET_WIDTH = 1.0 / 12.0


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of batches of ``rows`` rows (a mean, where several sizes are taken together) within a window: how many, the
    sum of their times, and of the squares. ``times``, where known: runs by the upper bound of their time in ns.
    """

    rows: float
    executions: int
    sum_ns: float
    sum_ns2: float
    times: Mapping[int, int] = field(default_factory=dict)

    @property
    def mean_ns(self) -> float:
        """Of one run."""
        return self.sum_ns / self.executions

    @property
    def variance_ns2(self) -> float:
        """Of one run; 0 where there was only one."""
        if self.executions < 2:
            return 0.0
        return max(0.0, self.sum_ns2 - self.sum_ns**2 / self.executions) / (self.executions - 1)


@dataclass(frozen=True, slots=True)
class Stalls:
    """How long runs were held up beyond their usual time, one by one, within so much time of running."""

    running_ns: float
    lengths_ns: tuple[float, ...]


def take_apart(runs: Runs) -> tuple[Runs, Stalls]:
    """The runs without those that were stalled, and the stalls. Nothing is told apart where there are no ``times``."""
    limit_ns = _STALLED * _weighted_median(runs.times.items()) if runs.times else math.inf
    stalled = {upper_ns: count for upper_ns, count in runs.times.items() if upper_ns > limit_ns}
    if not runs.times or sum(runs.times.values()) != runs.executions:
        return runs, Stalls(runs.sum_ns, ())
    middles = {upper_ns: upper_ns * (1.0 - _BUCKET_WIDTH / 2) for upper_ns in runs.times}
    usual = [(middles[upper_ns], count) for upper_ns, count in runs.times.items() if upper_ns not in stalled]
    executions = sum(count for _, count in usual)
    rough_ns = sum(middle * count for middle, count in usual) / executions
    # the exact sum, less what stalled runs took about; where that is most of it, the buckets are the better source
    sum_ns = runs.sum_ns - sum(middles[upper_ns] * count for upper_ns, count in stalled.items())
    if not 0.95 * rough_ns <= sum_ns / executions <= 1.05 * rough_ns:
        sum_ns = rough_ns * executions
    mean_ns = sum_ns / executions
    if stalled:
        between = sum(count * (middle - rough_ns) ** 2 for middle, count in usual) / executions
        variance = max(0.0, between - (_BUCKET_WIDTH * rough_ns) ** 2 / 12)
    else:
        variance = max(0.0, runs.sum_ns2 / executions - mean_ns**2)
    lengths = [middles[upper_ns] - mean_ns for upper_ns, count in stalled.items() for _ in range(count)]
    running_ns = mean_ns * runs.executions
    return Runs(runs.rows, executions, sum_ns, executions * (variance + mean_ns**2)), Stalls(running_ns, tuple(lengths))


@dataclass(slots=True)
class _Window:
    at_s: float
    rows: float
    executions: int
    mean_ns: float
    variance_ns2: float


@dataclass(frozen=True, slots=True)
class Level:
    """What a cell says: the mean run time and its standard error, as of a moment."""

    rows: float
    mean_ns: float
    error_ns: float


@dataclass(frozen=True, slots=True)
class Change:
    """Since that moment runs take ``ratio`` times as long."""

    ratio: float
    since_s: float


class Cell:
    """The windows of one batch size, or of sizes that are nearly the same; the oldest go when there are too many.

    ``doubt`` is a relative standard deviation that came over the cell because others changed: fresh windows end it.
    """

    def __init__(self, half_life_s: float) -> None:
        self.doubt = 0.0
        self._half_life_s = half_life_s
        self._windows: deque[_Window] = deque(maxlen=_MAX_WINDOWS)

    @property
    def rows(self) -> float:
        """Of the newest window."""
        return self._windows[-1].rows

    def add(self, runs: Runs, at_s: float, spread: float) -> Change | None:
        """Takes a window; gives the change of the model that it proves, if it does."""
        if self.doubt:
            self._windows.clear()
            self.doubt = 0.0
        self._windows.append(_Window(at_s, runs.rows, runs.executions, runs.mean_ns, runs.variance_ns2))
        return self._find_change(at_s, spread)

    def shift(self, change: Change) -> None:
        """Others changed: so did this one, presumably, and what was seen of it before is worth that much less."""
        for window in self._windows:
            if window.at_s < change.since_s:
                window.mean_ns *= change.ratio
                window.variance_ns2 *= change.ratio**2
        if self._windows and self._windows[-1].at_s < change.since_s:
            self.doubt = math.hypot(self.doubt, (change.ratio - 1.0) / 2.0)

    def variance(self) -> tuple[float, float]:
        """``(relative variance of one run, degrees of freedom)``: the median over windows, which stalls do not move."""
        known = [(w.variance_ns2 / w.mean_ns**2, w.executions - 1.0) for w in self._windows if w.executions > 1]
        if not known:
            return 0.0, 0.0
        return _weighted_median(known), sum(freedom for _, freedom in known)

    def level(self, at_s: float, spread: float) -> Level:
        """The mean as of now; ``spread`` is the relative standard deviation of one run. There must be a window."""
        return self._describe(list(self._windows), at_s, spread)[0]

    def _find_change(self, at_s: float, spread: float) -> Change | None:
        windows = list(self._windows)
        if len(windows) <= _CHANGE_WINDOWS:
            return None
        before, scale = self._describe(windows[:-_CHANGE_WINDOWS], at_s, spread)
        since = windows[-_CHANGE_WINDOWS:]
        ratios = [window.mean_ns / before.mean_ns for window in since]
        for window, ratio in zip(since, ratios, strict=True):
            error = math.hypot(scale * spread / math.sqrt(window.executions), before.error_ns / before.mean_ns)
            if abs(ratio - 1.0) < max(_CHANGE_RATIO, _CHANGE_ERRORS * error):
                return None
        if min(ratios) < 1.0 < max(ratios):
            return None
        self._windows = deque(since, maxlen=_MAX_WINDOWS)
        return Change(self._describe(since, at_s, spread)[0].mean_ns / before.mean_ns, since[0].at_s)

    def _describe(self, windows: Sequence[_Window], at_s: float, spread: float) -> tuple[Level, float]:
        """The mean, and how much farther apart the windows are than the spread of single runs makes them."""
        weights = [w.executions * 0.5 ** ((windows[-1].at_s - w.at_s) / self._half_life_s) for w in windows]
        center = _weighted_median(zip((w.mean_ns for w in windows), weights, strict=True))
        errors = [center * spread / math.sqrt(w.executions) for w in windows]
        distances = [abs(w.mean_ns - center) / error for w, error in zip(windows, errors, strict=True)]
        scale = 1.0
        if len(windows) >= _MIN_WINDOWS_TO_SCALE:
            scale = max(1.0, _NORMAL_MAD * _weighted_median(zip(distances, weights, strict=True)))
        total = weighted = variance = rows = 0.0
        for window, weight, error, distance in zip(windows, weights, errors, distances, strict=True):
            error *= scale
            if len(windows) > 2:
                weight *= max(0.0, 1.0 - (distance / scale / _BIWEIGHT) ** 2) ** 2
            if window.variance_ns2 > _DISTURBED * (spread * center) ** 2:
                own = window.variance_ns2 / window.executions
                weight *= error**2 / own
                error = math.sqrt(own)
            total += weight
            weighted += weight * window.mean_ns
            variance += (weight * error) ** 2
            rows += weight * window.rows
        mean = weighted / total
        age = max(0.0, at_s - windows[-1].at_s) / self._half_life_s
        error_ns = math.sqrt(variance) / total * 2.0 ** (age / 2.0)
        return Level(rows / total, mean, math.hypot(error_ns, self.doubt * mean)), scale


def _weighted_median(pairs: Iterable[tuple[float, float]]) -> float:
    ordered = sorted(pairs)
    half = sum(weight for _, weight in ordered) / 2.0
    passed = 0.0
    for value, weight in ordered:
        passed += weight
        if passed >= half:
            return value
    return ordered[-1][0]
