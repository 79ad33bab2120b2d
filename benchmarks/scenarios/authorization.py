"""What authorization costs a request of the hot path, in CPU: with a token of 1 KB that has a pass, and without.

Three servers of this project take turns on one CPU while 32 clients on another ask for the echo of FP32 [4], one
request after the other: `open` asks nobody and is sent no token, `sent` asks nobody and is sent one all the same,
`asked` has passes and a quota, and each call has one. Prints the CPU microseconds per request of each (the median over
all turns), and what `asked` adds to `open`; fails where that is above the goal. How clients compress the token
(`--compression`) can cost more than asking for it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from rich.console import Console

from benchmarks.machine import describe_machine
from benchmarks.peers.comparison import await_ready
from benchmarks.peers.measure import VOID, RunningServer, describe_error
from benchmarks.peers.process import ServerProcess, find_free_port
from benchmarks.peers.servers import Situation, plan_aiorch
from benchmarks.peers.workload import make_identity
from benchmarks.scenarios.echoes import Compression, Echoes

#: The form of a token of RS256 with a few claims; who made it does not matter to a pass.
TOKEN = (
    "Bearer " + "eyJhbGciOiJSUzI1NiIsImtpZCI6ImJlbmNoIn0." + "abcdefghijklmnopqrstuvwxyz012345" * 30 + "." + "s" * 22
)
KINDS = ("open", "sent", "asked")
GOAL_PERCENT = 5.0
CONNECTIONS = 32


def serve_asking(arguments: list[str], model: str) -> None:
    """The server's command in this process, with a door that has a pass for the token."""
    from aiorch_server import _core, cli
    from aiorch_server.frontends import grpc as doors

    passes = _core.Passes()
    never_ns = time.monotonic_ns() + 10**15
    quota = _core.Quota("bench", requests_per_s=1e7, rows_per_s=1e7, max_in_flight=1_000_000)
    assert passes.add(TOKEN.encode(), model, expires_ns=never_ns, generation=passes.generation, quota=quota)
    door: Any = doors.GrpcDoor
    door.__init__ = functools.partialmethod(door.__init__, passes=passes)
    sys.argv = ["aiorch", *arguments]
    cli.main()


def start(kind: str, folder: Path, options: argparse.Namespace, stack: ExitStack) -> tuple[ServerProcess, Echoes, int]:
    """A server that answers, its clients, and how many bytes its answer has."""
    workload = make_identity()
    own = folder / kind
    own.mkdir()
    plan = plan_aiorch(Situation(workload, find_free_port(), own, own))
    command = list(plan.command)
    if kind == "asked":
        command = [sys.executable, __file__, "--serve", workload.model, *command[command.index("serve") :]]
    process = stack.enter_context(ServerProcess(kind, command, options.server_cpu, own / "log", plan.environment))
    server = RunningServer(process, int(command[command.index("--grpc-port") + 1]), plan.wire)
    await_ready(server, workload)  # what has no pass is answered here too: by Python
    size = server.wire.ask(workload, server.port)
    token = "" if kind == "open" else TOKEN
    load = Echoes(server.port, plan.wire.payload(workload), CONNECTIONS, token, options.compression)
    stack.callback(load.close)
    load.run(options.requests, size)
    return process, load, size


def read_cpu_ns(pid: int) -> int:
    """What all threads of the process have run, more finely than in clock ticks."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def measure(folder: Path, options: argparse.Namespace, out: Console) -> dict[str, list[float]]:
    """CPU microseconds per request of each turn, by kind; LoadFailed when any request was not answered rightly."""
    spent: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        running = {kind: start(kind, folder, options, stack) for kind in KINDS}
        for turn in range(options.turns):
            for kind in KINDS if turn % 2 == 0 else KINDS[::-1]:
                process, load, size = running[kind]
                before = read_cpu_ns(process.pid)
                load.run(options.requests, size)
                spent[kind].append((read_cpu_ns(process.pid) - before) / options.requests / 1000)
            out.print(f"turn {turn + 1}: " + "  ".join(f"{kind} {spent[kind][-1]:.2f} us" for kind in KINDS))
    return spent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32_000, help="of each turn")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--compression", type=Compression, choices=list(Compression), default=Compression.INDEXED)
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--load-cpu", type=int, default=1)
    parser.add_argument("--output", type=Path, help="for the result as JSON")
    options = parser.parse_args()
    out = Console(stderr=True, highlight=False)
    os.sched_setaffinity(0, {options.load_cpu})
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            spent = measure(Path(folder), options, out)
    except VOID as error:
        out.print(f"authorization: {describe_error(error)}", style="red", markup=False)
        return 1
    medians = {kind: median(turns) for kind, turns in spent.items()}
    added = (medians["asked"] / medians["open"] - 1) * 100
    print("  ".join(f"{kind} {us:.2f} us" for kind, us in medians.items()), f" asked adds {added:+.1f} % to open")
    if options.output:
        result = {
            "schema": 1,
            "machine": describe_machine(),
            "compression": options.compression,
            "cpu_us": spent,
            "added_percent": added,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if added <= GOAL_PERCENT else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve_asking(sys.argv[3:], sys.argv[2])
    else:
        sys.exit(main())
