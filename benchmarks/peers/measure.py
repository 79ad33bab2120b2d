"""One point of the comparison: a workload, a connection shape, every server in turns."""

from __future__ import annotations

import http.client
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil

from benchmarks.peers.h2load import H2Load, H2LoadRun, LoadFailed
from benchmarks.peers.process import ServerFailed, ServerProcess
from benchmarks.peers.wires import Wire
from benchmarks.peers.workload import Workload, WrongAnswer

_SIZING_S = 0.3
_MAX_REQUESTS = 2_000_000
#: What makes a server's row void; the others still count, and the exit code tells.
VOID = (WrongAnswer, LoadFailed, ServerFailed, grpc.RpcError, OSError, http.client.HTTPException)


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how often to measure, and on which CPUs."""

    seconds: float
    runs: int
    server_cpu: int
    load_cpu: int


@dataclass(frozen=True, slots=True)
class RunningServer:
    process: ServerProcess
    port: int
    wire: Wire


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of h2load and the CPU time that others used meanwhile."""

    load: H2LoadRun
    server_cpu_s: float
    other_cpu_s: float


class Entrant:
    """One server at one point: its load, its runs, its row of the result."""

    def __init__(
        self, name: str, server: RunningServer, workload: Workload, shape: tuple[int, int], settings: Settings
    ) -> None:
        self.name = name
        self._server = server
        self._workload = workload
        self._shape = shape
        self._settings = settings
        self._samples: list[Sample] = []

    def prepare(self, payload: Path) -> None:
        """Checks answers, warms up, and finds how many requests a run takes."""
        self._size = self._server.wire.check(self._workload, self._server.port)
        self._load = make_load(self._server, self._workload, payload, self._settings.load_cpu)
        rate = _find_rate(self._load, *self._shape, self._size)
        self._count = _bound(rate * self._settings.seconds, math.prod(self._shape))

    def run(self) -> None:
        """One timed run."""
        self._samples.append(_sample(self._load, self._server, *self._shape, self._count, self._size))

    def finish(self, contest: str) -> dict[str, Any]:
        """The row, after a run for latencies and another check of answers."""
        count = _bound(self._count * 0.6, math.prod(self._shape))
        latencies = self._load.measure_latencies_us(*self._shape, count)
        if self._server.wire.check(self._workload, self._server.port) != self._size:
            raise LoadFailed("the answer's size changed during the point")
        p50, p99 = (float(value) for value in np.percentile(latencies, [50, 99]))
        connections, streams = self._shape
        row: dict[str, Any] = {"contest": contest, "connections": connections, "streams": streams, "server": self.name}
        row |= summarise(self._samples) | {"p50_us": p50, "p99_us": p99, "response_bytes": self._size}
        return row | {"input_mb_per_s_per_core": row["req_per_s_per_core"] * self._workload.row_bytes / 1e6}


def measure_point(
    contest: str,
    workload: Workload,
    shape: tuple[int, int],
    servers: Mapping[str, RunningServer],
    settings: Settings,
    folder: Path,
    report: Callable[[str], None],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows for one contest and shape from runs in turns, and what made rows void; ``folder`` is scratch.

    Answers are checked with a real client before the first and after the last run. Any of VOID takes a server out of
    this point; the others go on.
    """
    point = f"{contest} {shape[0]}x{shape[1]}"
    entrants = [Entrant(name, server, workload, shape, settings) for name, server in servers.items()]
    rows: list[dict[str, Any]] = []
    void: list[str] = []
    stages: list[tuple[str, Callable[[Entrant], None]]] = [
        ("check and warm-up", lambda entrant: entrant.prepare(folder / f"{entrant.name}.payload")),
        *((f"run {number + 1} of {settings.runs}", Entrant.run) for number in range(settings.runs)),
        ("latencies and check", lambda entrant: rows.append(entrant.finish(contest))),
    ]
    for stage, act in stages:
        for entrant in list(entrants):
            report(f"{point}: {entrant.name}, {stage}")
            try:
                act(entrant)
            except VOID as error:
                entrants.remove(entrant)
                void.append(f"{point}: {entrant.name}, {stage}: {describe_error(error)}")
    return rows, void


def describe_error(error: BaseException) -> str:
    """One text for our errors and for those of gRPC, which print as many lines."""
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)


def make_load(server: RunningServer, workload: Workload, payload: Path, cpu: int) -> H2Load:
    """The load generator for a server, its payload written to a file."""
    payload.write_bytes(server.wire.payload(workload))
    return H2Load(server.wire.url(server.port), payload, server.wire.headers, cpu, server.wire.is_http1)


def summarise(samples: list[Sample]) -> dict[str, Any]:
    """The median run (by req/s) and the spread; CPU per request stands beside req/s, both from the same run."""
    ordered = sorted(samples, key=lambda sample: sample.load.req_per_s)
    middle = ordered[(len(ordered) - 1) // 2]
    load = middle.load
    return {
        "req_per_s": load.req_per_s,
        "req_per_s_min": ordered[0].load.req_per_s,
        "req_per_s_max": ordered[-1].load.req_per_s,
        "server_cores": middle.server_cpu_s / load.wall_s,
        "req_per_s_per_core": load.requests / middle.server_cpu_s,
        "cpu_us_per_request": middle.server_cpu_s / load.requests * 1e6,
        "load_cores": load.cpu_s / load.wall_s,
        "other_cores": max(0.0, middle.other_cpu_s / load.wall_s),
        "runs": [
            {
                "requests": sample.load.requests,
                "req_per_s": sample.load.req_per_s,
                "cpu_us_per_request": sample.server_cpu_s / sample.load.requests * 1e6,
                "other_cores": max(0.0, sample.other_cpu_s / sample.load.wall_s),
            }
            for sample in samples
        ],
    }


def _find_rate(load: H2Load, connections: int, streams: int, size: int) -> float:
    """Requests/s of a run of some length; also warms the server up."""
    count = _bound(200, connections * streams)
    while True:
        run = load.run(connections, streams, count, size)
        if run.wall_s >= _SIZING_S or count == _MAX_REQUESTS:
            return run.req_per_s
        count = _bound(run.req_per_s * _SIZING_S * 1.5, connections * streams)


def _bound(count: float, concurrency: int) -> int:
    return max(concurrency * 4, min(_MAX_REQUESTS, int(count)))


def _sample(load: H2Load, server: RunningServer, connections: int, streams: int, count: int, size: int) -> Sample:
    server.process.check_alive()
    busy_before, cpu_before = _read_busy_s(), server.process.cpu_s()
    run = load.run(connections, streams, count, size)
    cpu_s, busy_s = server.process.cpu_s() - cpu_before, _read_busy_s() - busy_before
    if cpu_s <= 0:
        raise LoadFailed(f"{server.process.name} used no measurable CPU time in {run.wall_s:.2f} s: run longer")
    return Sample(run, cpu_s, busy_s - cpu_s - run.cpu_s)


def _read_busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)
