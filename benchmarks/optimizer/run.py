"""Batching policies against each other on one real server: ``make bench-optimizer``.

Writes benchmarks/results/optimizer.json, cell by cell. ``QUICK=1`` ends within ten minutes. What is said of the tuner
is said by seeds that are drawn anew for each run; the two for working on it (``--seeds 1,2``) search the grid.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.machine import ROOT, describe_machine
from benchmarks.optimizer.comparison import POLICIES, TUNING_SEEDS, Comparison, Plan
from benchmarks.optimizer.loads import LOADS
from benchmarks.optimizer.overload import QUEUES
from benchmarks.optimizer.summary import print_tables
from benchmarks.optimizer.workloads import MAKERS

_CAPS = (1, 2, 4, 8, 16, 32)


def parse_options() -> argparse.Namespace:
    is_quick = os.environ.get("QUICK", "") not in ("", "0")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(MAKERS), help="comma-separated, from: %(default)s")
    parser.add_argument("--loads", default=",".join(LOADS), help="comma-separated, from: %(default)s")
    parser.add_argument("--policies", default=",".join(POLICIES), help="comma-separated, from: %(default)s")
    parser.add_argument("--seeds", default="", help="comma-separated; default: drawn at random")
    parser.add_argument("--seed-count", type=int, default=1 if is_quick else 3)
    parser.add_argument("--ramp", type=float, default=1.0 if is_quick else 4.0, help="seconds before a cell counts")
    parser.add_argument("--seconds", type=float, default=2.0 if is_quick else 15.0, help="of a reported cell")
    parser.add_argument("--grid-seconds", type=float, default=0.0 if is_quick else 4.0, help="0: no search")
    parser.add_argument("--caps", default="1,8,32" if is_quick else ",".join(map(str, _CAPS)))
    parser.add_argument("--delays", default="0" if is_quick else "0,0.1", help="in parts of the objective")
    parser.add_argument("--steady-seconds", type=float, default=8.0 if is_quick else 120.0, help="0: none")
    parser.add_argument("--overload-seconds", type=float, default=2.0 if is_quick else 12.0, help="0: none")
    parser.add_argument("--peers", default="triton,triton_timed" if is_quick else ",".join(QUEUES))
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("AIORCH_CACHE", ROOT / ".cache")) / "bench")
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--load-cpu", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "optimizer.json")
    options = parser.parse_args()
    options.is_quick = is_quick
    for name, known in (("workloads", MAKERS), ("loads", LOADS), ("policies", POLICIES), ("peers", QUEUES)):
        chosen = [each for each in getattr(options, name).split(",") if each]
        if unknown := set(chosen) - set(known):
            parser.error(f"unknown {name} {sorted(unknown)}, known are {list(known)}")
        setattr(options, name, chosen)
    if not {options.server_cpu, options.load_cpu} <= os.sched_getaffinity(0) or options.server_cpu == options.load_cpu:
        parser.error(f"needs two different CPUs of {sorted(os.sched_getaffinity(0))} for the server and the load")
    return options


def make_plan(options: argparse.Namespace) -> Plan:
    """What the options say; seeds that nobody chose are random."""
    seeds = [int(each) for each in options.seeds.split(",") if each]
    return Plan(
        workloads=options.workloads,
        loads=options.loads,
        policies=options.policies,
        seeds=seeds or [1000 + secrets.randbelow(1_000_000) for _ in range(options.seed_count)],
        tuning_seeds=TUNING_SEEDS[:1] if options.is_quick else TUNING_SEEDS,
        ramp_s=options.ramp,
        seconds=options.seconds,
        grid_s=options.grid_seconds,
        caps=[int(each) for each in options.caps.split(",")],
        delay_parts=[float(each) for each in options.delays.split(",")],
        steady_s=options.steady_seconds,
        overload_s=options.overload_seconds,
        peers=options.peers,
        cache=options.cache.resolve(),
        server_cpu=options.server_cpu,
        load_cpu=options.load_cpu,
        long_factor=1.5 if options.is_quick else 2.0,
    )


def main() -> int:
    options = parse_options()
    out = Console(stderr=True, highlight=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    plan = make_plan(options)
    # whatever this process does must not happen on the server's CPU
    os.sched_setaffinity(0, {options.load_cpu})
    result: dict[str, Any] = {
        "schema": 1,
        "machine": describe_machine(),
        "settings": {
            "is_quick": options.is_quick, "ramp_s": plan.ramp_s, "seconds": plan.seconds, "caps": list(plan.caps),
            "delay_parts": list(plan.delay_parts), "loads": {load: LOADS[load] for load in plan.loads},
        },
        "seeds": {"tuning": list(TUNING_SEEDS), "reported": list(plan.seeds)},
        "workloads": {}, "cells": [], "grid": [], "steady": [], "overload": [], "errors": [], "skipped": [],
    }  # fmt: skip
    out.print(f"seeds {', '.join(map(str, plan.seeds))}; about {plan.estimate_s() / 60:.0f} minutes")
    began_s = time.monotonic()

    def keep() -> None:
        result["took_s"] = time.monotonic() - began_s
        partial = options.output.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(options.output)

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out) as progress:
        bar = progress.add_task("", total=plan.estimate_s())
        told: list[int] = []

        def tell(what: str) -> None:
            progress.update(bar, description=what, completed=time.monotonic() - began_s)
            for error in result["errors"][len(told) :]:
                told.append(1)
                progress.print(error, style="red", markup=False)

        try:
            Comparison(plan, result, keep, tell).run()
        except KeyboardInterrupt:
            out.print("bench-optimizer: stopped; what was measured is kept")
            keep()
            return 130
    keep()
    print_tables(result, Console(width=None if sys.stdout.isatty() else 160))
    out.print(f"written: {options.output}")
    for error in result["errors"]:
        out.print(error, style="red", markup=False)
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
