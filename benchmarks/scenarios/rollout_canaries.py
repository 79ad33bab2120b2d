"""A tenth of the requests for a canary, and what becomes of canaries that are slow, err, differ, or are good."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from aiorch_client.admin import CanaryStep, Event, Gates, Rollout, RolloutPlan, RolloutState, Strategy
from rich.console import Console

from benchmarks.peers.h2load import LoadFailed
from benchmarks.scenarios.rollout_models import COMPLAINT, Fault, write_onnx, write_python
from benchmarks.scenarios.rollout_site import MODEL, Cpus, Load, Site, start_site

PERCENT = 10.0
WINDOW = 1000
#: Of the requests/s while canaries are judged: they are in Python, and a tenth of this is theirs.
JUDGED_RATE = 1000.0
#: What every candidate has to keep to. Versions differ by their numbers, which are below the tolerance.
GATES = Gates(max_error_rate=0.02, max_p99_ratio=3.0, min_agreement=0.98, agreement_atol=100.0, min_samples=200)
_STATE_S = 60.0


def find_worst_window(is_canary: npt.NDArray[np.bool_], length: int = WINDOW) -> tuple[int, int]:
    """The fewest and the most of the canary's in any so many answers one after the other."""
    sums = np.concatenate([[0], np.cumsum(is_canary)])
    counts = sums[length:] - sums[:-length]
    return int(counts.min()), int(counts.max())


def measure_weights(folder: Path, cpus: Cpus, requests: int, rate: float, out: Console) -> dict[str, Any]:
    """How many of the requests a canary of PERCENT gets."""
    with start_site(folder / "weights", cpus) as site:
        for version in (1, 2):
            site.push(write_onnx(folder / f"weights-{version}", version), version)
        site.finish(site.deploy(1), RolloutState.SUCCEEDED)
        rollout = site.deploy(2, RolloutPlan(Strategy.CANARY, (CanaryStep(PERCENT, 3600.0),)))
        _await_step(site, rollout)
        with site.load(rate, requests) as load:
            found = load.await_end(60 + 2 * requests / rate)
        site.admin.abort(MODEL)
    order = np.argsort(found.answered_ns, kind="stable")
    is_canary = found.version[order] == 2
    fewest, most = find_worst_window(is_canary)
    result = {
        "percent": PERCENT,
        "requests": len(found.code),
        "failed": found.failed,
        "lost": found.lost,
        "reached_percent": float(is_canary.mean() * 100),
        "window": WINDOW,
        "window_min_percent": fewest / WINDOW * 100,
        "window_max_percent": most / WINDOW * 100,
    }
    out.print(
        f"{result['reached_percent']:.3f} % of {result['requests']:,} requests for a canary of {PERCENT:g} %, in any "
        f"{WINDOW:,} between {result['window_min_percent']:.1f} and {result['window_max_percent']:.1f} %"
    )
    return result


def _await_step(site: Site, rollout: Rollout) -> None:
    until = time.monotonic() + _STATE_S
    while site.admin.get_rollout(rollout.id).state is not RolloutState.RUNNING:
        if time.monotonic() > until:
            raise LoadFailed("the canary did not begin")
        time.sleep(0.05)


def measure_canaries(folder: Path, cpus: Cpus, bake_s: float, out: Console) -> list[dict[str, Any]]:
    """One canary of each kind after the other, in two steps of half of ``bake_s`` each, judged without a person."""
    plan = RolloutPlan(
        Strategy.CANARY, (CanaryStep(PERCENT, bake_s / 2), CanaryStep(50.0, bake_s / 2)), GATES, sample_percent=20.0
    )
    rows = []
    with start_site(folder / "canaries", cpus) as site:
        site.push(write_python(folder / "canary-1", 1, Fault.NONE), 1)
        site.finish(site.deploy(1), RolloutState.SUCCEEDED)
        for version, fault in enumerate((Fault.SLOW, Fault.ERRING, Fault.DIFFERING, Fault.NONE), start=2):
            site.push(write_python(folder / f"canary-{version}", version, fault), version)
            with site.load(JUDGED_RATE) as load:
                ended = site.admin.wait(site.deploy(version, plan), timeout_s=bake_s + _STATE_S, look_s=0.25)
                found = load.finish()
            rows.append(_judge(fault, version, ended, _find_events(site, ended), found, bake_s))
            out.print(
                f"{fault.value}: {rows[-1]['state']} after {rows[-1]['decided_s']:.2f} s of {bake_s:g} s "
                f"({rows[-1]['reason']}); {rows[-1]['stable_failed']} failures of the stable version"
            )
    return rows


def _find_events(site: Site, rollout: Rollout) -> list[Event]:
    found = []
    for event in site.admin.watch(MODEL, after=0):
        if event.rollout == rollout.id:
            found.append(event)
            if event.kind == "rollout.ended":
                break
    return found


def _judge(
    fault: Fault, version: int, ended: Rollout, events: list[Event], load: Load, bake_s: float
) -> dict[str, Any]:
    """From the first step's begin to the decision and to the end, and what became of requests meanwhile."""
    begun = next((event for event in events if "is running: step 1 of" in event.text), None)
    if begun is None:
        raise LoadFailed(f"the canary that is {fault.value} got no requests: {ended.state.value}: {ended.reason}")
    decided = next(event for event in events if "is promoting" in event.text or "is rolling-back" in event.text)
    own = sum(int(text.split(" x ")[0]) for text in load.errors if COMPLAINT in text)
    is_of_candidate = (load.code != 0) & (load.version == version)
    expected = RolloutState.SUCCEEDED if fault is Fault.NONE else RolloutState.ROLLED_BACK
    return {
        "kind": fault.value,
        "state": ended.state.value,
        "is_right": ended.state is expected,
        "reason": decided.text.partition(": ")[2],
        "bake_s": bake_s,
        "decided_s": (_time(decided) - _time(begun)).total_seconds(),
        "ended_s": (_time(events[-1]) - _time(begun)).total_seconds(),
        "requests": len(load.code),
        "candidate_answers": int((load.version == version).sum()),
        "candidate_failed": own + int(is_of_candidate.sum()),
        "stable_failed": load.failed - own - int(is_of_candidate.sum()),
        "lost": load.lost,
        "errors": list(load.errors),
    }


def _time(event: Event) -> datetime:
    if event.time is None:
        raise LoadFailed(f"event {event.number} has no time")
    return event.time
