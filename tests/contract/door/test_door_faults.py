"""Faults around I/O threads: descriptors held elsewhere, no memory, no threads, loops that are stuck or gone."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvloop
from hand_driven import HandDriven, make_spec, message, values_of
from hyperframe.frame import DataFrame, PingFrame, SettingsFrame, WindowUpdateFrame

from aiorch_server._core import Router, Scheduler
from aiorch_server.frontends.grpc import FAST_PATH, ConnectionLimits, NativeGrpcServer

from .conftest import SERVICE, TIMEOUT_S, Door, wait_until
from .test_door_attacks import PREFACE, Attacker, headers
from .test_door_attacks import message as frame_of

THREADS = ["native-asyncio-1", "native-uvloop-2"]


def find_other_end(client: socket.socket) -> int:
    """A second descriptor of the server's side of this connection, as a forked child would hold one."""
    for entry in sorted(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):
            if entry.is_socket():
                with socket.socket(fileno=os.dup(int(entry.name))) as end:
                    if end.getpeername() == client.getsockname():
                        return end.detach()
    raise AssertionError("the server's end is not to be found")


def watched_inodes() -> set[int]:
    """What this process's epoll descriptors watch; see proc(5)."""
    found: set[int] = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if "[eventpoll]" in str(entry.readlink()):
                lines = Path("/proc/self/fdinfo", entry.name).read_text()
                found |= {int(inode, 16) for inode in re.findall(r"^tfd:.* ino:\s*([0-9a-f]+)", lines, re.MULTILINE)}
    assert found, "an epoll descriptor does not say what it watches"
    return found


@pytest.mark.parametrize("kind", THREADS)
def test_a_socket_that_a_child_holds_too(make_door: Callable[..., Door], kind: str) -> None:
    """Closing a descriptor ends epoll's watch only where no other one is left: it must not tell of what is freed."""
    door = make_door(kind)
    held = []
    try:
        for _ in range(8):
            with Attacker(door) as attacker:
                attacker.read_until(lambda frames: any(isinstance(frame, SettingsFrame) for frame in frames))
                held.append(find_other_end(attacker.socket))
        wait_until(lambda: door.server.connections == 0, "the end of the connections")
        assert watched_inodes().isdisjoint(os.fstat(descriptor).st_ino for descriptor in held)
        door.check_next_call()
    finally:
        for descriptor in held:
            os.close(descriptor)


@pytest.mark.parametrize("kind", THREADS)
def test_the_end_of_a_connection_that_a_child_holds_too(make_door: Callable[..., Door], kind: str) -> None:
    """The client hears of it at once, not when the child ends."""
    door = make_door(kind)
    with Attacker(door) as attacker:
        attacker.read_until(lambda frames: any(isinstance(frame, SettingsFrame) for frame in frames))
        held = find_other_end(attacker.socket)
        try:
            attacker.send(b"\0\0\x01\x04\0\0\0\0\0\0")  # SETTINGS of a wrong size
            attacker.read_to_end()
        finally:
            os.close(held)
        door.check_next_call()


async def test_a_thread_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server says so, stops when it is asked to, and its port is free again."""
    begin = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "aiorch-io-1":
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    server = NativeGrpcServer(io_threads=2)
    port = server.add_insecure_port("127.0.0.1:0")
    with pytest.raises(RuntimeError, match="can't start new thread"):
        await server.start()
    await asyncio.wait_for(server.stop(0), TIMEOUT_S)
    assert server.connections == 0
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), TIMEOUT_S):
        pass


#: A server whose address space is nearly full once it is asked for the second time.
NO_MEMORY = """
import asyncio, resource, sys
import grpc
from aiorch_server.frontends.grpc import NativeGrpcServer

LARGE_BYTES = 60 << 20

def limit():
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LARGE_BYTES * 3 // 2, resource.RLIM_INFINITY))

async def echo(request, context):
    return request[:5]

async def cut(request, context):
    limit()
    return request[:5]

async def main():
    server = NativeGrpcServer(io_threads=int(sys.argv[1]))
    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo), "Cut": grpc.unary_unary_rpc_method_handler(cut)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a", handlers),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)

