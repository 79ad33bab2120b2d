"""Mixed traffic through I/O threads for a while; memory, descriptors, threads and Python's objects must come back.

    traffic.py [--seconds 120] [--results FILE]

The server runs here; the clients in a process of their own (``traffic_clients.py``), so that what they keep does not
count. Each round: good, slow, cancelled, expired and bad calls, streams both ways, some of them given up, connections
that end in the middle of a frame; then all connections close, and the server is measured while nothing is open.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import gc
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import grpc
from hand_driven import make_spec

from aiorch_server._core import Batch, Router, Scheduler
from aiorch_server.frontends.grpc import FAST_PATH, NativeGrpcServer

HERE = Path(__file__).parent
LIMIT_S = 60.0
WARM_UP_ROUNDS = 8
#: What may stay after so many rounds: allocators keep pages, and how many varies; objects, descriptors and threads are
#: exact but for what a moment keeps alive.
MOST_KIB, MOST_OBJECTS = 2048, 50


def measure() -> dict[str, int]:
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        "resident_kib": next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "objects": len(gc.get_objects()),
    }


async def echo(request: bytes, context: Any) -> bytes:
    if request == b"fail":
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "as you wish", (("k", "v"),))
    if request == b"wait":
        await asyncio.Event().wait()
    return request


async def chat(requests: Any, context: Any) -> Any:
    async for request in requests:
        yield request * 50


async def model_infer(request: bytes, context: Any) -> bytes:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{len(request)} bytes are no request")
    return b""


def run_instance(scheduler: Scheduler) -> None:
    batch = Batch(scheduler)
    while scheduler.take(batch):
        found = batch.gather()["X"]
        if not (found < 0).any():
            batch.settle({"Y": found * 2})
            continue
        for index in range(batch.members):
            batch.select(index)
            found = batch.gather()["X"]
            if (found < 0).any():
                batch.fail(13, "negative")
            else:
                batch.settle({"Y": found * 2})
            batch.select(None)


async def until(is_true: Any, what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not is_true():
        if time.monotonic() > end:
            sys.exit(f"{what} does not come")
        await asyncio.sleep(0.002)


async def run(seconds: float) -> list[dict[str, int]]:
    """Measures after each round."""
    scheduler, router = Scheduler(make_spec(), max_queue_size=64), Router()
    router.publish({"echo": (3, {3: scheduler})})
    instances = [threading.Thread(target=run_instance, args=(scheduler,)) for _ in range(2)]
    for instance in instances:
        instance.start()
    server = NativeGrpcServer(io_threads=2, router=router)
    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo), "Chat": grpc.stream_stream_rpc_method_handler(chat)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("leaks.Test", handlers),))
    service, method = FAST_PATH[1:].split("/")
    server.add_registered_method_handlers(service, {method: grpc.unary_unary_rpc_method_handler(model_infer)})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    script = str(HERE / "traffic_clients.py")
    clients = await asyncio.create_subprocess_exec(
        sys.executable, script, str(port), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert clients.stdin is not None and clients.stdout is not None
    rows = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(rows) < 3 * WARM_UP_ROUNDS:
        router.publish({"echo": (3, {3: scheduler})})  # a new table while calls run
        clients.stdin.write(b"%d\n" % len(rows))
        line = await asyncio.wait_for(clients.stdout.readline(), LIMIT_S)
        if line != b"done\n":
            sys.exit(f"the clients ended: {line!r}")
        await until(
            lambda: not (server.connections or server.calls or server.in_flight or scheduler.in_flight), "silence"
        )
        rows.append(measure())
    clients.stdin.close()
    await clients.wait()
    await server.stop(None)
    scheduler.close()
    for instance in instances:
        instance.join(LIMIT_S)
    return rows


def judge(rows: list[dict[str, int]]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """The first third after the warm-up beside the last third, by medians; and what is wrong with that."""
    rows = rows[WARM_UP_ROUNDS:]
    third = max(1, len(rows) // 3)
    figures: dict[str, dict[str, float]] = {}
    for key in rows[0]:
        before, after = (statistics.median(row[key] for row in part) for part in (rows[:third], rows[-third:]))
        figures[key] = {"before": before, "after": after}
    most = {"resident_kib": MOST_KIB, "objects": MOST_OBJECTS, "descriptors": 0, "threads": 0}
    wrong = [
        f"{key}: {row['before']} -> {row['after']} over {len(rows) - third} rounds"
        for key, row in figures.items()
        if row["after"] - row["before"] > most[key]
    ]
    return figures, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    rows = asyncio.run(run(given.seconds))
    figures, wrong = judge(rows)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    results = {"date": today, "rounds": len(rows), "seconds": given.seconds, "figures": figures}
    print(json.dumps(results, indent=1))
    if given.results:
        given.results.write_text(json.dumps(results, indent=1) + "\n")
    if wrong:
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
