"""Whether the server's memory grows with the requests that it has served: 5 million echoes, looked at each 100,000.

Starts this project's server with the echo of FP32 [4], lets h2load post in chunks that alternate between 8 connections
with 8 streams and 32 with 32, and writes benchmarks/results/memory.json. Takes one or two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from rich.console import Console

from benchmarks.machine import ROOT, describe_machine
from benchmarks.peers.comparison import await_ready
from benchmarks.peers.measure import VOID, RunningServer, describe_error, make_load
from benchmarks.peers.process import ServerProcess, find_free_port
from benchmarks.peers.servers import Situation, plan_aiorch
from benchmarks.peers.workload import make_identity

SHAPES = ((8, 8), (32, 32))
TEXT = "Identity, in turns over 8x8 and 32x32 in chunks with connections of their own, one server process throughout."


def measure(folder: Path, requests: int, chunk: int, server_cpu: int, load_cpu: int, out: Console) -> dict[str, Any]:
    """Samples after each chunk, as JSON-ready values; LoadFailed when any request was not answered rightly."""
    workload = make_identity()
    plan = plan_aiorch(Situation(workload, find_free_port(), folder, folder))
    samples = []
    with ServerProcess(plan.name, plan.command, server_cpu, folder / "log", plan.environment) as process:
        port = int(plan.command[plan.command.index("--grpc-port") + 1])
        server = RunningServer(process, port, plan.wire)
        await_ready(server, workload)
        load = make_load(server, workload, folder / "payload", load_cpu)
        size = server.wire.check(workload, port)
        for done in range(chunk, requests + 1, chunk):
            # Both shapes in every chunk, so that each sample follows the same kinds of load.
            for connections, streams in SHAPES:
                load.run(connections, streams, chunk // len(SHAPES), size)
            memory = process.measure_memory()
            samples.append({"requests": done, "rss_mb": memory.rss_bytes / 1e6, "pss_mb": memory.pss_bytes / 1e6})
            out.print(f"{done:>9,} requests  RSS {samples[-1]['rss_mb']:.1f} MB")
        server.wire.check(workload, port)
    growth = (samples[-1]["rss_mb"] / samples[0]["rss_mb"] - 1) * 100
    return {"schema": 1, "machine": describe_machine(), "text": TEXT, "growth_percent": growth, "samples": samples}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5_000_000)
    parser.add_argument("--chunk", type=int, default=100_000, help="requests between two looks")
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--load-cpu", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json")
    options = parser.parse_args()
    if not 0 < options.chunk <= options.requests:
        parser.error("--chunk must be above 0 and not above --requests")
    out = Console(stderr=True, highlight=False)
    os.sched_setaffinity(0, {options.load_cpu})
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            cpus = (options.server_cpu, options.load_cpu)
            result = measure(Path(folder), options.requests, options.chunk, *cpus, out)
    except VOID as error:
        out.print(f"memory: {describe_error(error)}", style="red", markup=False)
        return 1
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"RSS changed by {result['growth_percent']:+.2f} % between the first and the last look")
    return 0


if __name__ == "__main__":
    sys.exit(main())
