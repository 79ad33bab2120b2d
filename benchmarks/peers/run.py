"""Compares this server with its peers on one machine, in turns; see the README beside the results.

Writes benchmarks/results/peers.json. ``QUICK=1`` takes shorter runs (all within 10 minutes).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from benchmarks.machine import ROOT, describe_machine
from benchmarks.peers.comparison import Comparison, Found
from benchmarks.peers.contests import CONTESTS, Contest
from benchmarks.peers.measure import VOID, Settings, describe_error
from benchmarks.peers.workload import ensure_models, make_workload
from benchmarks.report import COLUMNS, compare, warn_if_noisy

SERVERS = tuple(dict.fromkeys(name for contest in CONTESTS for name in contest.servers))
NAMES = tuple(contest.name for contest in CONTESTS)


def main() -> int:
    options = parse_options()
    out = Console(stderr=True, highlight=False, soft_wrap=True)
    # Servers are ended on the way out of their blocks. SIGINT too: a shell's background job starts with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # Whatever this process and its clients do must not happen on the servers' CPU.
    os.sched_setaffinity(0, {options.load_cpu})
    try:
        result = run_comparison(options, out)
    except (*VOID, subprocess.SubprocessError) as error:
        out.print(f"bench-peers: {describe_error(error)}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        out.print("bench-peers: stopped; all servers are ended")
        return 130
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 150).print(make_table(result))
    if warning := warn_if_noisy(result):
        out.print(warning, style="yellow")
    out.print(f"written: {options.output}")
    return 1 if result["void"] else 0


def parse_options() -> argparse.Namespace:
    is_quick = os.environ.get("QUICK", "") not in ("", "0")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default=",".join(SERVERS), help="comma-separated, from: %(default)s")
    parser.add_argument("--contests", default=",".join(NAMES), help="comma-separated, from: %(default)s")
    parser.add_argument("--shapes", default="", help="only these, as 8x8,32x1; default: each contest's own")
    parser.add_argument("--seconds", type=float, default=1.0 if is_quick else 4.0, help="length of a run")
    parser.add_argument("--runs", type=int, default=3, help="runs per point; the median is reported")
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--load-cpu", type=int, default=1)
    parser.add_argument(
        "--models", type=Path, help="folder with <name>.onnx and <name>.npz; default: made in the cache"
    )
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("AIORCH_CACHE", ROOT / ".cache")) / "bench")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "peers.json")
    options = parser.parse_args()
    for key, known in (("servers", SERVERS), ("contests", NAMES)):
        asked = getattr(options, key).split(",")
        if unknown := set(asked) - set(known):
            parser.error(f"unknown {key[:-1]} {sorted(unknown)}, known are {list(known)}")
        setattr(options, key, asked)
    try:
        options.shapes = [tuple(map(int, text.split("x"))) for text in options.shapes.split(",") if text]
    except ValueError:
        parser.error(f"--shapes wants connections x streams such as 8x8,32x1, not '{options.shapes}'")
    if not {options.server_cpu, options.load_cpu} <= os.sched_getaffinity(0) or options.server_cpu == options.load_cpu:
        parser.error(f"needs two different CPUs of {sorted(os.sched_getaffinity(0))} for the server and the load")
    if options.seconds <= 0 or options.runs < 1:
        parser.error("--seconds must be above 0 and --runs at least 1")
    return options


def choose_contests(options: argparse.Namespace) -> list[Contest]:
    """The table's contests that were asked for, with the servers and shapes that were asked for."""
    chosen = []
    for contest in CONTESTS:
        servers = tuple(name for name in contest.servers if name in options.servers)
        shapes = tuple(shape for shape in contest.shapes if not options.shapes or shape in options.shapes)
        if contest.name in options.contests and servers and shapes:
            chosen.append(dataclasses.replace(contest, servers=servers, shapes=shapes))
    return chosen


def run_comparison(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Runs the contests one after the other and gives the JSON-ready result."""
    machine = describe_machine()
    cache = options.cache.resolve()
    models = options.models.resolve() if options.models else ensure_models(cache / "onnx")
    settings = Settings(options.seconds, options.runs, options.server_cpu, options.load_cpu)
    comparison = Comparison(settings, cache, models, out)
    found, described = Found(), []
    for contest in choose_contests(options):
        workload = make_workload(contest.workload, models)
        comparison.run(contest, workload, found)
        described.append(
            {
                "name": contest.name,
                "text": contest.text,
                "max_batch": workload.max_batch,
                "row_bytes": workload.row_bytes,
            }
        )
    has_priority = found.has_priority
    return {
        "schema": 2,
        "machine": machine,
        "settings": dataclasses.asdict(settings) | {"has_priority": has_priority},
        "contests": described,
        "servers": found.servers,
        "starts": found.starts,
        "ceilings": found.ceilings,
        "rows": found.rows,
        "void": found.void,
    }


def make_table(result: dict[str, Any]) -> Table:
    """All rows with ratios, for the terminal."""
    table = Table(
        title="ModelInfer, connections x streams (c x s); 'x' is AIOrchestrator divided by the row",
        title_justify="left",
    )
    for name in ("contest", "c x s", "server"):
        table.add_column(name)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    point = None
    for row in compare(result):
        if point not in (None, row.point):
            table.add_section()
        point = row.point
        table.add_row(row.contest, row.shape, row.title, *row.cells(), style="bold" if row.is_ours else "")
    return table


if __name__ == "__main__":
    sys.exit(main())
