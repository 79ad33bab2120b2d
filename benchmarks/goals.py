"""What the comparison should show, as a table, and what it did show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.optimizer_figures import (
    find_changing_mean,
    find_cost,
    find_decisions,
    find_grace,
    find_lead,
    find_least_of_best,
    find_least_of_rules,
    find_missed_windows,
    find_near_percent,
    find_recovery_s,
)
from benchmarks.rollout_figures import (
    count_misjudged,
    count_unfit,
    find_access_percent,
    find_p99_ratio,
    find_share_error,
)

OURS = "aiorch"
PER_CORE = "req_per_s_per_core"


@dataclass(frozen=True, slots=True)
class Figures:
    """The stored results, to be asked for single figures; what was not measured is None."""

    peers: Mapping[str, Any]
    memory: Mapping[str, Any] | None = None
    rollout: Mapping[str, Any] | None = None
    optimizer: Mapping[str, Any] | None = None

    def row(self, contest: str, shape: str, server: str) -> Mapping[str, Any] | None:
        for row in self.peers["rows"]:
            if (row["contest"], f"{row['connections']}x{row['streams']}", row["server"]) == (contest, shape, server):
                found: Mapping[str, Any] = row
                return found
        return None

    def find(self, contest: str, shape: str, server: str, key: str) -> float | None:
        row = self.row(contest, shape, server)
        return None if row is None else float(row[key])

    def best(self, contest: str, shape: str, key: str) -> float | None:
        """The highest figure of any peer."""
        others = {row["server"] for row in self.peers["rows"] if row["contest"] == contest} - {OURS}
        found = [self.find(contest, shape, server, key) for server in others]
        return max((value for value in found if value is not None), default=None)

    def start(self, contest: str, key: str) -> float | None:
        for start in self.peers["starts"]:
            if (start["contest"], start["server"]) == (contest, OURS):
                return float(start[key])
        return None

    def served_of_ceiling(self, contest: str) -> float | None:
        """Our best requests/s divided by the best rows/s of the runtime alone."""
        served = [row["req_per_s"] for row in self.peers["rows"] if (row["contest"], row["server"]) == (contest, OURS)]
        alone = [entry["rows_per_s"] for entry in self.peers["ceilings"] if entry["contest"] == contest]
        return max(served) / max(alone) if served and alone else None

    def growth_percent(self) -> float | None:
        return None if self.memory is None else float(self.memory["growth_percent"])


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure with its bound; exactly one of ``at_least`` and ``at_most`` is set."""

    what: str
    measure: Callable[[Figures], float | None]
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"

    def cells(self, figures: Figures) -> list[str]:
        """What, asked, reached, and whether that is enough."""
        asked = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        reached = self.measure(figures)
        if reached is None:
            return [self.what, f"{asked} {self.unit}", "not measured", "-"]
        is_met = reached >= self.at_least if self.at_least is not None else reached <= (self.at_most or 0)
        shown = f"{reached:,.1f}" if abs(reached) >= 10 else f"{reached:.2f}"
        return [self.what, f"{asked} {self.unit}", f"{shown} {self.unit}", "yes" if is_met else "**no**"]


def against(peer: str, contest: str, shape: str, key: str = PER_CORE) -> Callable[[Figures], float | None]:
    """Our figure divided by a peer's."""
    return lambda figures: divide(figures.find(contest, shape, OURS, key), figures.find(contest, shape, peer, key))


def against_best(contest: str, shape: str, key: str) -> Callable[[Figures], float | None]:
    """Our figure divided by the best peer's."""
    return lambda figures: divide(figures.find(contest, shape, OURS, key), figures.best(contest, shape, key))


def divide(upper: float | None, lower: float | None, factor: float = 1.0) -> float | None:
    """A ratio, or None where a side is missing."""
    return None if upper is None or not lower else upper / lower * factor


