"""Traffic: when requests come and how many rows each has. Random processes, and traces of what came. Pure.

Every process draws from the generator that it is given, so that the same seed gives the same traffic. Times are int64
nanoseconds from the start, ascending.
"""

from __future__ import annotations

import csv
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_NS_PER_S = 1_000_000_000
#: Requests that a process may draw, or a trace hold: 800 MB would be the wrong way to learn of a wrong unit.
MAX_REQUESTS = 50_000_000
_DAY_PIECES = 288


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests: ``times_ns`` from the start and ``rows`` of each, of equal length. ValueError where they are not so."""

    times_ns: Ints
    rows: Ints

    def __post_init__(self) -> None:
        if self.times_ns.shape != self.rows.shape or self.times_ns.ndim != 1:
            raise ValueError(f"{self.times_ns.shape} times and {self.rows.shape} rows: they must be two equal lists")
        if len(self.times_ns) and (self.times_ns[0] < 0 or np.any(np.diff(self.times_ns) < 0)):
            raise ValueError("times must ascend from 0 on")
        if np.any(self.rows < 1):
            raise ValueError("each request has at least one row")

    def __len__(self) -> int:
        return len(self.times_ns)

    @property
    def duration_s(self) -> float:
        """From the start to the last request."""
        return float(self.times_ns[-1]) / _NS_PER_S if len(self) else 0.0

    @property
    def rate(self) -> float:
        """Requests/s in the mean; 0 of fewer than two."""
        return len(self) / self.duration_s if self.duration_s > 0 else 0.0

    def at_rate(self, rate: float) -> Trace:
        """The same requests, faster or slower as a whole."""
        return Trace(np.round(self.times_ns * (self.rate / rate)).astype(np.int64), self.rows)

    def save(self, path: Path) -> None:
        """Writes an .npz, or a .csv with the columns time_s and rows."""
        if path.suffix == ".csv":
            with path.open("w", newline="") as file:
                lines = csv.writer(file)
                lines.writerow(("time_s", "rows"))
                lines.writerows(
                    (f"{at / _NS_PER_S:.9f}", rows)
                    for at, rows in zip(self.times_ns.tolist(), self.rows.tolist(), strict=True)
                )
        else:
            with path.open("wb") as file:
                np.savez_compressed(file, times_ns=self.times_ns, rows=self.rows)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Reads what ``save`` writes; rows may be missing (1), times start anywhere. ValueError where it is none."""
        return _load_csv(path) if path.suffix == ".csv" else _load_arrays(path)


def _load_arrays(path: Path) -> Trace:
    # its own file: numpy leaves one open that is no archive
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path}: a trace is an .npz or a .csv")
        file.seek(0)
        times_ns, rows = _read_arrays(path, np.load(file, allow_pickle=False))
    return Trace(times_ns - times_ns[:1].sum(), rows)


def _read_arrays(path: Path, archive: Any) -> tuple[Ints, Ints]:
    with archive as stored:
        if "times_ns" not in stored:
            raise ValueError(f"{path}: a trace has an array times_ns, this file has {', '.join(stored) or 'none'}")
        times_ns = stored["times_ns"].astype(np.int64)
        rows = stored["rows"].astype(np.int64) if "rows" in stored else np.ones_like(times_ns)
    return times_ns, rows


def _load_csv(path: Path) -> Trace:
    times, rows = [], []
    with path.open(newline="") as file:
        lines = csv.DictReader(file)
        if "time_s" not in (lines.fieldnames or ()):
            raise ValueError(f"{path}: a trace begins with a line that names the columns time_s and rows")
        for line in lines:
            try:
                times.append(round(Decimal(line["time_s"]) * _NS_PER_S))  # seconds since 1970 are too fine for floats
                rows.append(int(line.get("rows") or 1))
            except (TypeError, ValueError, OverflowError, InvalidOperation):
                raise ValueError(f"{path}, line {lines.line_num}: no time and number of rows") from None
            if len(times) > MAX_REQUESTS:
                raise ValueError(f"{path}: more than {MAX_REQUESTS} requests")
    times_ns = np.array(times, np.int64)
    return Trace(times_ns - times_ns[:1].sum(), np.array(rows, np.int64))


def draw_poisson(rate: float, duration_s: float, random: np.random.Generator) -> Ints:
    """Independent callers: ``rate`` requests/s."""
    return draw_pieces([(rate, duration_s)], random)


