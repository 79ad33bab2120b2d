"""Where this server's CPU time goes under load: ``perf record`` while h2load posts echoes, symbols grouped by part.

Needs ``perf`` (Debian: linux-perf) and the right to use it. Writes benchmarks/results/profile.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from rich.console import Console

from benchmarks.machine import ROOT, describe_machine
from benchmarks.peers.comparison import await_ready
from benchmarks.peers.measure import VOID, RunningServer, describe_error, make_load
from benchmarks.peers.process import ServerFailed, ServerProcess, find_free_port
from benchmarks.peers.servers import Situation, plan_aiorch
from benchmarks.peers.workload import Workload, ensure_models, make_workload

SHAPES = ((32, 1), (8, 8))
SHOWN = 15
#: The first pattern that is found in ``<object> <symbol>`` names the part.
PARTS = (
    (r"^\[(kernel|guest).*(epoll|eventfd|\bep_)", "kernel: epoll and wake-ups"),
    (r"^\[(kernel|guest).*(tcp|sock|skb|inet|ip_|net_|loopback|recv|send|copy_|nf_|dev_|__napi|qdisc)", "kernel: TCP"),
    (r"^\[(kernel|guest).*(futex|sched|switch|wake|enqueue|dequeue|pick_|update_|idle|timer)", "kernel: scheduling"),
    (r"^\[(kernel|guest)|^\[vdso\]|hypercall", "kernel: the rest"),
    (r"^libnghttp2", "nghttp2"),
    (
        r"/_core/|^_core|^(h2|io|wire|crossing|routes|scheduler|request|call|collate|batch|histogram)\w*\.cpython",
        "core",
    ),
    (r"^libonnxruntime|^onnxruntime", "onnxruntime"),
    (r"^(libssl|libcrypto)", "TLS"),
    (r"numpy|_multiarray", "numpy"),
    (r"^(python|libpython)", "Python"),
    (r"^(libc|libpthread|ld-)", "C library"),
    (r"", "other"),
)
_ROW = re.compile(r"^\s*([\d.]+)%\s+(\S+)\s+(.+?)\s*$")


def find_part(binary: str, symbol: str, core: Iterable[str]) -> str:
    """The part of the server that a function belongs to; ``core`` names the compiled modules."""
    if binary in core:
        return "core"
    return next(name for pattern, name in PARTS if re.search(pattern, f"{binary} {symbol}"))


def unmangle(symbol: str) -> str:
    """``__pyx_f_13aiorch_server_5_core_4wire_scan_request`` is ``wire.scan_request``."""
    found = re.match(r"__pyx_p?[fw]_(?=\d)", symbol)
    if found is None:
        return symbol
    rest, names = symbol[found.end() :], []
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        names.append(rest[length.end() : end])
        rest = rest[end:].removeprefix("_")
    return ".".join([*names[2:], rest])


def parse_report(text: str, core: Iterable[str]) -> list[tuple[float, str, str]]:
    """Per cent, part and symbol of each line of ``perf report`` sorted by dso and symbol."""
    names = frozenset(core)
    rows = []
    for line in text.splitlines():
        if not line.startswith("#") and (found := _ROW.match(line)):
            binary, symbol = found[2], unmangle(re.sub(r"^\[[.k]\]\s+", "", found[3]))
            rows.append((float(found[1]), find_part(binary, symbol, names), symbol))
    return rows


def await_recording(recorder: subprocess.Popen[str], data: Path) -> None:
    """Returns when perf has opened its counters: it writes the file's header then."""
    deadline = time.monotonic() + 20
    while not data.exists() or data.stat().st_size == 0:
        if recorder.poll() is not None or time.monotonic() > deadline:
            recorder.kill()
            raise ServerFailed(f"perf does not record: {recorder.communicate()[1][-500:]}")
        time.sleep(0.01)


def profile(workload: Workload, shape: tuple[int, int], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Percentages by part and the costliest functions at one shape."""
    port = find_free_port()
    plan = plan_aiorch(Situation(workload, port, folder, folder))
    with ServerProcess(plan.name, plan.command, options.server_cpu, folder / "log", plan.environment) as process:
        server = RunningServer(process, port, plan.wire)
        await_ready(server, workload)
        load = make_load(server, workload, folder / "payload", options.load_cpu)
        size = server.wire.check(workload, port)
        rate = load.run(*shape, 20_000, size).req_per_s
        data = folder / "perf.data"
        command = ["perf", "record", "-q", "-F", "1999", "-p", str(process.pid), "-o", str(data)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as recorder:
            await_recording(recorder, data)
            run = load.run(*shape, max(sum(shape) * 4, int(rate * options.seconds)), size)
            recorder.terminate()
            _, complaints = recorder.communicate(timeout=60)
        if recorder.returncode not in (0, -signal.SIGTERM):
            raise ServerFailed(f"perf failed: {complaints[-500:]}")
        report = ["perf", "report", "-q", "-i", str(data), "--stdio", "--fields", "overhead,dso,sym"]
        report += ["--percent-limit", "0.02"]
        done = subprocess.run(report, check=True, capture_output=True, text=True, timeout=120)
    rows = parse_report(done.stdout, (path.name for path in (ROOT / "aiorch_server" / "_core").glob("*.so")))
    parts: Counter[str] = Counter()
    for percent, part, _ in rows:
        parts[part] += percent  # type: ignore[assignment]
    top = [{"percent": percent, "group": part, "symbol": symbol} for percent, part, symbol in rows[:SHOWN]]
    name = f"{shape[0]}x{shape[1]}"
    return {"name": name, "req_per_s": run.req_per_s, "groups": dict(parts.most_common()), "symbols": top}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=("identity", "mlp", "image", "minilm"), default="identity")
    parser.add_argument("--shapes", default=",".join(f"{c}x{s}" for c, s in SHAPES), help="connections x streams")
    parser.add_argument("--seconds", type=float, default=4.0, help="recorded time of each shape")
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--load-cpu", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("AIORCH_CACHE", ROOT / ".cache")) / "bench")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "profile.json")
    options = parser.parse_args()
    out = Console(stderr=True, highlight=False)
    if shutil.which("perf") is None:
        out.print("profile: perf is not installed (Debian: linux-perf)", style="red")
        return 1
    os.sched_setaffinity(0, {options.load_cpu})
    workload = make_workload(options.workload, ensure_models(options.cache.resolve() / "onnx"))
    points = []
    try:
        for text in options.shapes.split(","):
            connections, streams = map(int, text.split("x"))
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                points.append(profile(workload, (connections, streams), Path(folder), options))
            out.print(points[-1]["name"], f"{points[-1]['req_per_s']:,.0f} req/s", points[-1]["groups"])
            out.print(
                "\n".join(
                    f"{top['percent']:6.2f} %  {top['group']:<28}{top['symbol']}" for top in points[-1]["symbols"]
                )
            )
    except (*VOID, subprocess.SubprocessError) as error:
        out.print(f"profile: {describe_error(error)}", style="red", markup=False)
        return 1
    result = {"schema": 1, "machine": describe_machine(), "workload": workload.name, "points": points}
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
