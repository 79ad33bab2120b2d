"""Offers one model of a running V2 server the same load in different shapes, and shows what callers wait.

Open loops: latency counts from the time a request was due, so a stall shows in everything that it held up. The
generator is Python: stay below about 2,000 requests/s and look at its own lag; for capacity use the peer comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from aiorch_client.loadgen import Arrival, LoadPlan, LoadResult, TargetUnreachable, run_load
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.peers.workload import Workload, make_identity


def plan_scenarios(target: str, workload: Workload, rate: float, duration_s: float) -> Mapping[str, LoadPlan]:
    """The plans by name: one lonely caller, 32 callers, and the same mean rate evenly, independently and in bursts."""
    asked = [workload.request([index], f"{index}") for index in range(workload.row_count)]
    base = LoadPlan(
        target=target,
        requests=asked,
        duration_s=duration_s,
        warm_up_s=min(1.0, duration_s),
        check=lambda index, response: workload.is_right(response, [index], f"{index}"),
    )
    opened = dataclasses.replace(base, channels=8, rate=rate)
    return {
        "1 caller": base,
        "32 callers": dataclasses.replace(base, channels=8, streams=4),
        f"constant {rate:g}/s": dataclasses.replace(opened, arrival=Arrival.CONSTANT),
        f"Poisson {rate:g}/s": dataclasses.replace(opened, arrival=Arrival.POISSON),
        f"bursts {rate:g}/s": dataclasses.replace(opened, arrival=Arrival.BURST),
    }


def make_table(results: Mapping[str, LoadResult]) -> Table:
    table = Table(title="latency in microseconds, from due to answered", title_justify="left")
    table.add_column("scenario")
    for name in ("req/s", "p50", "p90", "p99", "p99.9", "max", "send lag p99", "errors"):
        table.add_column(name, justify="right")
    for name, result in results.items():
        figures = result.to_dict()
        marks = [figures["latency_us"][key] for key in ("p50", "p90", "p99", "p99.9", "max")]
        marks.append(figures["send_lag_us"]["p99"])
        errors = ", ".join(f"{code} {count}" for code, count in result.errors.items()) or "0"
        cells = ["-" if mark is None else f"{mark:,.0f}" for mark in marks]
        table.add_row(name, f"{result.req_per_s:,.0f}", *cells, errors)
    return table


def show(progress: Progress, bar: TaskID, part: float, answers: int) -> None:
    """The generator's progress, on the terminal."""
    progress.update(bar, completed=part)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="127.0.0.1:8001", help="gRPC address of a server with identity_fp32")
    parser.add_argument("--rate", type=float, default=500.0, help="mean requests/s of the open loops")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time of each scenario")
    parser.add_argument("--output", type=Path, help="folder for scenarios.json and the raw times (.npz)")
    options = parser.parse_args()
    results: dict[str, LoadResult] = {}
    try:
        plans = plan_scenarios(options.target, make_identity(), options.rate, options.seconds)
        with Progress(console=Console(stderr=True)) as progress:
            for name, plan in plans.items():
                bar = progress.add_task(name, total=1.0)
                results[name] = run_load(plan, partial(show, progress, bar))
                progress.update(bar, completed=1.0)
    except (TargetUnreachable, ValueError) as error:
        print(f"scenarios: {error}", file=sys.stderr)
        return 1
    Console(width=None if sys.stdout.isatty() else 120).print(make_table(results))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        for number, result in enumerate(results.values()):
            result.save(options.output / f"scenario-{number}.npz")
        stored = {name: result.to_dict() for name, result in results.items()}
        text = json.dumps({"machine": describe_machine(), "scenarios": stored}, indent=1)
        (options.output / "scenarios.json").write_text(text + "\n", encoding="utf-8")
    return 1 if any(result.errors for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
