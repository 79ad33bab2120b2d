"""What was measured of a rollout's versions in its present step: windows of counters that add up over servers; pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiorch_server.registry.records import Rollout, VersionReport

#: Answers that did not agree are told of at most so many, so long.
MOST_DISAGREEMENTS = 8
LONGEST_DISAGREEMENT = 300


@dataclass(frozen=True, slots=True)
class Window:
    """Counts of one version over some time. ``latencies`` maps a duration in nanoseconds to how many answers took at
    most that long (and longer than the next smaller key says); ``requests`` are those and the ``errors`` of the model.

    ``lost`` are those that were never answered: taken back by their callers, over their deadlines, or refused for want
    of room. ``stuck_s``: for so long nothing has come back although requests are under way. ``slowest_s`` is what the
    slowest answer took since the version was loaded.
    """

    requests: int = 0
    errors: int = 0
    latencies: Mapping[int, int] = field(default_factory=dict)
    compared: int = 0
    agreed: int = 0
    lost: int = 0
    stuck_s: int = 0
    slowest_s: float = 0.0

    def __add__(self, other: Window) -> Window:
        latencies = dict(self.latencies)
        for upper_ns, count in other.latencies.items():
            latencies[upper_ns] = latencies.get(upper_ns, 0) + count
        return Window(
            self.requests + other.requests,
            self.errors + other.errors,
            latencies,
            self.compared + other.compared,
            self.agreed + other.agreed,
            self.lost + other.lost,
            max(self.stuck_s, other.stuck_s),
            max(self.slowest_s, other.slowest_s),
        )

    def since(self, earlier: Window) -> Window:
        """What was counted after ``earlier``, a reading of the same counters."""
        rest = {upper: count - earlier.latencies.get(upper, 0) for upper, count in self.latencies.items()}
        return Window(
            self.requests - earlier.requests,
            self.errors - earlier.errors,
            {upper: count for upper, count in rest.items() if count > 0},
            self.compared - earlier.compared,
            self.agreed - earlier.agreed,
            self.lost - earlier.lost,
            self.stuck_s,
            self.slowest_s,
        )

    @property
    def answers(self) -> int:
        """Requests whose duration is known."""
        return sum(self.latencies.values())

    def quantile_ns(self, q: float) -> int:
        """The duration that at least ``q`` of the answers did not exceed, to a bucket's width; 0 without any."""
        wanted, seen = math.ceil(q * self.answers), 0
        for upper_ns in sorted(self.latencies):
            seen += self.latencies[upper_ns]
            if seen >= max(wanted, 1):
                return upper_ns
        return 0

    def count_slower(self, bound_ns: float) -> int:
        """Answers that took longer than ``bound_ns``."""
        return sum(count for upper_ns, count in self.latencies.items() if upper_ns > bound_ns)

    def report(self, version: int) -> VersionReport:
        """As it is told to people."""
        return VersionReport(
            version,
            requests=self.requests,
            errors=self.errors,
            p50_ms=self.quantile_ns(0.5) / 1e6,
            p99_ms=self.quantile_ns(0.99) / 1e6,
            compared=self.compared,
            agreed=self.agreed,
        )


def name_step(rollout: Rollout) -> str:
    """What tells a step of a rollout from all others: each has its own windows, and so has one that is resumed."""
    began = "" if rollout.step_began_at is None else rollout.step_began_at.isoformat()
    return f"{rollout.id}/{rollout.step}/{began}"


@dataclass(frozen=True, slots=True)
class StepSamples:
    """The windows of one step, by version, and some answers that did not agree in words."""

    step: str
    windows: Mapping[int, Window] = field(default_factory=dict)
    disagreements: tuple[str, ...] = ()

    def to_json(self) -> str:
        """For ServerStatus.samples."""
        return json.dumps(
            {
                "step": self.step,
                "windows": {
                    str(version): {
                        "requests": window.requests,
                        "errors": window.errors,
                        "latencies": {str(upper): count for upper, count in window.latencies.items()},
                        "compared": window.compared,
                        "agreed": window.agreed,
                        "lost": window.lost,
                        "stuck_s": window.stuck_s,
                        "slowest_s": window.slowest_s,
                    }
                    for version, window in self.windows.items()
                },
                "disagreements": list(self.disagreements),
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> StepSamples | None:
        """What ``to_json`` wrote; None for anything else, such as what another release of this server wrote."""
        try:
            return cls._parse(json.loads(text)) if text else None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    @classmethod
    def _parse(cls, found: Any) -> StepSamples:
        windows = {
            int(version): Window(
                int(each["requests"]),
                int(each["errors"]),
                {int(upper): int(count) for upper, count in each["latencies"].items()},
                int(each["compared"]),
                int(each["agreed"]),
                # what servers of the release before do not tell
                int(each.get("lost", 0)),
                int(each.get("stuck_s", 0)),
                float(each.get("slowest_s", 0.0)),
            )
            for version, each in found["windows"].items()
        }
        return cls(str(found["step"]), windows, tuple(map(str, found["disagreements"]))[:MOST_DISAGREEMENTS])


def merge(step: str, texts: Iterable[str]) -> StepSamples:
    """The samples of all servers that speak of ``step``, added up; what speaks of another one is left out."""
    windows: dict[int, Window] = {}
    disagreements: list[str] = []
    for text in texts:
        found = StepSamples.from_json(text)
        if found is None or found.step != step:
            continue
        for version, window in found.windows.items():
            windows[version] = windows.get(version, Window()) + window
        disagreements += found.disagreements
    return StepSamples(step, windows, tuple(disagreements[:MOST_DISAGREEMENTS]))
