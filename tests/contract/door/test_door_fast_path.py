"""ModelInfer on the short path: real router, scheduler and instance; each ending at each doorway, then many clients."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from hand_driven import HandDriven, make_spec, message, values_of

from aiorch_server._core import Batch, Router, Scheduler, decode_response, encode_request
from aiorch_server.frontends.grpc import FAST_PATH

from .conftest import NATIVE, NATIVE_AND_TWO_THREADS, TIMEOUT_S, Door, wait_until


class FastDoor:
    """A native door with one model, its instance steered by the test; what is declined echoes its size."""

    def __init__(self, make_door: Callable[..., Door], kind: str, **options: Any) -> None:
        self.scheduler = Scheduler(make_spec(), **options)
        self.instance = HandDriven(self.scheduler)
        router = Router()
        router.publish({"echo": (3, {3: self.scheduler})})
        self.declined: list[Any] = []

        async def model_infer(request: bytes, context: Any) -> bytes:
            self.declined.append(dict(context.invocation_metadata()))
            return b"python: %d" % len(request)

        def register(server: Any) -> None:
            service, method = FAST_PATH[1:].split("/")
            handler = grpc.unary_unary_rpc_method_handler(model_infer)
            server.add_registered_method_handlers(service, {method: handler})

        self.door = make_door(kind, router=router, register=register)
        self.channel = self.door.channel(max_receive_message_length=-1, max_send_message_length=-1)
        self.infer = self.channel.unary_unary(FAST_PATH)

    def begin(self, value: float, **options: Any) -> Any:
        options.setdefault("timeout", TIMEOUT_S)
        return self.infer.future(message(value, id=str(value)), **options)

    def wait_taken(self, batches: int) -> None:
        wait_until(lambda: len(self.instance.sizes) >= batches, f"batch {batches}")

    def wait_in_flight(self, count: int) -> None:
        wait_until(lambda: self.door.server.in_flight == count, f"{count} requests in flight")

    def wait_pending(self, count: int) -> None:
        wait_until(lambda: self.scheduler.pending == count, f"{count} requests in the queue")

    def check_next_call(self) -> None:
        running = self.begin(21)
        self.instance.go(50)
        assert values_of(running.result()) == [42.0]
        self.wait_in_flight(0)
        # the answer leaves a moment before the instance is through with its batch
        wait_until(lambda: self.scheduler.in_flight == 0, "the end of the batch")


@pytest.fixture(params=NATIVE_AND_TWO_THREADS)
def fast(request: pytest.FixtureRequest, make_door: Callable[..., Door]) -> Iterator[FastDoor]:
    site = FastDoor(make_door, request.param)
    yield site
    site.instance.stop()


def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    code: grpc.StatusCode = caught.value.code()
    return code


# ---------------------------------------------------------------------------------------------- early ends first
@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_a_member_that_ends_while_queued(fast: FastDoor, end: str) -> None:
    running = fast.begin(1)
    fast.wait_taken(1)
    before, lost, after = fast.begin(2), fast.begin(3, timeout=0.3 if end == "expired" else TIMEOUT_S), fast.begin(4)
    fast.wait_pending(3)
    if end == "cancelled":
        lost.cancel()
    else:
        assert code_of(lost) is grpc.StatusCode.DEADLINE_EXCEEDED
    fast.wait_in_flight(3)
    fast.instance.go(50)
    assert [values_of(call.result()) for call in (running, before, after)] == [[2.0], [4.0], [8.0]]
    assert sum(fast.instance.sizes) == 3, "the member that ended was still run"
    fast.check_next_call()


@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_a_member_that_ends_while_running(fast: FastDoor, end: str) -> None:
    first = fast.begin(1)
    fast.wait_taken(1)
    before, lost, after = fast.begin(2), fast.begin(3, timeout=1.0 if end == "expired" else TIMEOUT_S), fast.begin(4)
    fast.wait_pending(3)
    fast.instance.go()
    fast.wait_taken(2)
    assert fast.instance.sizes == [1, 3]
    if end == "cancelled":
        lost.cancel()
        assert lost.code() is grpc.StatusCode.CANCELLED
    else:
        assert code_of(lost) is grpc.StatusCode.DEADLINE_EXCEEDED
    fast.instance.go(50)
    assert [values_of(call.result()) for call in (first, before, after)] == [[2.0], [4.0], [8.0]]
    fast.check_next_call()


CLIENT = """
import grpc, sys
channel = grpc.insecure_channel(sys.argv[1])
calls = [channel.unary_unary(sys.argv[2]).future(bytes.fromhex(sys.argv[3])) for _ in range(8)]
print("sent", flush=True)
[call.result() for call in calls]
"""


def test_the_client_is_killed_mid_batch(fast: FastDoor) -> None:
    running = fast.begin(1)
    fast.wait_taken(1)
    arguments = [fast.door.target, FAST_PATH, message(5).hex()]
    client = subprocess.Popen([sys.executable, "-c", CLIENT, *arguments], stdout=subprocess.PIPE)
    try:
        fast.wait_pending(8)
        fast.instance.go()  # some of them run now, together with a neighbour's
        neighbour = fast.begin(2)
        fast.wait_taken(2)
        wait_until(lambda: fast.scheduler.in_flight == 9)
    finally:
        client.send_signal(signal.SIGKILL)
        client.communicate(timeout=TIMEOUT_S)
    fast.instance.go(50)
    assert values_of(running.result()) == [2.0]
    assert values_of(neighbour.result()) == [4.0]
    fast.check_next_call()


def test_the_instance_fails(fast: FastDoor) -> None:
    fast.instance.execute = lambda batch: batch.fail(13, "größer 100 %")
    running = fast.begin(1)
    fast.instance.go()
    with pytest.raises(grpc.RpcError) as caught:
        running.result()
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, "größer 100 %")
    fast.instance.execute = fast.instance.echo
    fast.check_next_call()


def test_stop_answers_what_is_in_flight(fast: FastDoor) -> None:
    first, second = fast.begin(1), fast.begin(2)
    fast.wait_in_flight(2)
    stopped = fast.door.stop(TIMEOUT_S)
    assert fast.door.run(fast.door.server.wait_for_termination(0.2)) is True
    assert not stopped.done()
    fast.instance.go(50)
    assert [values_of(first.result()), values_of(second.result())] == [[2.0], [4.0]]
    stopped.result(TIMEOUT_S)


def test_stop_cancels_what_is_queued_and_takes_back_what_runs(fast: FastDoor) -> None:
    running, queued = fast.begin(1), fast.begin(2)
    fast.wait_taken(1)
    fast.wait_in_flight(2)
    fast.door.stop(0.1).result(TIMEOUT_S)
    assert code_of(running) is grpc.StatusCode.UNAVAILABLE
    assert code_of(queued) is grpc.StatusCode.UNAVAILABLE
    assert fast.door.server.in_flight == sum(fast.instance.sizes)
    fast.instance.go(50)
    fast.wait_in_flight(0)


# ----------------------------------------------------------------------------------------------------- both planes
def test_what_the_router_declines_goes_to_python(fast: FastDoor) -> None:
    assert fast.infer(b"\xff\xff", metadata=(("who", "me"),), timeout=TIMEOUT_S) == b"python: 2"
    assert fast.infer(b"", timeout=TIMEOUT_S) == b"python: 0"
    unknown = encode_request("nobody", "", "", [("X", "FP32", (1, 4), bytes(16))])
    assert fast.infer(unknown, timeout=TIMEOUT_S) == b"python: %d" % len(unknown)
    assert fast.declined[0]["who"] == "me"
    assert "user-agent" in fast.declined[0]
    fast.check_next_call()


def test_compressed_requests_go_to_python(fast: FastDoor) -> None:
    request = encode_request("echo", "", "", [("X", "FP32", (1, 4000), bytes(16_000))])
    answer = fast.infer(request, compression=grpc.Compression.Gzip, timeout=TIMEOUT_S)
    assert answer == b"python: %d" % len(request)


@pytest.mark.parametrize("kind", NATIVE)
def test_a_full_queue_is_refused_at_once(make_door: Callable[..., Door], kind: str) -> None:
    fast = FastDoor(make_door, kind, max_queue_size=2)
    try:
        running = fast.begin(1)
        fast.wait_taken(1)
        queued = [fast.begin(2), fast.begin(3)]
        fast.wait_pending(2)
        refused = fast.begin(4)
        assert code_of(refused) is grpc.StatusCode.UNAVAILABLE
        assert refused.details() == "[request id: 4] Exceeds maximum queue size"
        fast.instance.go(50)
        assert [values_of(call.result()) for call in (running, *queued)] == [[2.0], [4.0], [6.0]]
        fast.check_next_call()
    finally:
        fast.instance.stop()


def test_large_tensors(fast: FastDoor) -> None:
    fast.instance.go(50)
    rows = np.random.default_rng(1).random((2, 2_000_000), np.float32)  # 16 MB, above every window
    request = encode_request("echo", "", "big", [("X", "FP32", rows.shape, rows.tobytes())])
    for _ in range(3):
        *_, outputs = decode_response(fast.infer(request, timeout=TIMEOUT_S))
        assert (np.frombuffer(outputs[0][3], np.float32).reshape(rows.shape) == rows * 2).all()


def test_64_clients_get_their_own_answers(fast: FastDoor) -> None:
    fast.instance.go(1_000_000)
    channels = [fast.door.channel() for _ in range(8)]

    def ask(client: int) -> None:
        infer = channels[client % 8].unary_unary(FAST_PATH)
        calls = []
        for index in range(40):
            value = client * 1000 + index
            call = infer.future(message(value, id=f"{client}-{index}"), timeout=TIMEOUT_S)
            if index % 7 == 3:
                call.cancel()
            else:
                calls.append((value, f"{client}-{index}", call))
        for value, id, call in calls:
            answer = call.result()
            assert decode_response(answer)[2] == id
            assert values_of(answer) == [2.0 * value]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(64)))
    fast.wait_in_flight(0)
    fast.check_next_call()


@pytest.mark.parametrize("kind", NATIVE)
def test_a_router_published_while_calls_run(make_door: Callable[..., Door], kind: str) -> None:
    """Publishing belongs to the loop's thread, as the lifecycle manager does it."""
    schedulers = [Scheduler(make_spec()) for _ in range(2)]
    router = Router()
    router.publish({"echo": (3, {3: schedulers[0]})})
    door = make_door(kind, router=router)

    def serve(scheduler: Scheduler) -> None:
        batch = Batch(scheduler)
        while scheduler.take(batch):
            batch.settle({"Y": batch.gather()["X"] * 2})

    threads = [threading.Thread(target=serve, args=(scheduler,)) for scheduler in schedulers]
    for thread in threads:
        thread.start()

    async def publish(index: int) -> None:
        router.publish({"echo": (3, {3: schedulers[index]})})
        await asyncio.sleep(0)

    infer = door.channel().unary_unary(FAST_PATH)
    calls = []
    for index in range(400):
        calls.append((index, infer.future(message(index), timeout=TIMEOUT_S)))
        if index % 20 == 0:
            door.run(publish(index // 20 % 2))
    assert [values_of(call.result()) for _, call in calls] == [[2.0 * index] for index, _ in calls]
    assert all(scheduler.counters().success.count for scheduler in schedulers)
    for scheduler in schedulers:
        scheduler.close()
    for thread in threads:
        thread.join(TIMEOUT_S)
