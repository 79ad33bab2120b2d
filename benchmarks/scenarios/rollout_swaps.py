"""Version after version takes the place of the one before, under a steady load: what requests notice of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from aiorch_client.admin import RolloutState
from rich.console import Console

from benchmarks.scenarios.rollout_models import write_onnx
from benchmarks.scenarios.rollout_site import Cpus, Load, start_site

#: Between two swaps: what is steady is measured in the middle of it.
PAUSE_S = 0.4
#: A swap's window goes on for so long after its end was seen.
SETTLE_S = 0.05
_WARM_UP_S = 1.5
_LOOK_S = 0.02
Chosen = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Swap:
    """The versions, and when the operator asked and saw the end, by the monotonic clock."""

    old: int
    new: int
    asked_ns: int
    seen_ns: int


def find_illegal(load: Load, swaps: Sequence[Swap]) -> int:
    """Answers of the new version from before its swap, and of the old one to requests that were sent after it."""
    first = np.zeros(1 + max(swap.new for swap in swaps), np.int64)
    last = np.full(len(first), np.iinfo(np.int64).max)
    for swap in swaps:
        first[swap.new] = swap.asked_ns
        last[swap.old] = swap.seen_ns
    good = load.code == 0
    versions = np.clip(load.version, 0, len(first) - 1)
    is_known = (load.version >= swaps[0].old) & (load.version < len(first))
    is_legal = is_known & (load.answered_ns >= first[versions]) & (load.sent_ns <= last[versions])
    return int((good & ~is_legal).sum())


def choose(load: Load, swaps: Sequence[Swap]) -> tuple[Chosen, Chosen]:
    """Which requests were under way during a swap, and which were not during any; the load's warm-up is in neither."""
    is_swap = np.zeros(len(load.due_ns), np.bool_)
    is_near = np.zeros(len(load.due_ns), np.bool_)
    settle_ns = int(SETTLE_S * 1e9)
    ends_ns = np.where(load.answered_ns > 0, load.answered_ns, np.iinfo(np.int64).max)
    for swap in swaps:
        is_swap |= (ends_ns >= swap.asked_ns) & (load.due_ns <= swap.seen_ns + settle_ns)
        is_near |= (ends_ns >= swap.asked_ns) & (load.due_ns <= swap.seen_ns + 2 * settle_ns)
    is_within = (load.due_ns >= swaps[0].asked_ns - int(PAUSE_S * 1e9)) & (load.due_ns <= swaps[-1].seen_ns)
    return is_swap, is_within & ~is_near


def summarise(load: Load, swaps: Sequence[Swap], rate: float) -> dict[str, Any]:
    """The figures, as JSON-ready values."""
    is_swap, is_steady = choose(load, swaps)
    lag_us = load.lag_us()
    marks = (50, 99, 99.9, 100)
    during, steady = (np.percentile(load.latency_us(chosen), marks) for chosen in (is_swap, is_steady))
    lasted_ms = np.array([(swap.seen_ns - swap.asked_ns) / 1e6 for swap in swaps])
    return {
        "swaps": len(swaps),
        "swap_ms": {"p50": float(np.median(lasted_ms)), "max": float(lasted_ms.max())},
        "offered_per_s": rate,
        "requests": len(load.code),
        "failed": load.failed,
        "lost": load.lost,
        "illegal": find_illegal(load, swaps),
        "versions": len(set(load.version[load.code == 0].tolist())),
        "errors": list(load.errors),
        "during": _name_marks(during) | {"requests": int(is_swap.sum())},
        "steady": _name_marks(steady) | {"requests": int(is_steady.sum())},
        "p99_ratio": float(during[1] / steady[1]),
        "send_lag_us": {
            "during_p99": float(np.percentile(lag_us[is_swap], 99)),
            "steady_p99": float(np.percentile(lag_us[is_steady], 99)),
        },
        "has_precedence": load.has_precedence,
    }


def _name_marks(marks: npt.NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(("p50_us", "p99_us", "p99.9_us", "max_us"), map(float, marks), strict=True))


def measure_swaps(
    folder: Path, cpus: Cpus, swaps: int, rate: float, out: Console, scheduling: str = "plain"
) -> dict[str, Any]:
    """So many versions deployed by replacement, one after the other; LoadFailed when one does not come to serve."""
    done: list[Swap] = []
    with start_site(folder / "swaps", cpus, scheduling) as site:
        for version in range(1, swaps + 2):
            site.push(write_onnx(folder / f"swap-{version}", version), version)
        site.finish(site.deploy(1), RolloutState.SUCCEEDED)
        with site.load(rate) as load:
            time.sleep(_WARM_UP_S)
            for version in range(2, swaps + 2):
                time.sleep(PAUSE_S)
                asked_ns = time.monotonic_ns()
                site.finish(site.deploy(version), RolloutState.SUCCEEDED, look_s=_LOOK_S)
                done.append(Swap(version - 1, version, asked_ns, time.monotonic_ns()))
            time.sleep(PAUSE_S)
            found = summarise(load.finish(), done, rate)
    out.print(
        f"{found['swaps']} swaps ({scheduling}): {found['failed']} of {found['requests']:,} requests failed, "
        f"{found['lost']} lost, {found['illegal']} from a wrong version; p99 {found['during']['p99_us']:,.0f} us "
        f"during, {found['steady']['p99_us']:,.0f} us between swaps"
    )
    return found
