"""All policies under all loads, workload by workload; each cell is kept as soon as it is done."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.optimizer import loads
from benchmarks.optimizer.cells import find_recovery_s, run_cell
from benchmarks.optimizer.overload import list_peers, run_peer
from benchmarks.optimizer.site import Point, Site, SiteFailed
from benchmarks.optimizer.workloads import MAKERS, Workload
from benchmarks.peers.measure import VOID

#: Seeds that the tuner may be worked on with, and the grid is searched with; never those that are reported.
TUNING_SEEDS: Final = (1, 2)
#: What may go wrong in a cell without ending the rest.
FAILURES: Final = (*VOID, SiteFailed, AssertionError, ValueError, KeyError, IndexError, TimeoutError)
#: The policies that are no grid's best point.
POLICIES: Final = ("auto", "none", "fixed", "aimd", "linear")
#: The door's part of a request's time, in ms: only to choose the first rate by.
_DOOR_MS: Final = 0.03
_CAPACITY_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often; ``grid_s`` is the time of a grid's point, 0 leaves the search out."""

    workloads: Sequence[str]
    loads: Sequence[str]
    policies: Sequence[str]
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    ramp_s: float
    seconds: float
    grid_s: float
    caps: Sequence[int]
    delay_parts: Sequence[float]
    overload_s: float
    cache: Path
    server_cpu: int
    load_cpu: int
    day_factor: float = 1.0

    def list_points(self, workload: Workload) -> list[Point]:
        """The grid: caps in requests, waiting in parts of the objective; who does not batch need not wait."""
        caps = sorted({min(cap, workload.max_requests) for cap in self.caps})
        delays = [round(part * workload.objective_us) for part in self.delay_parts]
        return [Point(cap, delay) for cap, delay in itertools.product(caps, delays) if cap > 1 or not delay]

    def length_s(self, load: str) -> float:
        """Of a reported cell; a day may need longer than the others."""
        return self.seconds * (self.day_factor if load == "day" else 1.0)

    def estimate_s(self) -> float:
        """Of everything, roughly: what a cell needs besides its load is 1.5 s."""
        points = len(self.caps) * len(self.delay_parts) - (len(self.delay_parts) - 1) * (1 in self.caps)
        per_load = sum(
            len(self.tuning_seeds) * points * (self.ramp_s / 2 + self.grid_s + 1.5) * (self.grid_s > 0)
            + len(self.seeds) * (len(self.policies) + (self.grid_s > 0)) * (self.ramp_s + self.length_s(load) + 1.5)
            for load in self.loads
        )
        overload = 7 * (self.overload_s + 3.0) if self.overload_s else 0.0
        return len(self.workloads) * (per_load + overload + len(self.caps) * (_CAPACITY_S + 1.5) + 10.0)


