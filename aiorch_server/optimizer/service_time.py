"""How long an instance is busy with a batch, by its rows and by the number of instances; learnt while serving. Pure.

The curve is a line ``a + c * rows`` with a correlated deviation from it: ``t(b) = a + c b + t(b) g(log2 b)``, where g
is a zero-mean Gaussian process whose correlation falls with the distance in octaves. That is linear in all unknowns, so
the estimate and its standard error at any size, seen or not, are one exact solution (best linear unbiased prediction):
far from what was seen the error grows, and a model whose larger batches are slower for each row is as good as others.
How much models deviate from lines is not known: several answers are weighed by how well each explains what was seen.
Then run times are made to grow with the rows, as those of any model do.

Runs at another number of instances tell of the same curve up to a factor, learnt where both saw the same sizes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aiorch_server.optimizer.runs import Cell, Level, Runs, Stalls, take_apart

Floats = npt.NDArray[np.float64]

MAX_POINTS = 33
#: Sizes up to this have cells of their own; above there are this many to the octave.
_OWN_CELLS = 32
_OWN_POINTS = 16
_CELLS_PER_OCTAVE = 4
#: Deviations from a line, as relative standard deviations, and the octaves over which they are alike.
_DEVIATIONS = (0.01, 0.03, 0.1, 0.3)
_CORRELATED_OCTAVES = 2.0
#: Windows whose stalls are remembered, and stalls of one of them.
_STALL_WINDOWS = 30
_MAX_STALLS = 1000
#: Spread of one run before anything is known of it, and for how many runs this belief counts.
_PRIOR_SPREAD = 0.1
_PRIOR_RUNS = 8.0
_MIN_SPREAD = 0.002
#: Relative standard error up to which an estimate is one to decide by.
_TRUSTED_ERROR = 0.1
#: Instances beyond the cores share them; how well that is known before it was seen, in octaves of instances.
_PRIOR_CONTENTION_ERROR = 0.3


@dataclass(frozen=True, slots=True)
class Estimate:
    """The mean run time of a batch, its standard error, and the relative standard deviation of one run."""

    rows: int
    mean_ns: float
    error_ns: float
    spread: float

    @property
    def is_trusted(self) -> bool:
        """Whether the error is small enough to decide by it."""
        return self.error_ns <= _TRUSTED_ERROR * self.mean_ns


class ServiceTime:
    """What was learnt of one model version. ``cores``: how many instances run side by side without sharing a core.

    What is ``half_life_s`` old counts half as much as what is new. Not for several threads at once.
    """

    def __init__(self, max_rows: int, *, half_life_s: float = 30.0, cores: float = 1.0) -> None:
        if max_rows < 1 or half_life_s <= 0 or cores <= 0:
            raise ValueError("max_rows, half_life_s and cores must be positive")
        self.max_rows = max_rows
        self._half_life_s = half_life_s
        self._cores = cores
        self._cells: dict[tuple[int, int], Cell] = {}
        self._now_s = 0.0
        self._instances = 1
        self._points = _choose_points(max_rows)
        self._solved: dict[int, tuple[Estimate, ...]] = {}
        self._stalls: deque[Stalls] = deque(maxlen=_STALL_WINDOWS)

    def observe(self, given: Iterable[Runs], *, instances: int, now_s: float) -> None:
        """Takes what was seen since the last call, while there were so many instances."""
        self._now_s, self._instances = now_s, instances
        self._solved = {}
        spread = self.spread()
        runs, stalls = [], []
        for seen in given:
            if seen.executions > 0:
                usual, held_up = take_apart(seen)
                runs.append(usual)
                stalls.append(held_up)
        lengths = [length for each in stalls for length in each.lengths_ns]
        kept = min(len(lengths), _MAX_STALLS) / max(1, len(lengths)) if lengths else 1.0
        self._stalls.append(Stalls(kept * sum(each.running_ns for each in stalls), tuple(lengths[:_MAX_STALLS])))
        for key, seen in _join(runs).items():
            cell = self._cells.get((instances, key))
            if cell is None:
                cell = self._cells[instances, key] = Cell(self._half_life_s)
            change = cell.add(seen, now_s, spread)
            if change is not None:
                for other in self._cells.values():
                    if other is not cell:
                        other.shift(change)

    def stalls(self) -> Stalls:
        """What held up runs of late, on this machine and at this load."""
        running_ns = sum(each.running_ns for each in self._stalls)
        return Stalls(running_ns, tuple(length for each in self._stalls for length in each.lengths_ns))

    @property
    def is_known(self) -> bool:
        """Whether anything was seen yet."""
        return bool(self._cells)

    @property
    def largest_seen(self) -> int:
        """Rows of the largest batches that ran with as many instances as there are now; 0: none did."""
        sizes = (round(cell.rows) for (count, _), cell in self._cells.items() if count == self._instances)
        return max(sizes, default=0)

    def spread(self) -> float:
        """The relative standard deviation of one run's time, over all sizes."""
        found = [cell.variance() for cell in self._cells.values()]
        total = _PRIOR_RUNS + sum(freedom for _, freedom in found)
        variance = _PRIOR_SPREAD**2 * _PRIOR_RUNS + sum(value * freedom for value, freedom in found)
        return max(_MIN_SPREAD, math.sqrt(variance / total))

    def estimate(self, rows: int, instances: int | None = None) -> Estimate:
        """Of a batch of so many rows. ValueError where nothing was seen yet."""
        estimates = self._solve(instances or self._instances)
        points = [estimate.rows for estimate in estimates]
        mean_ns = float(np.interp(rows, points, [estimate.mean_ns for estimate in estimates]))
        error_ns = float(np.interp(rows, points, [estimate.error_ns for estimate in estimates]))
        spread = float(np.interp(rows, points, [estimate.spread for estimate in estimates]))
        return Estimate(rows, mean_ns, error_ns, spread)

    def curve(self, instances: int | None = None) -> tuple[tuple[int, int], ...]:
        """``(rows, ns)`` at no more than 33 sizes from 1 to ``max_rows``, growing; empty where nothing was seen yet."""
        if not self._cells:
            return ()
        return tuple((estimate.rows, round(estimate.mean_ns)) for estimate in self._solve(instances or self._instances))

    def estimates(self, instances: int | None = None) -> tuple[Estimate, ...]:
        """The curve with its errors. ValueError where nothing was seen yet."""
        return self._solve(instances or self._instances)

    def is_trusted(self, rows: int, instances: int | None = None) -> bool:
        """Whether the estimate for so many rows is one to decide by."""
        return bool(self._cells) and self.estimate(rows, instances).is_trusted

    def contention(self, instances: int, of: int | None = None) -> tuple[float, float]:
        """How many times slower a run is than with ``of`` instances (None: those of now), and its relative error."""
        of = of or self._instances
        if instances == of:
            return 1.0, 0.0
        expected = max(1.0, instances / self._cores) / max(1.0, of / self._cores)
        prior = (_PRIOR_CONTENTION_ERROR * math.log2(instances / of)) ** 2
        weight, total = 1.0 / prior, math.log(expected) / prior
        spread = self.spread()
        for (count, key), cell in self._cells.items():
            other = self._cells.get((of, key))
            if count == instances and other is not None:
                slow, fast = cell.level(self._now_s, spread), other.level(self._now_s, spread)
                variance = (slow.error_ns / slow.mean_ns) ** 2 + (fast.error_ns / fast.mean_ns) ** 2
                weight += 1.0 / variance
                total += math.log(slow.mean_ns / fast.mean_ns) / variance
        return math.exp(total / weight), math.sqrt(1.0 / weight)

    def _solve(self, instances: int) -> tuple[Estimate, ...]:
        if not self._cells:
            raise ValueError("nothing was seen of this model yet")
        if instances not in self._solved:
            base = self._base_of(instances)
            ratio, doubt = self.contention(instances, base)
            means, errors = _predict(*self._levels(base), self._points)
            means, errors = means * ratio, np.hypot(errors, doubt * means) * ratio
            spread = self.spread()
            self._solved[instances] = tuple(
                Estimate(int(rows), float(mean), float(error), spread)
                for rows, mean, error in zip(self._points, means, errors, strict=True)
            )
        return self._solved[instances]

    def _base_of(self, instances: int) -> int:
        """The number of instances whose own curve is scaled: that one, if anything was seen of it, else that of now."""
        seen = {count for count, _ in self._cells}
        return next((count for count in (instances, self._instances) if count in seen), max(seen))

    def _levels(self, instances: int) -> tuple[list[Level], Floats]:
        """All that was seen, as if it had been with that number of instances, and the covariance of its errors."""
        spread = self.spread()
        levels: list[Level] = []
        doubts: list[tuple[int, float]] = []
        for (count, key), cell in self._cells.items():
            if count != instances and (instances, key) in self._cells:
                continue  # it has told its part by the factor
            level = cell.level(self._now_s, spread)
            ratio, doubt = self.contention(instances, count)
            levels.append(Level(level.rows, level.mean_ns * ratio, level.error_ns * ratio))
            doubts.append((count, doubt * level.mean_ns * ratio))
        # what is doubted of a factor is the same for all to which it was applied
        common = [[one * other if count == counted else 0.0 for counted, other in doubts] for count, one in doubts]
        return levels, np.array(common) + np.diag([level.error_ns**2 for level in levels])


