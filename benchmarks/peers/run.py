"""Compares this server with its peers on one machine, in turns; see the README beside the results.

Writes benchmarks/results/peers.json. ``QUICK=1`` takes shorter runs (all within 10 minutes).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import grpc
from rich.console import Console
from rich.table import Table

from benchmarks.machine import ROOT, describe_machine
from benchmarks.peers.h2load import LoadFailed
from benchmarks.peers.measure import RunningServer, Settings, measure_point
from benchmarks.peers.process import ServerFailed, ServerProcess, find_free_port
from benchmarks.peers.servers import ServerPlan, plan_aiorch, plan_grpc_aio, plan_triton
from benchmarks.peers.workload import DIGITS, Workload, WrongAnswer, make_workloads
from benchmarks.report import COLUMNS, compare, warn_if_noisy

SERVERS = ("aiorch", "grpc_aio", "triton")
SHAPES = ((1, 1), (8, 8), (32, 1))
START_S = 120.0
#: What makes a point void; the others still count, and the exit code tells.
VOID = (WrongAnswer, LoadFailed, ServerFailed, grpc.RpcError)


def main() -> int:
    options = parse_options()
    out = Console(stderr=True, highlight=False, soft_wrap=True)
    # Servers are ended on the way out of their blocks. SIGINT too: a shell's background job starts with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        result = run_comparison(options, out)
    except (*VOID, FileNotFoundError, subprocess.SubprocessError) as error:
        out.print(f"bench-peers: {describe_error(error)}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        out.print("bench-peers: stopped; all servers are ended")
        return 130
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 140).print(make_table(result))
    if warning := warn_if_noisy(result):
        out.print(warning, style="yellow")
    out.print(f"written: {options.output}")
    return 1 if result["void"] else 0


def parse_options() -> argparse.Namespace:
    is_quick = os.environ.get("QUICK", "") not in ("", "0")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default=",".join(SERVERS), help="comma-separated, from: %(default)s")
    parser.add_argument("--workloads", default="identity,digits", help="comma-separated, from: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0 if is_quick else 5.0, help="length of a run")
    parser.add_argument("--runs", type=int, default=3, help="runs per point; the median is reported")
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--load-cpu", type=int, default=1)
    parser.add_argument("--transport", choices=("native", "grpcio"), default="native", help="of this server")
    parser.add_argument("--models", type=Path, help=f"repository with {DIGITS}; default: the example models, made here")
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("AIORCH_CACHE", ROOT / ".cache")) / "bench")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "peers.json")
    options = parser.parse_args()
    options.servers = options.servers.split(",")
    options.workloads = options.workloads.split(",")
    if unknown := set(options.servers) - set(SERVERS):
        parser.error(f"unknown server {sorted(unknown)}, known are {list(SERVERS)}")
    if unknown := set(options.workloads) - {"identity", "digits"}:
        parser.error(f"unknown workload {sorted(unknown)}, known are identity and digits")
    if not {options.server_cpu, options.load_cpu} <= os.sched_getaffinity(0) or options.server_cpu == options.load_cpu:
        parser.error(f"needs two different CPUs of {sorted(os.sched_getaffinity(0))} for the server and the load")
    if options.seconds <= 0 or options.runs < 1:
        parser.error("--seconds must be above 0 and --runs at least 1")
    return options


def run_comparison(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Starts the servers, measures every point, and gives the JSON-ready result; servers are gone when it returns."""
    machine = describe_machine()
    cache = options.cache.resolve()
    repository = options.models.resolve() if options.models else prepare_models(cache, out)
    workloads = make_workloads(repository)
    settings = Settings(options.seconds, options.runs, options.server_cpu, options.load_cpu)
    rows: list[dict[str, Any]] = []
    void: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        plans = make_plans(options, cache, workloads, repository, out)
        running = {}
        for plan, port in plans:
            out.print(f"starting {plan.title}")
            running[plan.name] = RunningServer(stack.enter_context(make_process(plan, settings, cache)), port)
        for server in running.values():
            server.process.await_port(server.port, START_S)
            await_models(server, workloads)
        status = stack.enter_context(out.status("measuring"))
        for workload in workloads:
            if workload.name not in options.workloads:
                continue
            frame = folder / f"{workload.name}.frame"
            frame.write_bytes(workload.frame())
            for connections, streams in SHAPES:
                report: Callable[[str], None] = status.update if out.is_terminal else out.print
                try:
                    point = measure_point(workload, connections, streams, running, settings, frame, report)
                except VOID as error:
                    void.append(f"{workload.name} {connections}x{streams}: {describe_error(error)}")
                    out.print(f"void: {void[-1]}", style="red", markup=False)
                    continue
                rows += point
                out.print(describe_point(point))
        has_priority = all(server.process.has_priority for server in running.values())
    return {
        "schema": 1,
        "machine": machine,
        "settings": {
            "seconds": settings.seconds,
            "runs": settings.runs,
            "server_cpu": settings.server_cpu,
            "load_cpu": settings.load_cpu,
            "has_priority": has_priority,
        },
        "servers": {plan.name: {"title": plan.title, "settings": plan.settings} for plan, _ in plans},
        "rows": rows,
        "void": void,
    }


