"""One point of the comparison: a workload, a connection shape, every server in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.peers.h2load import H2Load, H2LoadRun, LoadFailed
from benchmarks.peers.process import ServerProcess
from benchmarks.peers.wires import Wire
from benchmarks.peers.workload import Workload

_SIZING_S = 0.3
_MAX_REQUESTS = 2_000_000


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


def measure_point(
    contest: str,
    workload: Workload,
    shape: tuple[int, int],
    servers: Mapping[str, RunningServer],
    settings: Settings,
    folder: Path,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of the result for one contest and shape, one per server, from interleaved runs.

    ``folder`` is scratch. Answers are checked with a real client before the first and after the last run; WrongAnswer,
    LoadFailed or ServerFailed, or an error of the client, make the point void.
    """
    connections, streams = shape
    point = f"{contest} {connections}x{streams}"
    loads, sizes, counts = {}, {}, {}
    for name, server in servers.items():
        report(f"{point}: {name}, check and warm-up")
        sizes[name] = server.wire.check(workload, server.port)
        loads[name] = make_load(server, workload, folder / f"{name}.payload", settings.load_cpu)
        rate = _find_rate(loads[name], connections, streams, sizes[name])
        counts[name] = _bound(rate * settings.seconds, connections * streams)
    samples: dict[str, list[Sample]] = {name: [] for name in servers}
    for number in range(settings.runs):
        for name, server in servers.items():
            report(f"{point}: {name}, run {number + 1} of {settings.runs}")
            samples[name].append(_sample(loads[name], server, connections, streams, counts[name], sizes[name]))
    rows = []
    for name, server in servers.items():
        report(f"{point}: {name}, latencies and check")
        latencies = loads[name].measure_latencies_us(connections, streams, _bound(counts[name] * 0.6, connections))
        if server.wire.check(workload, server.port) != sizes[name]:
            raise LoadFailed(f"{name}: the answer's size changed while {point} ran")
        p50, p99 = (float(value) for value in np.percentile(latencies, [50, 99]))
        row: dict[str, Any] = {"contest": contest, "connections": connections, "streams": streams, "server": name}
        row |= summarise(samples[name]) | {"p50_us": p50, "p99_us": p99, "response_bytes": sizes[name]}
        rows.append(row | {"input_mb_per_s_per_core": row["req_per_s_per_core"] * workload.row_bytes / 1e6})
    return rows


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