def _predict(levels: Sequence[Level], noise: Floats, points: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Means and standard errors at the points, from what was seen at some sizes and the covariance of its errors."""
    rows = np.array([level.rows for level in levels], np.float64)
    means = np.array([level.mean_ns for level in levels])
    center = int(np.argmin(np.diag(noise) / means**2))
    # known before: half of the best known size's time is for the batch, half for its rows, each give or take itself
    prior = np.array([means[center] / 2, means[center] / 2 / rows[center]])
    at = points.astype(np.float64)
    trend_seen, trend_at = np.stack([np.ones_like(rows), rows]), np.stack([np.ones_like(at), at])
    expected_seen, expected_at = prior @ trend_seen, prior @ trend_at
    ordered = np.argsort(rows)
    scale_seen = means
    scale_at = np.exp(np.interp(np.log(at), np.log(rows[ordered]), np.log(means[ordered])))
    line_seen = (trend_seen.T * prior**2) @ trend_seen
    line_cross = (trend_at.T * prior**2) @ trend_seen
    line_at = (trend_at**2 * (prior**2)[:, None]).sum(axis=0)
    octaves_seen, octaves_at = np.log2(rows), np.log2(at)
    alike_seen = np.exp(-np.abs(octaves_seen[:, None] - octaves_seen) / _CORRELATED_OCTAVES)
    alike_cross = np.exp(-np.abs(octaves_at[:, None] - octaves_seen) / _CORRELATED_OCTAVES)
    difference = means - expected_seen
    found = []
    for deviation in _DEVIATIONS:
        covariance = line_seen + deviation**2 * alike_seen * np.outer(scale_seen, scale_seen) + noise
        cross = line_cross + deviation**2 * alike_cross * np.outer(scale_at, scale_seen)
        factor = np.linalg.cholesky(covariance)
        solved = np.linalg.solve(factor, np.column_stack([difference, cross.T]))
        mean = expected_at + solved[:, 1:].T @ solved[:, 0]
        variance = line_at + (deviation * scale_at) ** 2 - (solved[:, 1:] ** 2).sum(axis=0)
        likelihood = -0.5 * float(solved[:, 0] @ solved[:, 0]) - float(np.log(np.diag(factor)).sum())
        found.append((likelihood, mean, np.maximum(variance, 0.0)))
    best = max(likelihood for likelihood, _, _ in found)
    weights = np.array([math.exp(likelihood - best) for likelihood, _, _ in found])
    weights /= weights.sum()
    every = np.stack([mean for _, mean, _ in found])
    mean = weights @ every
    variance = weights @ (np.stack([part for _, _, part in found]) + (every - mean) ** 2)
    floor = means.min() * 0.01
    return np.maximum(_make_monotone(mean, 1.0 / np.maximum(variance, 1.0)), floor), np.sqrt(variance)


def _make_monotone(values: Floats, weights: Floats) -> Floats:
    """The closest growing sequence (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        count = 1
        while pools and pools[-1][0] >= value:
            other, other_weight, others = pools.pop()
            value = (value * weight + other * other_weight) / (weight + other_weight)
            weight += other_weight
            count += others
        pools.append((value, weight, count))
    return np.concatenate([np.full(count, value) for value, _, count in pools])


def _cell_of(rows: float) -> int:
    """The cell to which batches of so many rows belong."""
    if rows <= _OWN_CELLS:
        return round(rows)
    return int(2.0 ** (round(math.log2(rows) * _CELLS_PER_OCTAVE) / _CELLS_PER_OCTAVE))


def _join(runs: Iterable[Runs]) -> dict[int, Runs]:
    """By cell: its sizes taken together."""
    joined: dict[int, Runs] = {}
    for seen in runs:
        if seen.executions < 1:
            continue
        before = joined.get(_cell_of(seen.rows), Runs(seen.rows, 0, 0.0, 0.0))
        executions = before.executions + seen.executions
        joined[_cell_of(seen.rows)] = Runs(
            (before.rows * before.executions + seen.rows * seen.executions) / executions,
            executions,
            before.sum_ns + seen.sum_ns,
            before.sum_ns2 + seen.sum_ns2,
        )
    return joined


def _choose_points(max_rows: int) -> npt.NDArray[np.int64]:
    """Sizes at which the curve is given: all up to 16, then as many as fit, evenly by octaves."""
    own = np.arange(1, min(max_rows, _OWN_POINTS) + 1)
    if max_rows <= _OWN_POINTS:
        return own
    rest = np.geomspace(_OWN_POINTS, max_rows, MAX_POINTS - _OWN_POINTS + 1)[1:]
    # not np.unique, which imports numpy.ma: 1 MB that every server would have
    return np.array(sorted({*own.tolist(), *np.round(rest).astype(np.int64).tolist()}), np.int64)
