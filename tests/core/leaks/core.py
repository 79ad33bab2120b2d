"""Runs each compiled module in circles in a fresh interpreter; fails when memory grows with the number of rounds.

Usage: core.py CASE. Memory is measured as the process's anonymous resident set after a warm-up, because C memory
does not show in Python's own counters.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import contextlib

from hand_driven import make_spec, message

from aiorch_server._core import (
    Batch,
    BatchFormer,
    Histogram,
    Mailbox,
    Router,
    Scheduler,
    Shares,
    decode_response,
    detach,
    encode_parameters,
    encode_request,
    scan,
)
from aiorch_server.errors import ModelExecutionError


def resident_kib() -> int:
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise RuntimeError("no RssAnon in /proc/self/status")


def wire() -> None:
    data = message(*range(200))
    for _ in range(50):
        scan(data)
        encode_request("m", "", "id", [("X", "FP32", (1, 4), bytes(16))])
        with contextlib.suppress(ValueError):
            scan(data[:-1])
        with contextlib.suppress(ValueError):
            decode_response(b"\x0a\x05a")


def former() -> None:
    queue = BatchFormer(4, n_key=2)
    tickets = [queue.push(now, shape=(now % 7, 1), expires_ns=now + 5) for now in range(300)]
    for ticket in tickets[::3]:
        queue.cancel(ticket)
    queue.expire(100)
    for now in range(100, 150):
        queue.form(now)


def histogram() -> None:
    one, two = Histogram(), Histogram()
    one.record(5)
    two.merge(one)
    two.buckets()


def scheduler() -> None:
    """Answered, cancelled at each place, refused, expired, failed, forgotten and abandoned requests."""

    async def rounds() -> None:
        mailbox = Mailbox(asyncio.get_running_loop())
        served = Scheduler(make_spec(), max_queue_size=40)
        futures = [mailbox.submit(served, message(index), deadline_ns=index % 5 == 0) for index in range(40)]
        with contextlib.suppress(Exception):
            mailbox.submit(served, message(1))
        for future in futures[::7]:
            future.cancel()
        await asyncio.sleep(0)
        batch = Batch(served)
        for turn in range(3):
            served.take(batch)
            if turn == 0:
                batch.settle({"Y": batch.gather()["X"]})
            elif turn == 1:
                batch.fail(13, "no")
        futures[39].cancel()
        served.abandon(14, "gone")
        del batch
        await asyncio.gather(*futures, return_exceptions=True)
        mailbox.close()

    asyncio.run(rounds())


def members() -> None:
    """Requests out of their batch: answered with fields of their own, ended, failed, refused, cancelled and dropped."""

    async def rounds() -> None:
        mailbox = Mailbox(asyncio.get_running_loop())
        served = Scheduler(make_spec())
        futures = [mailbox.submit(served, message(index), attachment=object()) for index in range(40)]
        batch = Batch(served)
        for _ in range(5):
            served.take(batch)
            one, two, three, four, five, *_ = detach(batch)
            one.settle({"Y": one.gather()["X"]}, encode_parameters({"place": 1, "name": "x" * 100}))
            two.finish()
            with contextlib.suppress(ModelExecutionError):
                three.settle({"Y": b"?"})
            three.fail(3, "no")
            futures[futures.index(next(each for each in futures if not each.done()))].cancel()
            four.gather()
            with contextlib.suppress(RuntimeError):
                one.fail(3, "again")
            del one, two, three, four, five, _
            await asyncio.sleep(0)
        await asyncio.gather(*futures, return_exceptions=True)
        mailbox.close()

    asyncio.run(rounds())


def contents() -> None:
    """Tensors outside of the message: answered as the next request's, cancelled, refused, wrong and forgotten."""

    async def rounds() -> None:
        mailbox = Mailbox(asyncio.get_running_loop())
        served = Scheduler(make_spec(), max_queue_size=20)
        shape = (1, 20000)
        head = encode_request("echo", "", "", [("X", "FP32", shape, b"")])
        memory = bytearray(80000)
        futures = [mailbox.submit(served, head, [memory if index % 2 else bytes(80000)]) for index in range(20)]
        for wrong in ([memory], [b"short"], [memory, memory], [3]):
            with contextlib.suppress(Exception):
                mailbox.submit(served, head, wrong)
        for future in futures[::7]:
            future.cancel()
        await asyncio.sleep(0)
        batch = Batch(served)
        served.take(batch)
        batch.settle({"Y": batch.gather()["X"]})
        _, _, _, ((*_, answer),) = decode_response(await futures[1])
        following = mailbox.submit(served, head, [answer])
        served.take(batch)
        batch.settle({"Y": batch.gather()["X"]})
        following.cancel()
        served.abandon(14, "gone")
        del batch
        await asyncio.gather(*futures, following, return_exceptions=True)
        mailbox.close()

    asyncio.run(rounds())


def routes() -> None:
    router = Router()
    shares: Shares | None = None
    for turn in range(5):
        shares = Shares([(1, 9), (2, turn)], is_sticky=turn % 2 > 0, sampled=turn, after=shares)
        shares.choose(b"key")
        with contextlib.suppress(ValueError):
            Shares([(1, 0)], after=shares)
        versions = {1: Scheduler(make_spec()), 2: Scheduler(make_spec())}
        router.publish({"m": (1, versions, shares), "n": (1, versions, shares), "o": (0, versions, None)})
        with contextlib.suppress(ValueError):
            router.publish({"m": (1, versions, shares), "n": (1, {1: versions[1]}, Shares([(1, 1), (3, 1)]))})
    for count in (0, 1, 20):
        router.publish({f"m{i}": (1, {1: Scheduler(make_spec()), 2: Scheduler(make_spec())}) for i in range(count)})
    with contextlib.suppress(ValueError):
        router.publish({"m": (3, {1: Scheduler(make_spec())})})


def threads() -> None:
    served = Scheduler(make_spec())

    def run() -> None:
        batch = Batch(served)
        while served.take(batch):
            batch.settle({"Y": batch.gather()["X"]})

    instances = [threading.Thread(target=run) for _ in range(2)]
    for instance in instances:
        instance.start()

    async def ask() -> None:
        mailbox = Mailbox(asyncio.get_running_loop())
        await asyncio.gather(*(mailbox.submit(served, message(index)) for index in range(50)))
        mailbox.close()

    asyncio.run(ask())
    served.close()
    for instance in instances:
        instance.join()


CASES: dict[str, tuple[Callable[[], None], int]] = {
    "wire": (wire, 400),
    "former": (former, 600),
    "histogram": (histogram, 4000),
    "scheduler": (scheduler, 300),
    "contents": (contents, 200),
    "members": (members, 200),
    "routes": (routes, 600),
    "threads": (threads, 200),
}


def main() -> None:
    case, rounds = CASES[sys.argv[1]]
    for _ in range(rounds // 4):
        case()
    before = resident_kib()
    for _ in range(rounds):
        case()
    grown = resident_kib() - before
    # a tenth of a KiB per round would be 100 bytes lost each time
    if grown > 256 + rounds * 0.1:
        sys.exit(f"{sys.argv[1]}: {grown} KiB more after {rounds} rounds")


main()