def make_plans(
    options: argparse.Namespace, cache: Path, workloads: Sequence[Workload], repository: Path, out: Console
) -> list[tuple[ServerPlan, int]]:
    """A start plan and a free port for each server that was asked for."""
    plans = []
    for name in options.servers:
        port = find_free_port()
        if name == "aiorch":
            plan = plan_aiorch(cache, workloads, repository, port, options.transport)
        elif name == "grpc_aio":
            plan = plan_grpc_aio(repository, port)
        else:
            plan = plan_triton(cache, workloads, repository, port, out)
        plans.append((plan, port))
    return plans


def make_process(plan: ServerPlan, settings: Settings, cache: Path) -> ServerProcess:
    """The server's process, not started yet; its output goes to a log beside the cache."""
    log = cache / "logs" / f"{plan.name}.log"
    return ServerProcess(plan.name, plan.command, settings.server_cpu, log, plan.environment)


def await_models(server: RunningServer, workloads: Sequence[Workload]) -> None:
    """Returns when all models answer rightly; ServerFailed or the last grpc.RpcError after START_S."""
    deadline = time.monotonic() + START_S
    for workload in workloads:
        while True:
            try:
                workload.check(server.port)
                break
            except grpc.RpcError:
                server.process.check_alive()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def prepare_models(cache: Path, out: Console) -> Path:
    """The digits model of the examples, built by examples/prepare.py once and brought up to date by it."""
    target = cache / "models"
    out.print("preparing the digits model")
    command = [sys.executable, str(ROOT / "examples" / "prepare.py"), str(target), "--only", DIGITS]
    command += ["--reference", str(cache / "reference")]
    try:
        subprocess.run(command, check=True, timeout=600)
    except subprocess.SubprocessError as error:
        raise ServerFailed(f"examples/prepare.py failed: {error}") from None
    return target


def describe_error(error: BaseException) -> str:
    """One text for our errors and for those of gRPC, which print as many lines."""
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)


def describe_point(point: list[dict[str, Any]]) -> str:
    """One line per server for the one who waits."""
    return "\n".join(
        f"{row['workload']:<9}{row['connections']}x{row['streams']:<3} {row['server']:<9} "
        f"{row['req_per_s']:>9,.0f} req/s {row['cpu_us_per_request']:>8.1f} us CPU  "
        f"p50 {row['p50_us']:>8,.0f} us  p99 {row['p99_us']:>8,.0f} us"
        for row in point
    )


def make_table(result: dict[str, Any]) -> Table:
    """All rows with ratios, for the terminal."""
    table = Table(
        title="ModelInfer, connections x streams (c x s); 'x' is AIOrchestrator divided by the row",
        title_justify="left",
    )
    for name in ("workload", "c x s", "server"):
        table.add_column(name)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    point = None
    for row in compare(result):
        if point not in (None, row.point):
            table.add_section()
        point = row.point
        table.add_row(row.workload, row.shape, row.title, *row.cells(), style="bold" if row.is_ours else "")
    return table


if __name__ == "__main__":
    sys.exit(main())
