"""One load under one policy, and what is kept of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from aiorch_server._core import simulate
from aiorch_server.optimizer.predict import Surroundings
from aiorch_server.optimizer.service_time import ServiceTime
from benchmarks.optimizer.site import Drive, Point, Site
from benchmarks.optimizer.workloads import Workload

SEGMENT_S: Final = 0.5
#: What may be late or refused.
ALLOWED: Final = 0.01
#: The caller is no part of the figure as long as its own lateness stays below this part of the objective.
LAG_PART: Final = 0.1
#: gRPC's status of what is refused.
UNAVAILABLE: Final = 14
_REPETITIONS: Final = 9
_HALF_LIFE_S: Final = 60.0


def run_cell(
    site: Site, policy: str | Point, times_ns: npt.NDArray[np.int64], ramp_s: float, seconds: float
) -> dict[str, Any]:
    """Drives the load, and says what came of what was due after the ramp."""
    done = site.drive(policy, times_ns)
    row = judge(done.out, times_ns, site.workload.objective_us, ramp_s, seconds)
    executions = sum(run.executions for run in done.window.runs)
    row["requests_per_batch"] = done.window.answered / executions if executions else 0.0
    row["busy"] = done.window.busy
    row["policy"] = policy if isinstance(policy, str) else "static"
    if isinstance(policy, Point):
        row["point"] = {"max_requests": policy.max_requests, "delay_us": policy.delay_us}
        if row["answered"] == row["offered"]:
            row["foretold"] = foretell(done, site.workload, policy)
    else:
        begun_s = float(done.out["due_ns"][0] - times_ns[0]) / 1e9
        row |= _tell_tuning(done, site.models[policy], begun_s + ramp_s)
    return row


def judge(
    out: Mapping[str, npt.NDArray[Any]],
    times_ns: npt.NDArray[np.int64],
    objective_us: int,
    ramp_s: float,
    seconds: float,
) -> dict[str, Any]:
    """Goodput and latencies, as the caller saw them from when requests were due; goodput by segments, too."""
    counts = times_ns >= ramp_s * 1e9
    latency_us = (out["answered_ns"] - out["due_ns"]) / 1e3
    is_right = out["code"] == 0
    is_good = is_right & (latency_us <= objective_us)
    length = max(1, math.ceil(seconds / SEGMENT_S))
    segments = np.minimum(((times_ns[counts] / 1e9 - ramp_s) / SEGMENT_S).astype(np.int64), length - 1)
    right_us = latency_us[counts & is_right]
    p50, p99 = (float(np.quantile(right_us, each)) if len(right_us) else None for each in (0.5, 0.99))
    offered, good = int(counts.sum()), int((counts & is_good).sum())
    lag_us = float(np.quantile(out["sent_ns"] - out["due_ns"], 0.99)) / 1e3
    return {
        "seconds": seconds,
        "offered": offered,
        "answered": int((counts & is_right).sum()),
        "refused": int((counts & (out["code"] == UNAVAILABLE)).sum()),
        "goodput": good / seconds,
        "good_share": good / offered if offered else 1.0,
        "segments_offered": np.bincount(segments, minlength=length).tolist(),
        "segments_good": np.bincount(segments, weights=is_good[counts], minlength=length).astype(int).tolist(),
        "p50_us": p50,
        "p99_us": p99,
        "lag_p99_us": lag_us,
        "is_lagging": lag_us > LAG_PART * objective_us,
    }


def find_recovery_s(row: dict[str, Any], step_s: float) -> float | None:
    """Seconds from a step until two segments in a row kept the objective; None where that never was."""
    first = round(step_s / SEGMENT_S)
    pairs = list(zip(row["segments_offered"], row["segments_good"], strict=True))[first:]
    is_kept = [offered - good <= max(1.0, ALLOWED * offered) for offered, good in pairs]
    for index in range(len(is_kept) - 1):
        if is_kept[index] and is_kept[index + 1]:
            return index * SEGMENT_S
    return None


def foretell(done: Drive, workload: Workload, point: Point) -> dict[str, Any]:
    """The p99 of the server's own latencies, beside what the simulation makes of the same requests.

    Run times are what a tuner would have learnt of them meanwhile.
    """
    service = ServiceTime(workload.max_rows, half_life_s=_HALF_LIFE_S)
    for look in done.looks:
        service.observe(look.runs, instances=1, now_s=look.end_s)
    found = done.window.percentile(0.99)
    if found is None or not service.is_known:
        return {}
    p99s = simulate_p99s(service, done, workload, point)
    return {"p99_us": found.value_ns / 1e3, "foretold_us": float(np.median(p99s)) / 1e3}


def simulate_p99s(service: ServiceTime, done: Drive, workload: Workload, point: Point) -> Sequence[float]:
    """By repetitions that differ in noise and stalls."""
    random = np.random.default_rng(1)
    truth, spread = service.curve(), service.spread()
    sent_ns = np.maximum.accumulate(done.out["sent_ns"] - done.out["sent_ns"][0])
    rows = np.full(len(sent_ns), workload.request_rows, np.int64)
    p99s = []
    for _ in range(_REPETITIONS):
        gaps_ns, stalls_ns = Surroundings(stalls=service.stalls()).draw_stalls(2000, random)
        simulated = simulate(
            sent_ns, rows=rows, truth=truth, max_rows=point.max_requests * workload.request_rows,
            delay_ns=point.delay_us * 1000, spreads=[math.sqrt(math.log1p(spread**2))] * len(truth),
            noise=random.standard_normal(5000), stall_gaps_ns=gaps_ns, stalls_ns=stalls_ns,
        )  # fmt: skip
        p99s.append(float(np.quantile(simulated.latencies_ns, 0.99)))
    return p99s


def _tell_tuning(done: Drive, model: str, first_s: float) -> dict[str, Any]:
    """Where the knobs stood, the moves made meanwhile, and what the tuner itself took of a core.

    Times are seconds from ``first_s`` of the monotonic clock. A look is its end, what came, was late and was lost.
    """
    before, after = (told["accounts"].get(model, {}) for told in (done.told_before, done.told_after))
    known = {each["at_s"] for each in before.get("decisions", ())}
    clock_s = time.time() - time.monotonic()
    decisions = [
        {**each, "at_s": each["at_s"] - clock_s - first_s}
        for each in after.get("decisions", ())
        if each["at_s"] not in known
    ]
    spent_ns = done.told_after["tuning_ns"] - done.told_before["tuning_ns"]
    return {
        "knobs": after.get("knobs", {}),
        "state": after.get("state", ""),
        "decisions": decisions,
        "looks": [(look.end_s - first_s, look.arrivals, look.late, look.lost) for look in done.looks],
        "tuning_cores": spent_ns / 1e9 / done.window.length_s,
    }


def count_missed_windows(row: Mapping[str, Any]) -> int:
    """The most windows in a row, of those right after a move, in which more than is allowed was late or lost."""
    worst = 0
    for decision in row["decisions"]:
        missed = 0
        for end_s, arrivals, late, lost in row["looks"]:
            if end_s - 0.5 < decision["at_s"]:
                continue
            if late + lost <= ALLOWED * max(arrivals, 1):
                break
            missed += 1
        worst = max(worst, missed)
    return worst