def draw_pieces(pieces: Sequence[tuple[float, float]], random: np.random.Generator) -> Ints:
    """Poisson with a rate that changes: ``(requests/s, seconds)`` one after the other; a step is two of them."""
    rates = np.array([rate for rate, _ in pieces], np.float64)
    lengths_s = np.array([length for _, length in pieces], np.float64)
    if not len(pieces) or np.any(rates < 0) or np.any(lengths_s < 0) or not np.isfinite([rates, lengths_s]).all():
        raise ValueError("rates and times must be numbers and not negative")
    expected = np.concatenate([[0.0], np.cumsum(rates * lengths_s)])
    if expected[-1] > MAX_REQUESTS:
        raise ValueError(f"{expected[-1]:.0f} requests are more than {MAX_REQUESTS}")
    # given their number, the points of a Poisson process are uniform in expected requests
    points = np.sort(random.uniform(0.0, expected[-1], random.poisson(expected[-1])))
    starts_s = np.concatenate([[0.0], np.cumsum(lengths_s)])
    piece = np.minimum(np.searchsorted(expected, points, side="right") - 1, len(rates) - 1)
    inside_s = (points - expected[piece]) / np.maximum(rates[piece], np.finfo(np.float64).tiny)
    return _to_ns(starts_s[piece] + np.minimum(inside_s, lengths_s[piece]))


def draw_day(rate: float, duration_s: float, random: np.random.Generator, *, peak: float = 2.0) -> Ints:
    """A day in ``duration_s``: from a low night through a morning and an afternoon peak, ``rate`` in the mean.

    ``peak`` is the rate of the busiest moment, in parts of the mean (up to 2.5).
    """
    if not 1.0 <= peak <= 2.5:
        raise ValueError(f"a peak of {peak} times the mean: must be 1 to 2.5")
    hours = (np.arange(_DAY_PIECES) + 0.5) / _DAY_PIECES * 24.0
    shape = np.exp(-(((hours - 10.5) / 2.5) ** 2)) + 0.8 * np.exp(-(((hours - 16.0) / 3.0) ** 2))
    shape = shape / shape.mean() - 1.0
    rates = rate * np.maximum(0.0, 1.0 + shape * (peak - 1.0) / shape.max())
    return draw_pieces([(each, duration_s / _DAY_PIECES) for each in rates.tolist()], random)


@dataclass(frozen=True, slots=True)
class OnOff:
    """Poisson with two rates in turn, each held for an exponential time: a two-state Markov-modulated process.

    With equal rates it is plain Poisson, and the times do not matter.
    """

    high_rate: float
    low_rate: float
    high_s: float
    low_s: float

    @classmethod
    def steady(cls, rate: float) -> OnOff:
        """Plain Poisson."""
        return cls(rate, rate, 1.0, 1.0)

    @property
    def rate(self) -> float:
        """Requests/s in the mean."""
        return (self.high_rate * self.high_s + self.low_rate * self.low_s) / (self.high_s + self.low_s)

    def at_rate(self, rate: float) -> OnOff:
        """The same bursts at another mean rate."""
        ratio = rate / self.rate
        return OnOff(self.high_rate * ratio, self.low_rate * ratio, self.high_s, self.low_s)

    def dispersion(self, slot_s: float) -> float:
        """Variance of the requests in a slot over their mean, exactly; 1 for Poisson."""
        part = self.high_s / (self.high_s + self.low_s)
        variance = part * (1.0 - part) * (self.high_rate - self.low_rate) ** 2
        memory_s = 1.0 / (1.0 / self.high_s + 1.0 / self.low_s)
        return 1.0 + 2.0 * variance * memory_s / self.rate * remembered(slot_s / memory_s)

    def draw(self, duration_s: float, random: np.random.Generator) -> Ints:
        """Requests of so many seconds, beginning in either state as often as it is met."""
        if self.high_rate == self.low_rate:
            return draw_poisson(self.high_rate, duration_s, random)
        cycles = int(duration_s / (self.high_s + self.low_s) * 1.2) + 16
        is_high = bool(random.random() < self.high_s / (self.high_s + self.low_s))
        means_s = (self.high_s, self.low_s) if is_high else (self.low_s, self.high_s)
        rates = (self.high_rate, self.low_rate) if is_high else (self.low_rate, self.high_rate)
        stays_s = np.empty(0)
        while stays_s.sum() < duration_s:
            stays_s = np.concatenate([stays_s, random.exponential(np.tile(means_s, cycles))])
        ends_s = np.minimum(np.cumsum(stays_s), duration_s)
        stays_s = np.diff(ends_s, prepend=0.0)
        count = int(np.searchsorted(ends_s, duration_s)) + 1
        pieces = zip(np.tile(rates, len(stays_s) // 2)[:count].tolist(), stays_s[:count].tolist(), strict=True)
        return draw_pieces(list(pieces), random)


def remembered(slots: float) -> float:
    """What part of a state's influence falls into a slot of so many memory times: from 0 to 1."""
    return 1.0 + math.expm1(-slots) / slots if slots > 1e-6 else slots / 2.0


def _to_ns(times_s: Floats) -> Ints:
    return np.asarray(times_s * _NS_PER_S, np.int64)
