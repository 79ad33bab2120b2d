"""What I/O threads are for, and where planes meet: a busy interpreter, a stuck loop, changing tables, many clients."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import pytest
from hand_driven import HandDriven, make_spec, message, values_of
from hyperframe.frame import DataFrame, PingFrame, RstStreamFrame

from aiorch_server._core import Batch, Router, Scheduler
from aiorch_server.frontends.grpc import FAST_PATH, ConnectionLimits
from aiorch_server.frontends.grpc.address import bind_sockets

from .conftest import SERVICE, TIMEOUT_S, Door, wait_until
from .test_door_attacks import Attacker, headers
from .test_door_attacks import message as frame_of

THREADS = ["native-asyncio-1", "native-uvloop-2"]


class Instance:
    """An instance of the echo model on a thread of its own, at full speed, until its scheduler is closed."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(make_spec())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        batch = Batch(self.scheduler)
        while self.scheduler.take(batch):
            batch.settle({"Y": batch.gather()["X"] * 2})

    def stop(self) -> None:
        self.scheduler.close()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()


@pytest.fixture
def instance() -> Iterator[Instance]:
    running = Instance()
    yield running
    running.stop()


def route_to(scheduler: Scheduler) -> Router:
    router = Router()
    router.publish({"echo": (3, {3: scheduler})})
    return router


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that other tests' fixtures keep running have threads too."""
    monkeypatch.setattr(f"{__name__}.OTHERS", set(threading.enumerate()))


OTHERS: set[threading.Thread] = set()


def list_threads() -> list[str]:
    own = (thread for thread in threading.enumerate() if thread not in OTHERS)
    return [thread.name for thread in own if thread.name.startswith("aiorch-io")]


# ----------------------------------------------------------------------------------------------- early ends first
@pytest.mark.parametrize("kind", THREADS)
def test_stop_in_the_middle_of_everything(make_door: Callable[..., Door], kind: str) -> None:
    """Calls of both planes from many connections, answered, queued, running and waiting, when the door closes."""
    scheduler = Scheduler(make_spec())
    hand_driven = HandDriven(scheduler)
    door = make_door(kind, router=route_to(scheduler))
    assert list_threads() == [f"aiorch-io-{index}" for index in range(int(kind[-1]))]
    channels = [door.channel() for _ in range(8)]
    fast = [channel.unary_unary(FAST_PATH).future(message(i), timeout=TIMEOUT_S) for i, channel in enumerate(channels)]
    slow = [door.call("Wait", channel).future(b"x", timeout=TIMEOUT_S) for channel in channels]
    chats = [door.call("WaitChat", channel)(iter([b"x"]), timeout=TIMEOUT_S) for channel in channels]
    assert [next(chat) for chat in chats] == [b"x"] * 8
    wait_until(lambda: door.servicer.count("started") == 16, "the servicers")
    wait_until(lambda: door.server.in_flight == 8, "the queue")
    door.stop(0.05).result(TIMEOUT_S)
    for call in (*fast, *slow, *chats):
        with pytest.raises(grpc.RpcError) as caught:
            call.result()
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert "Cancelling all calls" in caught.value.details()
    assert door.servicer.count("cancelled") == 16
    assert list_threads() == []
    hand_driven.go(100)
    wait_until(lambda: door.server.in_flight == 0, "the requests that ran")
    hand_driven.stop()


EXIT = """
import asyncio, sys, threading
import grpc
from aiorch_server.frontends.grpc import NativeGrpcServer

async def main():
    server = NativeGrpcServer(io_threads=2)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            await channel.unary_unary("/a/b")(b"", timeout=20)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED, error
        if sys.argv[1] == "stop":
            await server.stop(None)

asyncio.run(main())
print(sum(thread.name.startswith("aiorch-io") for thread in threading.enumerate()))
"""


