"""Runs the gRPC session and its driver in circles in a fresh interpreter; fails when memory grows with the rounds.

Usage: sessions.py CASE. See core.py for how memory is measured.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import h2.config
import h2.connection
from hand_driven import make_spec, message

from aiorch_server._core import Batch, IoThread, NativeServer, Passes, Quota, Router, Scheduler

SessionProbe: Any = importlib.import_module("aiorch_server._core.h2_probe").SessionProbe
FIELDS = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), ("content-type", "application/grpc")]
CALL = 1


def frame(content: bytes) -> bytes:
    return b"\0" + len(content).to_bytes(4, "big") + content


def resident_kib() -> int:
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise RuntimeError("no RssAnon in /proc/self/status")


class _MallInfo(ctypes.Structure):
    _fields_: ClassVar = [(f"_{index}", ctypes.c_size_t) for index in range(7)] + [
        (name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")
    ]


def allocated_kib() -> int:
    """What malloc has given out: no page more or less, wherever in the heap it lies."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallInfo
    return int(mallinfo2().uordblks) // 1024


def make_client() -> h2.connection.H2Connection:
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    return client


def session() -> None:
    """Streams that are answered, failed, finished, reset, expired and lost, in each state."""
    server, client = SessionProbe(), make_client()
    head = [*FIELDS[:3], (":path", "/fast/Call"), FIELDS[3], ("long", "x" * 400), ("grpc-timeout", "5S")]
    slow = [*FIELDS[:3], (":path", "/slow/Call"), FIELDS[3], ("long", "x" * 400), ("grpc-timeout", "5S")]
    for stream_id in range(1, 61, 2):
        client.send_headers(stream_id, head if stream_id % 3 else slow)
        client.send_data(stream_id, frame(b"x" * 300) + frame(b"y")[: stream_id % 4], end_stream=stream_id % 5 > 0)
    server.feed(client.data_to_send())
    for index, (stream_id, bits) in enumerate(server.take_events()):
        if bits & CALL and index % 3:
            server.take_message(stream_id)
            server.send_head(stream_id, [(b"a", b"b")])
            server.send_message(stream_id, bytes(100_000))
            server.send_message(stream_id, b"more")
            if index % 3 == 1:
                server.finish(stream_id, 3, b"text " * 50, [(b"t", b"u")] * 30)
    for index, (stream_id, _, _) in enumerate(server.take_ready()):
        if index % 3 == 0:
            server.answer(stream_id, bytes(70_000))
        elif index % 3 == 1:
            server.fail(stream_id, 13, b"\xff" * 100)
    server.collect()
    client.reset_stream(7)
    client.reset_stream(9)
    server.feed(client.data_to_send())
    server.expire(10**10)
    server.collect()
    server.take_events()
    if len(client.streams) % 2:
        server.close()  # otherwise the streams are ended with the object


def driver() -> None:
    """A server on a loop: connections that come, call both planes, and go in the middle of it."""
    drive(is_threaded=False)


def thread() -> None:
    """The same on an I/O thread."""
    drive(is_threaded=True)


def asking() -> None:
    """An I/O thread that asks for passes; calls have one, or had one, or never had."""
    drive(is_threaded=True, is_asking=True)


def allow(passes: Passes, token: str, quota: Quota) -> None:
    expires_ns = time.monotonic_ns() + 10**12
    assert passes.add(token.encode(), "echo", expires_ns=expires_ns, generation=passes.generation, quota=quota)


def drive(*, is_threaded: bool, is_asking: bool = False) -> None:
    passes, quota = Passes() if is_asking else None, Quota("tenant", max_in_flight=4)
    tokens = [f"{index}" + "x" * 1200 for index in range(3)]
    scheduler = Scheduler(make_spec())
    router = Router()
    router.publish({"echo": (3, {3: scheduler})})

    def run() -> None:
        batch = Batch(scheduler)
        while scheduler.take(batch):
            batch.settle({"Y": batch.gather()["X"]})

    instance = threading.Thread(target=run)
    instance.start()

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        calls: list[Any] = []

        def on_call(call: Any) -> None:
            calls.append(call)
            call.take_message()
            call.send_message(b"answer")
            if len(calls) % 2:
                call.finish(0, "", [(b"k", b"v")])

        native: Any
        if is_threaded:
            native = IoThread(loop, on_call, router, fast_path="/fast", passes=passes)
            listening = socket.create_server(("127.0.0.1", 0))
            native.listen(listening.fileno())
            native.start()
            port = listening.getsockname()[1]
        else:
            native = NativeServer(loop, on_call, router, fast_path="/fast")
            listener = await loop.create_server(native.make_protocol, "127.0.0.1", 0)
            port = listener.sockets[0].getsockname()[1]
        for turn in range(6):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            client = make_client()
            if passes is not None:
                client.encoder.encode = partial(client.encoder.encode, huffman=False)  # type: ignore[method-assign]
                allow(passes, tokens[turn % 2], quota)
            for stream_id in range(1, 21, 2):
                path = "/slow" if stream_id % 4 == 1 else "/fast"
                head = [*FIELDS[:3], (":path", path), FIELDS[3], ("grpc-timeout", "5S")]
                if is_asking:
                    head.append(("authorization", tokens[stream_id % 5 % 3]))
                client.send_headers(stream_id, head)
                client.send_data(stream_id, frame(message(stream_id) if stream_id % 3 else b"odd"), end_stream=True)
            writer.write(client.data_to_send())
            for _ in range(turn):
                await reader.read(100)
            if passes is not None and turn == 4:
                passes.clear()
            writer.transport.abort()
        (listening if is_threaded else listener).close()
        native.drain()
        native.cancel_calls(14, "bye")
        native.abort_connections()
        await native.wait_disconnected()
        native.close()
        while native.in_flight:
            await asyncio.sleep(0.001)

    asyncio.run(serve())
    scheduler.close()
    instance.join()
    assert quota.counters().in_flight == 0
    assert (quota.counters().admitted > 0) == is_asking


#: Rounds, and how many KiB may stay: a driver has buffers of 512 KiB, whose places in the heap vary. Losing one record
#: per stream would come to 9 MiB.
CASES: dict[str, tuple[Callable[[], None], int, int]] = {"session": (session, 200, 512), "driver": (driver, 200, 3072)}
CASES |= {"thread": (thread, 200, 3072), "asking": (asking, 100, 64)}


def main() -> None:
    case, rounds, tolerance_kib = CASES[sys.argv[1]]
    for _ in range(rounds // 2):
        case()
    measure = allocated_kib if case is asking else resident_kib
    before = measure()
    for _ in range(rounds):
        case()
    grown = measure() - before
    if grown > tolerance_kib:
        sys.exit(f"{sys.argv[1]}: {grown} KiB more after {rounds} rounds")


main()