class Comparison:
    """Runs a plan into ``result``; ``keep`` is called after each cell, ``tell`` before it."""

    def __init__(
        self, plan: Plan, result: dict[str, Any], keep: Callable[[], None], tell: Callable[[str], None]
    ) -> None:
        self._plan, self._result, self._keep, self._tell = plan, result, keep, tell

    def run(self) -> None:
        """Everything; what fails is among the result's errors."""
        for name in self._plan.workloads:
            with self._attempt(name) as attempt, tempfile.TemporaryDirectory(prefix="bench-") as folder:
                self._tell(f"{name}: making the model")
                workload = MAKERS[name](self._plan.cache / "optimizer-models")
                self._run_workload(workload, Path(folder))
            if attempt.has_failed:
                continue

    def _run_workload(self, workload: Workload, folder: Path) -> None:
        plan, name = self._plan, workload.name
        curve = workload.measure_curve()
        about = self._result["workloads"][name] = {
            "objective_us": workload.objective_us,
            "request_rows": workload.request_rows,
            "curve_ms": {str(count): value for count, value in curve.items()},
            "gain": max(curve[1] * count / value for count, value in curve.items()),
            "best": {},
        }
        with Site(workload, folder, plan.server_cpu, plan.load_cpu) as site:
            about["has_priority"] = site.has_priority
            with self._attempt(f"{name}: capacity") as attempt:
                about["capacity"] = self._find_capacity(site, curve)
            if attempt.has_failed:
                return
            for load in plan.loads:
                self._run_load(site, load, about)
            if plan.overload_s:
                self._overload(site, about["capacity"])
        if plan.overload_s:
            for peer in list_peers(
                workload, folder / "peers", plan.cache, plan.server_cpu, self._result["skipped"].append
            ):
                with self._attempt(f"{name}, overload, {peer.title}"):
                    self._tell(f"{name}, overload: {peer.title}")
                    for factor in (1.0, 2.0):
                        times_ns = loads.draw_steady(factor * about["capacity"], plan.overload_s, plan.seeds[0])
                        row = run_peer(peer, workload, times_ns, folder, plan.load_cpu)
                        self._add("overload", row, workload=name, load=f"{factor:g}x", seed=plan.seeds[0])

    def _find_capacity(self, site: Site, curve: dict[int, float]) -> float:
        """Requests/s of the best cap when there are always more."""
        rate = 1.4 * max(count / (value + count * _DOOR_MS) for count, value in curve.items()) * 1000
        found = []
        for cap in sorted({min(cap, site.workload.max_requests) for cap in self._plan.caps}):
            self._tell(f"{site.workload.name}: capacity with {cap} in a batch")
            times_ns = loads.draw_steady(rate, _CAPACITY_S, TUNING_SEEDS[0])
            done = site.drive(Point(cap), times_ns)
            first_ns = int(done.due_ns[0]) + round(0.25 * _CAPACITY_S * 1e9)
            is_counted = (done.code == 0) & (done.answered_ns >= first_ns) & (done.answered_ns < done.sent_ns[-1])
            found.append(float(is_counted.sum()) / ((int(done.sent_ns[-1]) - first_ns) / 1e9))
        return max(found)

    def _run_load(self, site: Site, load: str, about: dict[str, Any]) -> None:
        plan, name, capacity = self._plan, site.workload.name, about["capacity"]
        best = self._search(site, load, capacity) if plan.grid_s else None
        if best is not None:
            about["best"][load] = {"max_requests": best.max_requests, "delay_us": best.delay_us}
        for seed in plan.seeds:
            entrants = list(_list_entrants(plan.policies, site.workload, best))
            random.Random(seed).shuffle(entrants)
            times_ns = loads.draw(load, capacity, plan.ramp_s, plan.length_s(load), seed)
            for entrant, policy in entrants:
                with self._attempt(f"{name}, {load}, {entrant}, seed {seed}"):
                    self._tell(f"{name}, {load}: {entrant}")
                    row = run_cell(site, policy, times_ns, plan.ramp_s, plan.length_s(load))
                    if load == "step":
                        row["recovery_s"] = find_recovery_s(row, plan.seconds / 2)
                    self._add("cells", row, workload=name, load=load, entrant=entrant, seed=seed)

    def _search(self, site: Site, load: str, capacity: float) -> Point | None:
        """The point of the grid with the most goodput, on the tuning seeds."""
        plan, name = self._plan, site.workload.name
        good: dict[Point, list[float]] = {}
        for seed, point in itertools.product(plan.tuning_seeds, plan.list_points(site.workload)):
            with self._attempt(f"{name}, {load}, grid {point}, seed {seed}"):
                self._tell(f"{name}, {load}: grid, {point}")
                times_ns = loads.draw(load, capacity, plan.ramp_s / 2, plan.grid_s, seed)
                row = run_cell(site, point, times_ns, plan.ramp_s / 2, plan.grid_s)
                good.setdefault(point, []).append(row["goodput"])
                self._add("grid", row, workload=name, load=load, seed=seed)
        if not good:
            return None
        # of two that do the same, the simpler
        return max(good, key=lambda point: (round(float(np.mean(good[point])), 1), -point.delay_us, point.max_requests))

    def _overload(self, site: Site, capacity: float) -> None:
        plan, name, seed = self._plan, site.workload.name, self._plan.seeds[0]
        for factor, (entrant, policy) in itertools.product(
            (1.0, 2.0), [("auto", "auto"), ("fixed", Point(site.workload.max_requests))]
        ):
            with self._attempt(f"{name}, overload {factor:g}x, {entrant}"):
                self._tell(f"{name}, overload {factor:g}x: {entrant}")
                ramp_s = plan.ramp_s / 2
                times_ns = loads.draw_steady(factor * capacity, plan.overload_s + ramp_s, seed)
                row = run_cell(site, policy, times_ns, ramp_s, plan.overload_s)
                self._add("overload", row, workload=name, load=f"{factor:g}x", entrant=entrant, seed=seed)

    def _add(self, kind: str, row: dict[str, Any], **which: Any) -> None:
        self._result[kind].append({**which, **row})
        self._keep()

    def _attempt(self, what: str) -> Attempt:
        return Attempt(what, self._result["errors"])


class Attempt:
    """A block whose failure is told in a list and goes no further."""

    def __init__(self, what: str, errors: list[str]) -> None:
        self._what, self._errors = what, errors
        self.has_failed = False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, FAILURES):
            self.has_failed = True
            self._errors.append(f"{self._what}: {type(error).__name__}: {str(error)[-500:]}")
        return self.has_failed


def _list_entrants(
    policies: Sequence[str], workload: Workload, best: Point | None
) -> Iterator[tuple[str, str | Point]]:
    fixed = {"none": Point(1), "fixed": Point(workload.max_requests)}
    for policy in policies:
        yield policy, fixed.get(policy, policy)
    if best is not None:
        yield "best", best