@pytest.mark.parametrize("how", ["stop", "forget"])
def test_the_process_ends(how: str) -> None:
    """Also where nobody stops the server: its threads hold up nothing."""
    done = subprocess.run([sys.executable, "-c", EXIT, how], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("0\n" if how == "stop" else "2\n")


@pytest.mark.parametrize("kind", THREADS)
def test_calls_given_up_faster_than_the_loop_hears_of_them(make_door: Callable[..., Door], kind: str) -> None:
    """The loop is stuck; what it has not heard of yet is bounded: the connection is not read any more."""
    door = make_door(kind, limits=ConnectionLimits(max_buffered_bytes=1 << 20))
    data = frame_of(bytes(60_000))  # within the window that every stream begins with
    held = 0
    with Attacker(door) as attacker:
        attacker.socket.settimeout(3.0)
        with door.stuck_loop(), suppress(TimeoutError):
            for held in range(64):
                stream_id = 2 * held + 1
                attacker.send(headers(stream_id, f"/{SERVICE}/Wait", "END_HEADERS"))
                for at in range(0, len(data), 16384):
                    attacker.send(DataFrame(stream_id, data[at : at + 16384]).serialize())
                # its answer says that the message was taken, so the reset comes too late to forget it
                attacker.send(PingFrame(0, held.to_bytes(8, "big")).serialize())
                attacker.read_until(
                    lambda frames, held=held: sum(isinstance(frame, PingFrame) for frame in frames) > held  # type: ignore[misc]
                )
                attacker.send(RstStreamFrame(stream_id, 8).serialize())
        # the read that brings the last reset may bring the whole next call with it
        assert 16 <= held <= 19, "reading was not stopped, or too early"
        attacker.socket.settimeout(TIMEOUT_S)
        attacker.read_until(lambda frames: sum(isinstance(frame, PingFrame) for frame in frames) > held)
        wait_until(lambda: door.server.calls <= 1, "the end of the calls given up")
        door.check_next_call()


# ------------------------------------------------------------------------------------------------ tables that change
@pytest.mark.parametrize("kind", THREADS)
def test_models_unloaded_while_calls_run(make_door: Callable[..., Door], kind: str) -> None:
    """Each call is answered, by the version it met, or refused; none is lost, whatever the table says meanwhile."""
    router = Router()
    door = make_door(kind, router=router)
    instances = [Instance()]
    router.publish({"echo": (3, {3: instances[0].scheduler})})
    is_over = threading.Event()
    answered, refused = [0] * 8, [0] * 8

    def ask(client: int) -> None:
        infer = door.channel().unary_unary(FAST_PATH)
        while not is_over.is_set():
            values = [client * 1000 + index for index in range(16)]
            calls = [infer.future(message(value), timeout=TIMEOUT_S) for value in values]
            for value, call in zip(values, calls, strict=True):
                try:
                    assert values_of(call.result()) == [2.0 * value]
                    answered[client] += 1
                except grpc.RpcError as error:
                    assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED), error
                    refused[client] += 1

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask, client) for client in range(8)]
        try:
            for round_ in range(60):
                old, new = instances[-1], Instance()
                instances.append(new)
                if round_ % 3 == 0:
                    old.scheduler.close()  # before the table knows: what meets it now is refused
                    time.sleep(0.003)
                if round_ % 5 == 0:
                    router.publish({})
                router.publish({"echo": (3, {3: new.scheduler}), f"other-{round_}": (0, {})})
                old.stop()
                assert old.scheduler.wait_idle(TIMEOUT_S)
                instances.remove(old)
                del old
                time.sleep(0.005)
        finally:
            is_over.set()
        for future in running:
            future.result(TIMEOUT_S)
    wait_until(lambda: door.server.in_flight == 0)
    assert min(answered) > 0 and sum(refused) < sum(answered)
    instances[0].stop()


# --------------------------------------------------------------------------------------------------- what they are for
@pytest.mark.parametrize("kind", THREADS)
def test_a_stuck_loop_stops_slow_calls_only(make_door: Callable[..., Door], kind: str, instance: Instance) -> None:
    door = make_door(kind, router=route_to(instance.scheduler))
    channel = door.channel()
    door.check_next_call(channel)
    with door.stuck_loop():
        slow = door.call("Echo", channel).future(b"x", timeout=TIMEOUT_S)
        infer = channel.unary_unary(FAST_PATH)
        for value in range(200):
            assert values_of(infer(message(value), timeout=TIMEOUT_S)) == [2.0 * value]
        assert not slow.done()
        expired = door.call("Echo", channel).future(b"x", timeout=0.2)
        with pytest.raises(grpc.RpcError) as caught:
            expired.result()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert slow.result() == b"x"


#: Asks, eight calls at a time, until its input ends; then tells when each answer came, by the machine's clock.
ASKING = """
import asyncio, sys, time
import grpc

async def main(target, method, body):
    times = []
    is_over = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    async with grpc.aio.insecure_channel(target) as channel:
        infer = channel.unary_unary(method)

        async def ask_on():
            while not is_over.done():
                try:
                    await infer(body, timeout=60)
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.UNAVAILABLE and "queue size" in error.details(), error
                times.append(time.monotonic())
                if len(times) == 100:
                    print("under way", flush=True)

        await asyncio.gather(*[ask_on() for _ in range(8)])
    print(*times, sep="\\n")

asyncio.run(main(sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3])))
"""


