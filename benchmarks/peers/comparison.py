"""One contest: starts its servers one after the other, measures every shape, and ends them."""

from __future__ import annotations

import http.client
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console

from benchmarks.peers.ceiling import BATCHES
from benchmarks.peers.contests import Contest
from benchmarks.peers.measure import RunningServer, Settings, describe_error, measure_point
from benchmarks.peers.process import ServerProcess, find_free_port
from benchmarks.peers.servers import (
    HERE,
    ServerPlan,
    Situation,
    make_certificate,
    plan_aiorch,
    plan_aiorch_asyncio,
    plan_aiorch_asyncio_5ms,
    plan_grpc_aio,
    plan_mosec,
)
from benchmarks.peers.triton_server import plan_triton
from benchmarks.peers.workload import Workload, WrongAnswer

START_S = 60.0
#: A thousand connections in one instant overflow the queue of those that wait to be accepted; the second until they try
#: again would be the figure.
_MAX_HTTP1_CONNECTIONS = 256
#: What a server that is not ready yet may do with a request.
_NOT_READY = (grpc.RpcError, OSError, http.client.HTTPException, WrongAnswer)


@dataclass(slots=True)
class Found:
    """JSON-ready results of one contest or of several."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    ceilings: list[dict[str, Any]] = field(default_factory=list)
    void: list[str] = field(default_factory=list)
    servers: dict[str, dict[str, str]] = field(default_factory=dict)
    has_priority: bool = True


@dataclass(frozen=True, slots=True)
class Comparison:
    """What all contests share."""

    settings: Settings
    cache: Path
    models: Path
    out: Console

    def run(self, contest: Contest, workload: Workload, found: Found) -> None:
        """Adds the contest's results to ``found``; servers are gone when it returns, however it returns."""
        for servers in contest.turns:
            self._run_together(contest, servers, workload, found)

    def _run_together(self, contest: Contest, servers: tuple[str, ...], workload: Workload, found: Found) -> None:
        report: Callable[[str], None] = self.out.print
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            running = {}
            for name in servers:
                self.out.print(f"{contest.name}: starting {name}")
                running[name] = self._start(name, contest, workload, folder, stack, found)
            if self.out.is_terminal:
                report = stack.enter_context(self.out.status("measuring")).update
            is_ceiling_wanted = workload.onnx is not None
            ceilings = [self._measure_ceiling(workload)] if is_ceiling_wanted else []
            for shape in contest.shapes:
                fit = {
                    name: server
                    for name, server in running.items()
                    if not server.wire.is_http1 or math.prod(shape) <= _MAX_HTTP1_CONNECTIONS
                }
                rows, void = measure_point(contest.name, workload, shape, fit, self.settings, folder, report)
                for text in void:
                    self.out.print(f"void: {text}", style="red", markup=False)
                self.out.print(describe_point(rows))
                found.rows += rows
                found.void += void
            ceilings += [self._measure_ceiling(workload) for _ in range(2)] if is_ceiling_wanted else []
            found.ceilings += summarise_ceilings(contest.name, ceilings)
            found.has_priority &= all(server.process.has_priority for server in running.values())

    def _start(
        self, name: str, contest: Contest, workload: Workload, folder: Path, stack: ExitStack, found: Found
    ) -> RunningServer:
        """A server that has answered once; how long that took and what it then holds goes to ``found``."""
        own = folder / name
        own.mkdir()
        certificate = make_certificate(own) if contest.has_tls else None
        situation = Situation(workload, find_free_port(), own, self.cache, certificate, contest.is_busy)
        plan = self._plan(name, situation)
        log = self.cache / "logs" / f"{contest.name}-{plan.name}.log"
        begin = time.monotonic()
        process = stack.enter_context(
            ServerProcess(plan.name, plan.command, self.settings.server_cpu, log, plan.environment)
        )
        server = RunningServer(process, situation.port, plan.wire)
        await_ready(server, workload)
        ready_s = time.monotonic() - begin
        memory = process.measure_memory()
        start = {"contest": contest.name, "server": name, "ready_s": ready_s, "processes": memory.processes}
        found.starts.append(start | {"rss_mb": memory.rss_bytes / 1e6, "pss_mb": memory.pss_bytes / 1e6})
        found.servers[name] = {"title": plan.title, "settings": plan.settings}
        return server

    def _plan(self, name: str, situation: Situation) -> ServerPlan:
        plans: Mapping[str, Callable[[Situation], ServerPlan]] = {
            "aiorch": plan_aiorch,
            "aiorch_asyncio": plan_aiorch_asyncio,
            "aiorch_asyncio_5ms": plan_aiorch_asyncio_5ms,
            "grpc_aio": plan_grpc_aio,
            "triton": partial(plan_triton, out=self.out),
            "mosec": partial(plan_mosec, out=self.out),
        }
        return plans[name](situation)

    def _measure_ceiling(self, workload: Workload) -> dict[str, float]:
        """Rows per second by batch size, from a process of its own on the servers' CPU."""
        command = [sys.executable, str(HERE / "ceiling.py"), str(self.models), workload.name]
        command += [str(self.settings.server_cpu), str(min(1.0, self.settings.seconds))]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=START_S, start_new_session=True
        )
        rates: dict[str, float] = json.loads(done.stdout)
        return rates


def await_ready(server: RunningServer, workload: Workload) -> None:
    """Returns when the model answers rightly; ServerFailed after START_S or on exit."""
    server.process.await_port(server.port, START_S)
    deadline = time.monotonic() + START_S
    while True:
        try:
            server.wire.ask(workload, server.port)
            return
        except _NOT_READY as error:
            server.process.check_alive()
            if time.monotonic() > deadline:
                raise server.process.describe_failure(f"is not ready: {describe_error(error)}") from None
            time.sleep(0.02)


def summarise_ceilings(contest: str, runs: list[dict[str, float]]) -> list[dict[str, Any]]:
    """The median of each batch size."""
    return [
        {"contest": contest, "batch": batch, "rows_per_s": statistics.median(run[str(batch)] for run in runs)}
        for batch in BATCHES
        if runs
    ]


def describe_point(point: list[dict[str, Any]]) -> str:
    """One line per server for the one who waits."""
    return "\n".join(
        f"{row['contest']:<14}{row['connections']}x{row['streams']:<3} {row['server']:<14} "
        f"{row['req_per_s']:>9,.0f} req/s {row['cpu_us_per_request']:>8.1f} us CPU  "
        f"p50 {row['p50_us']:>8,.0f} us  p99 {row['p99_us']:>8,.0f} us"
        for row in point
    )
