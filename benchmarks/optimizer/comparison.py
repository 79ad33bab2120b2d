"""All policies under all loads, workload by workload; each cell is kept as soon as it is done."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.optimizer import loads
from benchmarks.optimizer.cells import count_missed_windows, find_recovery_s, run_cell
from benchmarks.optimizer.overload import find_triton, start_triton
from benchmarks.optimizer.site import Point, Site
from benchmarks.optimizer.workloads import MAKERS, Workload

#: Seeds that the tuner may be worked on with, and the grid is searched with; never those that are reported.
TUNING_SEEDS: Final = (1, 2)
#: The policies that are no grid's best point.
POLICIES: Final = ("auto", "none", "fixed", "aimd", "linear")
#: Parts of the capacity.
OVERLOADS: Final = (1.0, 2.0)
#: The door's part of a request's time, in ms: only to choose the first rate by.
_DOOR_MS: Final = 0.03
_CAPACITY_S: Final = 1.5
_ATTEMPTS: Final = 4
#: What a cell takes beside its load, and what a server needs to start.
_BESIDE_S: Final = 1.0
_START_S: Final = 6.0


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
    steady_s: float
    overload_s: float
    peers: Sequence[str]
    cache: Path
    server_cpu: int
    load_cpu: int
    long_factor: float = 1.0

    def list_points(self, workload: Workload) -> list[Point]:
        """The grid: caps in requests, waiting in parts of the objective; who does not batch need not wait."""
        caps = sorted({min(cap, workload.max_requests) for cap in self.caps})
        delays = [round(part * workload.objective_us) for part in self.delay_parts]
        return [Point(cap, delay) for cap, delay in itertools.product(caps, delays) if cap > 1 or not delay]

    def length_s(self, load: str) -> float:
        """Of a reported cell; a day and a step need longer than the others."""
        return self.seconds * (self.long_factor if load in ("day", "step") else 1.0)

    def estimate_s(self) -> float:
        """Of everything, roughly."""
        points = len(self.caps) * len(self.delay_parts) - (len(self.delay_parts) - 1) * (1 in self.caps)
        seconds = len(self.caps) * (_CAPACITY_S + _BESIDE_S) + _START_S
        for load in self.loads:
            cell_s = self.ramp_s + self.length_s(load) + _BESIDE_S
            if self.grid_s:
                grid_s = self.ramp_s / 4 + self.grid_s + _BESIDE_S
                seconds += len(self.tuning_seeds) * points * grid_s + len(self.seeds) * cell_s
            else:
                seconds += len(self.seeds) * max(0, points - 2) * cell_s
            seconds += len(self.seeds) * len(self.policies) * cell_s
        if self.steady_s:
            seconds += self.ramp_s + self.steady_s + _BESIDE_S
        if self.overload_s:
            seconds += (4 + 2 * len(self.peers)) * (self.ramp_s / 2 + self.overload_s + _BESIDE_S) + len(
                self.peers
            ) * _START_S
        return len(self.workloads) * seconds


class Comparison:
    """Runs a plan into ``result``; ``keep`` is called after each cell, ``tell`` before it."""

    def __init__(
        self, plan: Plan, result: dict[str, Any], keep: Callable[[], None], tell: Callable[[str], None]
    ) -> None:
        self._plan, self._result, self._keep, self._tell = plan, result, keep, tell

    def run(self) -> None:
        """Everything; what fails is among the result's errors."""
        for name in self._plan.workloads:
            with self._attempt(name), tempfile.TemporaryDirectory(prefix="bench-") as folder:
                self._tell(f"{name}: making the model")
                workload = MAKERS[name](self._plan.cache / "optimizer-models")
                self._run_workload(workload, Path(folder))

    def _run_workload(self, workload: Workload, folder: Path) -> None:
        plan, name = self._plan, workload.name
        self._tell(f"{name}: run times")
        curve = workload.measure_curve()
        about = self._result["workloads"][name] = {
            "objective_us": workload.objective_us,
            "request_rows": workload.request_rows,
            "curve_ms": {str(count): value for count, value in curve.items()},
            "gain": curve[1] * (most := max(curve)) / curve[most],
            "points": {"none": str(Point(1)), "fixed": str(Point(workload.max_requests)), "best": {}},
        }
        with Site(workload, folder, plan.server_cpu, plan.load_cpu) as site:
            about["has_priority"] = site.has_priority
            with self._attempt(f"{name}: capacity") as attempt:
                about["capacity"] = self._find_capacity(site, curve)
            if attempt.has_failed:
                return
            for load in plan.loads:
                self._run_load(site, load, about)
            if plan.steady_s and "auto" in plan.policies:
                self._watch(site, about["capacity"])
            if plan.overload_s:
                self._overload(site, about["capacity"])
        if plan.overload_s:
            self._overload_peers(workload, about["capacity"], folder)

    def _find_capacity(self, site: Site, curve: dict[int, float]) -> float:
        """Requests/s of the best cap when there are always more."""
        rate = 1.4 * max(count / (value + count * _DOOR_MS) for count, value in curve.items()) * 1000
        found = 0.0
        for _ in range(_ATTEMPTS):
            caps = sorted({min(cap, site.workload.max_requests) for cap in self._plan.caps})
            found = max(self._measure_capacity(site, cap, rate) for cap in caps)
            if found < 0.9 * rate:
                break
            rate *= 1.5  # there were not always more
        return found

    def _measure_capacity(self, site: Site, cap: int, rate: float) -> float:
        self._tell(f"{site.workload.name}: capacity with {cap} in a batch")
        out = site.drive(Point(cap), loads.draw_steady(rate, _CAPACITY_S, TUNING_SEEDS[0])).out
        first_ns, last_ns = int(out["due_ns"][0]) + round(0.25 * _CAPACITY_S * 1e9), int(out["sent_ns"][-1])
        is_counted = (out["code"] == 0) & (out["answered_ns"] >= first_ns) & (out["answered_ns"] < last_ns)
        return float(is_counted.sum()) / ((last_ns - first_ns) / 1e9)

    def _run_load(self, site: Site, load: str, about: dict[str, Any]) -> None:
        plan, name, capacity, length_s = self._plan, site.workload.name, about["capacity"], self._plan.length_s(load)
        points = {"none": Point(1), "fixed": Point(site.workload.max_requests)}
        entrants: list[str | Point] = [points.get(policy, policy) for policy in plan.policies]
        best = self._search(site, load, capacity) if plan.grid_s else None
        others = plan.list_points(site.workload) if best is None else [best]
        entrants += [point for point in others if point not in entrants]
        good: dict[Point, list[float]] = {}
        for seed in plan.seeds:
            random.Random(seed).shuffle(entrants)
            times_ns = loads.draw(load, capacity, plan.ramp_s, length_s, seed)
            for entrant in entrants:
                with self._attempt(f"{name}, {load}, {entrant}, seed {seed}"):
                    self._tell(f"{name}, {load}: {entrant}")
                    row = run_cell(site, entrant, times_ns, plan.ramp_s, length_s)
                    if load == "step":
                        row["recovery_s"] = find_recovery_s(row, length_s / 2)
                    self._add("cells", row, workload=name, load=load, entrant=str(entrant), seed=seed)
                    if isinstance(entrant, Point):
                        good.setdefault(entrant, []).append(row["goodput"])
        if best is None and good:
            best = _choose_point(good)
        if best is not None:
            about["points"]["best"][load] = str(best)

    def _search(self, site: Site, load: str, capacity: float) -> Point | None:
        """The point of the grid with the most goodput, on the tuning seeds."""
        plan, name = self._plan, site.workload.name
        good: dict[Point, list[float]] = {}
        for seed, point in itertools.product(plan.tuning_seeds, plan.list_points(site.workload)):
            with self._attempt(f"{name}, {load}, grid {point}, seed {seed}"):
                self._tell(f"{name}, {load}: grid, {point}")
                times_ns = loads.draw(load, capacity, plan.ramp_s / 4, plan.grid_s, seed)
                row = run_cell(site, point, times_ns, plan.ramp_s / 4, plan.grid_s)
                good.setdefault(point, []).append(row["goodput"])
                self._add("grid", row, workload=name, load=load, entrant=str(point), seed=seed)
        return _choose_point(good) if good else None

    def _watch(self, site: Site, capacity: float) -> None:
        """A load that stays as it is, for longer: what does the tuner still do, and what does it cost?"""
        plan, name = self._plan, site.workload.name
        with self._attempt(f"{name}, steady"):
            self._tell(f"{name}, steady: auto")
            times_ns = loads.draw("poisson", capacity, plan.ramp_s, plan.steady_s, plan.seeds[0])
            row = run_cell(site, "auto", times_ns, plan.ramp_s, plan.steady_s)
            row["missed_windows"] = count_missed_windows(row)
            self._add("steady", row, workload=name, load="poisson", entrant="auto", seed=plan.seeds[0])

    def _overload(self, site: Site, capacity: float) -> None:
        plan, name, ramp_s = self._plan, site.workload.name, self._plan.ramp_s / 2
        for factor, policy in itertools.product(OVERLOADS, ("auto", Point(site.workload.max_requests))):
            with self._attempt(f"{name}, overload {factor:g}x, {policy}"):
                self._tell(f"{name}, {factor:g}x capacity: {policy}")
                times_ns = loads.draw_steady(factor * capacity, plan.overload_s + ramp_s, plan.seeds[0])
                row = run_cell(site, policy, times_ns, ramp_s, plan.overload_s)
                entrant = "auto" if policy == "auto" else "fixed"
                self._add("overload", row, workload=name, factor=factor, entrant=entrant, seed=plan.seeds[0])

    def _overload_peers(self, workload: Workload, capacity: float, folder: Path) -> None:
        plan, name, ramp_s = self._plan, workload.name, self._plan.ramp_s / 2
        if reason := find_triton(plan.cache):
            self._result["skipped"].append(f"{name}, overload: {reason}")
            return
        for entrant in plan.peers:
            with self._attempt(f"{name}, overload, {entrant}"):
                self._tell(f"{name}, overload: starting {entrant}")
                cpus = plan.server_cpu, plan.load_cpu
                with start_triton(entrant, workload, capacity, folder / entrant, plan.cache, cpus) as peer:
                    for factor in OVERLOADS:
                        self._tell(f"{name}, {factor:g}x capacity: {entrant}")
                        times_ns = loads.draw_steady(factor * capacity, plan.overload_s + ramp_s, plan.seeds[0])
                        row = peer.run(workload, times_ns, ramp_s, plan.overload_s, folder, plan.load_cpu)
                        self._add("overload", row, workload=name, factor=factor, entrant=entrant, seed=plan.seeds[0])

    def _add(self, kind: str, row: dict[str, Any], **which: Any) -> None:
        self._result[kind].append({**which, **row})
        self._keep()

    def _attempt(self, what: str) -> Attempt:
        return Attempt(what, self._result["errors"])


class Attempt:
    """A block of which any failure is told in a list and goes no further: hours of other cells are worth more."""

    def __init__(self, what: str, errors: list[str]) -> None:
        self._what, self._errors = what, errors
        self.has_failed = False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self.has_failed = True
            self._errors.append(f"{self._what}: {type(error).__name__}: {str(error)[-500:]}")
        return self.has_failed


def _choose_point(good: dict[Point, list[float]]) -> Point:
    """The one with the most goodput; of several that do the same, the one that waits least."""
    return max(good, key=lambda point: (round(float(np.mean(good[point])), 1), -point.delay_us, point.max_requests))