def count_answers_without_interpreter(door: Door) -> int:
    """How many answers another process gets while one thread of this one keeps the interpreter for half a second."""
    arguments = [sys.executable, "-c", ASKING, door.target, FAST_PATH, message(1).hex()]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "under way\n"
        hold = ctypes.PyDLL(None).usleep  # called without giving the interpreter away
        interval = sys.getswitchinterval()
        sys.setswitchinterval(60)  # nobody takes it in between
        try:
            begun = time.monotonic()
            hold(500_000)
            ended = time.monotonic()
        finally:
            sys.setswitchinterval(interval)
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    return sum(begun < float(line) < ended for line in output.split())


@pytest.mark.alone
def test_a_held_interpreter(make_door: Callable[..., Door]) -> None:
    """The loop waits for the interpreter at each of its steps; an I/O thread never."""
    full = Scheduler(make_spec(), max_queue_size=1)  # nobody takes from it: refused at the door, without Python
    doors = {threads: make_door(f"native-asyncio-{threads}", router=route_to(full)) for threads in (0, 1)}
    first = doors[1].channel().unary_unary(FAST_PATH).future(message(1), timeout=600)
    wait_until(lambda: full.pending == 1)
    answers = {threads: count_answers_without_interpreter(door) for threads, door in doors.items()}
    first.cancel()
    assert answers[0] <= 24, "of the turns that were under way"
    assert answers[1] > 50


# --------------------------------------------------------------------------------------------------------- many clients
def test_many_connections_on_two_threads(make_door: Callable[..., Door], instance: Instance) -> None:
    door = make_door("native-uvloop-2", router=route_to(instance.scheduler))
    channels = [door.channel() for _ in range(100)]
    for index, channel in enumerate(channels):
        assert values_of(channel.unary_unary(FAST_PATH)(message(index), timeout=TIMEOUT_S)) == [2.0 * index]
        assert door.call("Echo", channel)(b"%d" % index, timeout=TIMEOUT_S) == b"%d" % index
    wait_until(lambda: door.server.connections == 100)
    shares = [driver.connections for driver in door.server._drivers]
    assert len(shares) == 2 and min(shares) > 10, shares

    def ask(index: int) -> None:
        infer = channels[index % 100].unary_unary(FAST_PATH)
        calls = [infer.future(message(index * 100 + n), timeout=TIMEOUT_S) for n in range(10)]
        assert [values_of(call.result()) for call in calls] == [[2.0 * (index * 100 + n)] for n in range(10)]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(300)))
    for channel in channels:
        channel.close()
    wait_until(lambda: door.server.connections == 0)


def test_one_port_for_many_threads() -> None:
    sockets, port = bind_sockets("127.0.0.1:0", 3)
    try:
        assert len(sockets) == 3
        assert {bound.getsockname() for bound in sockets} == {("127.0.0.1", port)}
        with pytest.raises(RuntimeError, match="Failed to bind"):
            bind_sockets(f"127.0.0.1:{port}", 3)
        with pytest.raises(RuntimeError, match="Failed to bind"):
            bind_sockets(f"127.0.0.1:{port}")
    finally:
        for bound in sockets:
            bound.close()


def test_plain_and_tls_ports_of_one_server(
    make_door: Callable[..., Door], credentials: Any, certificates: Callable[[str], bytes], instance: Instance
) -> None:
    """The threads serve both, and both end together."""
    ports: list[int] = []

    def register(server: Any) -> None:
        ports.append(server.add_secure_port("localhost:0", credentials))

    door = make_door("native-asyncio-1", router=route_to(instance.scheduler), register=register)
    secure = grpc.secure_channel(f"localhost:{ports[0]}", grpc.ssl_channel_credentials(certificates("ca.crt")))
    with secure:
        for channel in (door.channel(), secure):
            assert values_of(channel.unary_unary(FAST_PATH)(message(4), timeout=TIMEOUT_S)) == [8.0]
            door.check_next_call(channel)
        assert door.server.connections == 2
        door.stop(TIMEOUT_S).result(TIMEOUT_S)
    for port in (door.port, ports[0]):
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("localhost", port), TIMEOUT_S):
            pass


async def test_wrong_numbers_of_threads() -> None:
    from aiorch_server.frontends.grpc import NativeGrpcServer

    with pytest.raises(ValueError, match="io_threads is -1"):
        NativeGrpcServer(io_threads=-1)
    server = NativeGrpcServer(io_threads=0)
    await server.start()
    assert list_threads() == []
    await asyncio.wait_for(server.stop(None), TIMEOUT_S)