asyncio.run(main())
"""


@pytest.mark.parametrize("threads", [0, 1])
def test_a_message_that_the_interpreter_has_no_memory_for(threads: int) -> None:
    """The call ends at once, and the next one is right."""
    environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=0"}
    server = subprocess.Popen(
        [sys.executable, "-c", NO_MEMORY, str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    with server:
        assert server.stdin is not None and server.stdout is not None
        target = f"127.0.0.1:{int(server.stdout.readline())}"
        with grpc.insecure_channel(target, [("grpc.max_send_message_length", -1)]) as channel:
            echo = channel.unary_unary("/a/Echo")
            assert channel.unary_unary("/a/Cut")(b"first", timeout=TIMEOUT_S) == b"first"
            with pytest.raises(grpc.RpcError) as caught:
                echo(bytes(60 << 20), timeout=TIMEOUT_S)
            assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNKNOWN), caught.value
            assert echo(b"again and again", timeout=TIMEOUT_S) == b"again"
        server.stdin.close()
        assert server.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize("kind", THREADS)
def test_connections_given_up_faster_than_the_loop_hears_of_them(make_door: Callable[..., Door], kind: str) -> None:
    """The loop is stuck; what it has not heard of yet is bounded also where each call comes on its own connection."""
    door = make_door(kind, limits=ConnectionLimits(max_buffered_bytes=1 << 20))
    data = frame_of(bytes(60_000))
    taken = 0
    with door.stuck_loop(), suppress(TimeoutError):
        while taken < 64:
            with Attacker(door) as attacker:
                attacker.socket.settimeout(0.7)
                attacker.send(headers(1, f"/{SERVICE}/Wait", "END_HEADERS"))
                for at in range(0, len(data), 16384):
                    attacker.send(DataFrame(1, data[at : at + 16384]).serialize())
                attacker.send(PingFrame(0, bytes(8)).serialize())
                attacker.read_until(lambda frames: any(isinstance(frame, PingFrame) for frame in frames))
            taken += 1
    threads = int(kind[-1])
    assert 16 <= taken <= 20 * threads, "new clients were let in too long, or too short"
    door.check_next_call()
    wait_until(lambda: door.server.calls == 0, "the end of the calls given up")


@pytest.mark.parametrize("kind", ["native-asyncio-0", *THREADS])
def test_a_closed_scheduler_is_no_reason_to_refuse(make_door: Callable[..., Door], kind: str) -> None:
    """A round may hold the table of a moment ago: Python, which knows the version loaded since, decides."""
    former, scheduler = Scheduler(make_spec()), Scheduler(make_spec())
    hand_driven = HandDriven(scheduler)
    hand_driven.go(100)
    router = Router()
    router.publish({"echo": (3, {3: former})})

    async def infer(request: bytes, context: Any) -> bytes:
        return b"Python's answer"

    def register(server: NativeGrpcServer) -> None:
        service, _, method = FAST_PATH.removeprefix("/").rpartition("/")
        server.add_registered_method_handlers(service, {method: grpc.unary_unary_rpc_method_handler(infer)})

    door = make_door(kind, router=router, register=register)
    ask = door.channel().unary_unary(FAST_PATH)
    former.close()
    assert ask(message(1), timeout=TIMEOUT_S) == b"Python's answer"
    router.publish({"echo": (3, {3: scheduler})})
    assert values_of(ask(message(1), timeout=TIMEOUT_S)) == [2.0]
    assert former.counters().fail.count == 0
    hand_driven.stop()


def count_event_descriptors() -> int:
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found += "eventfd" in str(entry.readlink())
    return found


@pytest.fixture
def spare_loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    loop = uvloop.new_event_loop() if "uvloop" in request.param else asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.mark.parametrize(
    ("spare_loop", "threads"), [("asyncio", 0), ("asyncio", 1), ("uvloop", 1)], indirect=["spare_loop"]
)
def test_answers_that_nobody_waits_for_any_more(spare_loop: asyncio.AbstractEventLoop, threads: int) -> None:
    """The loop is closed while a batch runs: what comes later is freed, with the descriptors."""
    gc.collect()
    before = count_event_descriptors()
    scheduler = Scheduler(make_spec())
    hand_driven = HandDriven(scheduler)
    router = Router()
    router.publish({"echo": (3, {3: scheduler})})

    async def serve() -> None:
        server = NativeGrpcServer(router=router, io_threads=threads)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(FAST_PATH)(message(1), timeout=TIMEOUT_S)
            await asyncio.gather(hand_driven.until_taken(), asyncio.sleep(0))
            stopping = asyncio.create_task(server.stop(0))
            with pytest.raises(grpc.aio.AioRpcError):
                await call
            await stopping
        assert server.in_flight == 1

    spare_loop.run_until_complete(serve())
    spare_loop.run_until_complete(spare_loop.shutdown_default_executor())
    spare_loop.close()
    gc.collect()
    hand_driven.go(100)
    assert scheduler.wait_idle(TIMEOUT_S)
    hand_driven.stop()
    wait_until(lambda: gc.collect() >= 0 and count_event_descriptors() <= before, "the end of the descriptors")


@pytest.mark.parametrize("kind", ["native-asyncio-0", *THREADS])
def test_a_socket_that_is_full_at_any_moment(make_door: Callable[..., Door], kind: str) -> None:
    """Whatever was written last, wherever the socket was full: a client that takes nothing is closed in time.

    Also between two turns of a connection that has much to say, hence answers of many sizes.
    """
    door = make_door(kind, limits=ConnectionLimits(write_timeout_s=0.5))
    settings = SettingsFrame(0, {SettingsFrame.INITIAL_WINDOW_SIZE: 2**31 - 1}).serialize()
    greeting = PREFACE + settings + WindowUpdateFrame(0, 2**31 - 65536).serialize()
    with ExitStack() as attackers:
        for index in range(12):
            attacker = attackers.enter_context(Attacker(door, greeting))
            first = headers(1, f"/{SERVICE}/Count", "END_HEADERS")
            attacker.send(first + DataFrame(1, frame_of(b"%d" % (index * 8000)), flags=["END_STREAM"]).serialize())
            second = headers(3, f"/{SERVICE}/Flood", "END_HEADERS")
            attacker.send(second + DataFrame(3, frame_of(b"100"), flags=["END_STREAM"]).serialize())
            assert select.select([attacker.socket], [], [], TIMEOUT_S)[0]
        wait_until(lambda: door.servicer.count("written") > 0, "the answers")
        wait_until(lambda: door.server.connections == 0, "the end of the connections")
        wait_until(lambda: door.server.calls == 0, "the end of the calls")
        door.check_next_call()
