"""Times the compiled core without sockets: nanoseconds per request for each step of a plain ModelInfer.

Compiles ``probe.pyx`` into the cache, runs one thread, writes benchmarks/results/micro.json.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

import aiorch_server
from aiorch_server._core import Batch, ModelSpec, Router, Scheduler, encode_request
from aiorch_server.types import DataType, ModelSignature, TensorSpec
from benchmarks.machine import ROOT, describe_machine

BATCHES = (1, 8, 64)
DIMS = 4
STEPS = ("dispatch", "take", "gather", "settle", "drain")


def build_probe(cache: Path) -> ModuleType:
    """Compiles the probe against the headers of the core that is imported here, and imports it too."""
    cache.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("probe.pyx"), cache)
    headers = str(Path(aiorch_server.__file__).resolve().parents[1])
    subprocess.run(
        [sys.executable, "-m", "Cython.Build.Cythonize", "--inplace", "--force", "--quiet", "probe.pyx"],
        cwd=cache,
        env={**os.environ, "PYTHONPATH": headers},
        check=True,
        timeout=300,
    )
    library = cache / f"probe{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    spec = importlib.util.spec_from_file_location("probe", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure_batches(probe: Any, message: bytes, scheduler: Scheduler, size: int, requests: int) -> dict[str, float]:
    """Nanoseconds per request and step over full batches of ``size``, Python's own calls included."""
    batch = Batch(scheduler)
    spent = dict.fromkeys(STEPS, 0)
    rounds = max(1, requests // size)
    for _ in range(rounds):
        spent["dispatch"] += probe.dispatch(message, size)
        marks = [time.perf_counter_ns()]
        scheduler.take(batch)
        marks.append(time.perf_counter_ns())
        inputs = batch.gather()
        marks.append(time.perf_counter_ns())
        batch.settle({"OUTPUT0": inputs["INPUT0"]})
        marks.append(time.perf_counter_ns())
        answered, failed, drain_ns = probe.drain()
        if (answered, failed) != (size, 0):
            raise RuntimeError(f"a batch of {size} gave {answered} answers and {failed} failures")
        for step, start, end in zip(("take", "gather", "settle"), marks, marks[1:], strict=False):
            spent[step] += end - start
        spent["drain"] += drain_ns
    return {step: ns / (rounds * size) for step, ns in spent.items()}


def repeat(runs: int, measure: Callable[[], dict[str, float]]) -> list[tuple[str, float, float, float]]:
    """(operation, median, least, most) of each operation over ``runs`` measurements."""
    results = [measure() for _ in range(runs)]
    return [
        (name, statistics.median(values), min(values), max(values))
        for name, values in ((name, [result[name] for result in results]) for name in results[0])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200_000, help="requests per run and batch size")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("AIORCH_CACHE", ROOT / ".cache")) / "bench")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "micro.json")
    options = parser.parse_args()
    out = Console(stderr=True)
    out.print("compiling the probe")
    module = build_probe(options.cache.resolve() / "micro")

    tensors = [TensorSpec(name, DataType.FP32, (DIMS,)) for name in ("INPUT0", "OUTPUT0")]
    spec = ModelSpec("identity_fp32", 1, ModelSignature((tensors[0],), (tensors[1],), max(BATCHES)))
    scheduler = Scheduler(spec)
    router = Router()
    router.publish({"identity_fp32": (1, {1: scheduler})})
    probe = module.Probe(router)
    inputs = [("INPUT0", "FP32", (1, DIMS), bytes(4 * DIMS))]
    message = encode_request("identity_fp32", "", "bench", inputs, ())

    measured = repeat(options.runs, lambda: {"scan": module.time_scan(message, options.requests) / options.requests})
    for size in BATCHES:
        out.print(f"batches of {size}")

        def measure(size: int = size) -> dict[str, float]:
            steps = measure_batches(probe, message, scheduler, size, options.requests)
            named = {f"{step}, batch {size}": ns for step, ns in steps.items()}
            return named | {f"all steps, batch {size}": sum(steps.values())}

        measured += repeat(options.runs, measure)
    rows = [{"operation": name, "ns": ns, "ns_min": least, "ns_max": most} for name, ns, least, most in measured]

    table = Table(title="nanoseconds per request, one thread, no sockets", title_justify="left")
    table.add_column("operation")
    for name in ("ns", "min", "max"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(str(row["operation"]), *(f"{row[key]:,.0f}" for key in ("ns", "ns_min", "ns_max")))
    Console().print(table)
    result = {"schema": 1, "machine": describe_machine(), "message_bytes": len(message), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
