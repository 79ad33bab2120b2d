"""What came back: raw times of every request, and the figures made from them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

#: Stands beside gRPC's status codes for an OK answer that ``LoadPlan.check`` called wrong.
WRONG_ANSWER = 100
#: No answer came: the connection broke, or there was none.
LOST = 101
PERCENTILES = (50.0, 90.0, 99.0, 99.9)

_CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode} | {WRONG_ANSWER: "WRONG_ANSWER", LOST: "LOST"}
_NS_PER_US = 1_000
_NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All requests of a run, in the order in which they were due; times are nanoseconds since the run's start.

    ``scheduled_ns``, ``sent_ns``, ``answered_ns``: int64 ``[n]``; ``codes``: int16 ``[n]``, gRPC's status,
    WRONG_ANSWER or LOST. In a closed loop a request is due when its caller is free. The measured window is
    ``[window_start_ns, window_end_ns)``; what comes before it is warm-up. ``is_target_gone``: the run ended early,
    because no connection came back.
    """

    plan: dict[str, Any]
    scheduled_ns: npt.NDArray[np.int64]
    sent_ns: npt.NDArray[np.int64]
    answered_ns: npt.NDArray[np.int64]
    codes: npt.NDArray[np.int16]
    window_start_ns: int
    window_end_ns: int
    is_cut_short: bool = False
    is_target_gone: bool = False
    is_measured: npt.NDArray[np.bool_] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        due = self.scheduled_ns
        object.__setattr__(self, "is_measured", (due >= self.window_start_ns) & (due < self.window_end_ns))

    @property
    def window_s(self) -> float:
        """Length of the measured window in seconds."""
        return (self.window_end_ns - self.window_start_ns) / _NS_PER_S

    @property
    def requests(self) -> int:
        """Requests that were due in the window."""
        return int(self.is_measured.sum())

    @property
    def req_per_s(self) -> float:
        """OK answers that arrived within the window, whenever they were due, per second."""
        in_window = (self.answered_ns >= self.window_start_ns) & (self.answered_ns < self.window_end_ns)
        return float((in_window & (self.codes == 0)).sum()) / self.window_s

    @property
    def offered_per_s(self) -> float:
        """Requests due in the window, per second."""
        return self.requests / self.window_s

    @property
    def errors(self) -> dict[str, int]:
        """Requests of the window that did not end OK, counted by the code's name."""
        values, counts = np.unique(self.codes[self.is_measured], return_counts=True)
        return {
            _CODE_NAMES.get(int(value), str(value)): int(count)
            for value, count in zip(values, counts, strict=True)
            if value
        }

    @property
    def lost(self) -> int:
        """Requests of the whole run, warm-up included, that got no answer because the connection broke."""
        return int((self.codes == LOST).sum())

    def latencies_us(self) -> npt.NDArray[np.float64]:
        """From due to answered, of the window's OK requests, float64 ``[ok]`` microseconds."""
        chosen = self.is_measured & (self.codes == 0)
        return _to_us(self.answered_ns[chosen] - self.scheduled_ns[chosen])

    def lags_us(self) -> npt.NDArray[np.float64]:
        """From due to sent, of the window's requests: how late the generator itself was, float64 ``[requests]``."""
        return _to_us(self.sent_ns[self.is_measured] - self.scheduled_ns[self.is_measured])

    def percentile_us(self, percent: float) -> float:
        """The latency below which ``percent`` % of the window's OK answers lie; NaN when there are none."""
        latencies = self.latencies_us()
        return float(np.percentile(latencies, percent)) if latencies.size else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON-ready values (None where there is nothing to measure)."""
        return {
            "plan": self.plan,
            "requests": self.requests,
            "ok": int((self.is_measured & (self.codes == 0)).sum()),
            "errors": self.errors,
            "req_per_s": self.req_per_s,
            "offered_per_s": self.offered_per_s,
            "window_s": self.window_s,
            "is_cut_short": self.is_cut_short,
            "is_target_gone": self.is_target_gone,
            "lost": self.lost,
            "latency_us": _summarise(self.latencies_us()),
            "send_lag_us": _summarise(self.lags_us()),
        }

    def save(self, path: str | Path) -> None:
        """Writes raw times and the plan to a compressed ``.npz`` file, replacing one that is there."""
        with Path(path).open("wb") as file:
            np.savez_compressed(
                file,
                scheduled_ns=self.scheduled_ns,
                sent_ns=self.sent_ns,
                answered_ns=self.answered_ns,
                codes=self.codes,
                window_ns=np.array([self.window_start_ns, self.window_end_ns], dtype=np.int64),
                is_cut_short=np.array(self.is_cut_short),
                is_target_gone=np.array(self.is_target_gone),
                plan=np.array(json.dumps(self.plan)),
            )

    @classmethod
    def load(cls, path: str | Path) -> LoadResult:
        """Reads what ``save`` wrote; OSError, KeyError or ValueError when it is not such a file."""
        with np.load(path, allow_pickle=False) as stored:
            start_ns, end_ns = (int(value) for value in stored["window_ns"])
            return cls(
                plan=json.loads(str(stored["plan"])),
                scheduled_ns=stored["scheduled_ns"],
                sent_ns=stored["sent_ns"],
                answered_ns=stored["answered_ns"],
                codes=stored["codes"],
                window_start_ns=start_ns,
                window_end_ns=end_ns,
                is_cut_short=bool(stored["is_cut_short"]),
                is_target_gone="is_target_gone" in stored and bool(stored["is_target_gone"]),
            )


def _to_us(times_ns: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    times_us: npt.NDArray[np.float64] = times_ns / _NS_PER_US
    return times_us


def _summarise(values: npt.NDArray[np.float64]) -> dict[str, float | None]:
    keys = [f"p{percent:g}" for percent in PERCENTILES]
    if not values.size:
        return dict.fromkeys([*keys, "mean", "max"])
    marks = np.percentile(values, PERCENTILES)
    named: dict[str, float | None] = {key: float(mark) for key, mark in zip(keys, marks, strict=True)}
    return named | {"mean": float(values.mean()), "max": float(values.max())}