#: Of the comparison of batching policies, which shows them in the terminal, too.
OPTIMIZER_GOALS = (
    Goal(
        "goodput of the tuner against the best fixed point, where it is least",
        lambda figures: find_least_of_best(figures.optimizer),
        at_least=0.95,
    ),
    Goal("the same in the mean over changing loads", lambda figures: find_changing_mean(figures.optimizer), at_least=1),
    Goal("good answers against the best of four rules, mean", lambda figures: find_lead(figures.optimizer), at_least=1),
    Goal(
        "goodput against the best of them, where it is least",
        lambda figures: find_least_of_rules(figures.optimizer),
        at_least=0.97,
    ),
    Goal(
        "a step from 30 to 90 %, until the objective holds again",
        lambda figures: find_recovery_s(figures.optimizer),
        at_most=10,
        unit="s",
    ),
    Goal("goodput at twice the capacity, against once", lambda figures: find_grace(figures.optimizer), at_least=0.9),
    Goal("moves a minute under a steady load", lambda figures: find_decisions(figures.optimizer), at_most=2, unit=""),
    Goal(
        "windows in a row that miss the objective after a move",
        lambda figures: find_missed_windows(figures.optimizer),
        at_most=1,
        unit="",
    ),
    Goal(
        "p99 foretold within 15 %, cells",
        lambda figures: find_near_percent(figures.optimizer),
        at_least=90,
        unit="%",
    ),
    Goal("the tuner itself, of a core", lambda figures: find_cost(figures.optimizer), at_most=1, unit="%"),
)

GOALS = (
    Goal("identity 1x1, req/s, against Triton", against("triton", "identity", "1x1", "req_per_s"), at_least=1),
    Goal("identity 32x1, req/s per core, against Triton", against("triton", "identity", "32x1"), at_least=4),
    Goal("identity 8x8, req/s per core, against Triton", against("triton", "identity", "8x8"), at_least=8),
    Goal("identity 32x32, req/s per core, against Triton", against("triton", "identity", "32x32"), at_least=10),
    Goal("identity 32x1, req/s per core, against grpc.aio", against("grpc_aio", "identity", "32x1"), at_least=20),
    Goal("mlp 32x1, req/s, against the best peer", against_best("mlp", "32x1", "req_per_s"), at_least=3),
    Goal("mlp 8x16, req/s, against the best peer", against_best("mlp", "8x16", "req_per_s"), at_least=5),
    Goal("mlp 1x1, p50, against Triton", against("triton", "mlp", "1x1", "p50_us"), at_most=1),
    Goal(
        "minilm, served / onnxruntime alone at its best batch",
        lambda figures: figures.served_of_ceiling("minilm"),
        at_least=0.95,
    ),
    Goal("image 32x1, MB/s per core, against Triton", against("triton", "image", "32x1"), at_least=1.3),
    Goal(
        "start to first answer, one ONNX model", lambda figures: figures.start("mlp", "ready_s"), at_most=1.5, unit="s"
    ),
    Goal("idle memory (RSS), one ONNX model", lambda figures: figures.start("mlp", "rss_mb"), at_most=100, unit="MB"),
    Goal(
        "identity 8x1 beside a busy thread, p99",
        lambda figures: divide(figures.find("identity-busy", "8x1", OURS, "p99_us"), 1000),
        at_most=3,
        unit="ms",
    ),
    Goal(
        "the same, against the asyncio driver",
        against("aiorch_asyncio", "identity-busy", "8x1", "p99_us"),
        at_most=0.25,
    ),
    Goal(
        "the same, against the asyncio driver at Python's own switch interval",
        against("aiorch_asyncio_5ms", "identity-busy", "8x1", "p99_us"),
        at_most=0.25,
    ),
    Goal(
        "memory after 5 million requests, against 100,000",
        lambda figures: figures.growth_percent(),
        at_most=5,
        unit="%",
    ),
    Goal(
        "100 version swaps, requests without the right answer",
        lambda figures: count_unfit(figures.rollout),
        at_most=0,
        unit="",
    ),
    Goal("p99 during a swap, against between swaps", lambda figures: find_p99_ratio(figures.rollout), at_most=1.5),
    Goal(
        "the same, with `--scheduling realtime`",
        lambda figures: find_p99_ratio(figures.rollout, "swaps-realtime"),
        at_most=1.5,
    ),
    Goal(
        "share of a 10 % canary, off by",
        lambda figures: find_share_error(figures.rollout),
        at_most=1,
        unit="%",
    ),
    Goal(
        "good and bad canaries that came to a wrong end",
        lambda figures: count_misjudged(figures.rollout),
        at_most=0,
        unit="",
    ),
    Goal(
        "authorization by a token, CPU per request",
        lambda figures: find_access_percent(figures.rollout, "token", "indexed", "nothing"),
        at_most=5,
        unit="%",
    ),
    Goal(
        "the same, sent whole each time (h2load), against the same sent to a server that does not ask",
        lambda figures: find_access_percent(figures.rollout, "token", "h2load", "token"),
        at_most=5,
        unit="%",
    ),
    *OPTIMIZER_GOALS,
)
