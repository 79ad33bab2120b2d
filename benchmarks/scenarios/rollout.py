"""Rollouts as an operator sees them, on a real server with a registry: swaps under load, weights, canaries, access.

Writes benchmarks/results/rollout.json. ``QUICK=1`` does less of each and ends within ten minutes; ``--only`` measures a
part anew and leaves the rest of the result as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import grpc
from aiorch_client.errors import ClientError
from rich.console import Console

from aiorch_server.errors import InvalidSettings
from aiorch_server.execution.precedence import check_precedence
from benchmarks.machine import ROOT, describe_machine
from benchmarks.peers.measure import VOID, describe_error
from benchmarks.scenarios.rollout_access import measure_access
from benchmarks.scenarios.rollout_canaries import measure_canaries, measure_weights
from benchmarks.scenarios.rollout_site import Cpus
from benchmarks.scenarios.rollout_swaps import measure_swaps

MEASURES = ("swaps", "swaps-realtime", "weights", "canaries", "access")


def parse_options() -> argparse.Namespace:
    is_quick = os.environ.get("QUICK", "") not in ("", "0")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MEASURES), help="comma-separated, from: %(default)s")
    parser.add_argument("--rate", type=float, default=2000.0, help="requests/s during swaps")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--requests", type=int, default=100_000, help="that the canary gets its share of")
    parser.add_argument("--bake", type=float, default=8.0 if is_quick else 20.0, help="seconds of a canary's steps")
    parser.add_argument("--turns", type=int, default=7 if is_quick else 15, help="of each kind of caller")
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--load-cpu", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "rollout.json")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(MEASURES):
        parser.error(f"unknown measure {sorted(unknown)}, known are {list(MEASURES)}")
    if not {options.server_cpu, options.load_cpu} <= os.sched_getaffinity(0) or options.server_cpu == options.load_cpu:
        parser.error(f"needs two different CPUs of {sorted(os.sched_getaffinity(0))} for the server and the load")
    return options


def find_lack() -> str:
    """Why no server of this user can give precedence to its threads; empty where it can."""
    try:
        check_precedence()
    except InvalidSettings as error:
        return str(error)
    return ""


def main() -> int:
    options = parse_options()
    out = Console(stderr=True, highlight=False, soft_wrap=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    cpus = Cpus(options.server_cpu, options.load_cpu)
    measures: dict[str, Callable[[Path], Any]] = {
        "swaps": lambda folder: measure_swaps(folder, cpus, options.swaps, options.rate, out),
        "swaps-realtime": lambda folder: measure_swaps(folder, cpus, options.swaps, options.rate, out, "realtime"),
        "weights": lambda folder: measure_weights(folder, cpus, options.requests, 2 * options.rate, out),
        "canaries": lambda folder: measure_canaries(folder, cpus, options.bake, out),
        "access": lambda folder: measure_access(folder, cpus, options.turns, out),
    }
    # Whatever this process and its clients do must not happen on the server's CPU.
    os.sched_setaffinity(0, {options.load_cpu})
    result = {"schema": 1}
    if options.output.exists():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    has_failed = False
    if "swaps-realtime" in options.only and (lack := find_lack()):
        out.print(f"bench-rollout: swaps-realtime is left out: {lack}", style="yellow", markup=False)
        options.only.remove("swaps-realtime")
        result.pop("swaps-realtime", None)
    for name in options.only:
        machine = describe_machine()
        try:
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                result[name] = {"machine": machine, "found": measures[name](Path(folder))}
        except (*VOID, ClientError, grpc.RpcError) as error:
            out.print(f"bench-rollout: {name}: {describe_error(error)}", style="red", markup=False)
            has_failed = True
        except KeyboardInterrupt:
            out.print("bench-rollout: stopped; the server is ended")
            return 130
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.print(f"written: {options.output}")
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
