"""Calls that end early: cancelled, expired, their client killed, the server stopped. The next call is always right."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from .conftest import SERVICE, TIMEOUT_S, Door, wait_until


@pytest.fixture
def kind(kind_or_two: str) -> str:
    """Of two threads as well."""
    return kind_or_two


def fail_of(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def begin(door: Door, method: str, channel: grpc.Channel | None = None, timeout: float = TIMEOUT_S) -> Any:
    """A call of any kind that has reached its servicer."""
    call = door.call(method, channel)
    before = door.servicer.count("started")
    match method:
        case "Wait" | "Stubborn":
            running = call.future(b"x", timeout=timeout)
        case "WaitStream":
            running = call(b"x", timeout=timeout)
            assert next(running) == b"first"
        case "SlowSum":
            running = call.future(iter([b"1"]), timeout=timeout)
        case _:
            running = call(iter([b"hello"]), timeout=timeout)
            assert next(running) == b"hello"
    wait_until(lambda: door.servicer.count("started") > before, "the servicer")
    return running


KINDS = ["Wait", "WaitStream", "SlowSum", "WaitChat"]


@pytest.mark.parametrize("method", KINDS)
def test_the_client_cancels(door: Door, method: str) -> None:
    channel = door.channel()
    running = begin(door, method, channel)
    running.cancel()
    wait_until(lambda: door.servicer.count("cancelled") == 1, "CancelledError in the servicer")
    assert running.code() is grpc.StatusCode.CANCELLED
    door.check_next_call(channel)


def test_context_of_a_cancelled_call(native_door: Door) -> None:
    begin(native_door, "Wait").cancel()
    wait_until(lambda: native_door.servicer.count("done") == 1, "the done callback")
    (context,) = native_door.servicer.contexts
    assert context.done() and context.cancelled()


@pytest.mark.parametrize("method", KINDS)
def test_the_deadline_passes(door: Door, method: str) -> None:
    channel = door.channel()
    running = begin(door, method, channel, timeout=0.3)
    error = fail_of(running.result if method in ("Wait", "SlowSum") else lambda: list(running))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: door.servicer.count("cancelled") == 1, "CancelledError in the servicer")
    door.check_next_call(channel)


def test_a_servicer_that_ignores_cancellation_harms_nobody(door: Door) -> None:
    channel = door.channel()
    begin(door, "Stubborn", channel).cancel()
    wait_until(lambda: door.servicer.count("cancelled") == 1)
    door.check_next_call(channel)


CLIENT = """
import grpc, sys
channel = grpc.insecure_channel(sys.argv[1])
calls = [channel.unary_unary(f"/{sys.argv[2]}/Wait").future(b"x") for _ in range(5)]
streams = [channel.stream_stream(f"/{sys.argv[2]}/WaitChat")(iter([b"x"])) for _ in range(5)]
print(next(streams[0]), flush=True)
calls[0].result()
"""


def test_the_client_is_killed(door: Door) -> None:
    client = subprocess.Popen([sys.executable, "-c", CLIENT, door.target, SERVICE], stdout=subprocess.PIPE)
    try:
        wait_until(lambda: door.servicer.count("started") == 10, "ten calls")
    finally:
        client.send_signal(signal.SIGKILL)
        client.communicate(timeout=TIMEOUT_S)
    wait_until(lambda: door.servicer.count("cancelled") == 10, "cancellation of all calls")
    door.check_next_call()


def test_many_calls_some_cancelled(door: Door) -> None:
    channel = door.channel()
    echo, wait = door.call("Echo", channel), door.call("Wait", channel)
    waiting = [wait.future(b"x", timeout=TIMEOUT_S) for _ in range(20)]
    wait_until(lambda: door.servicer.count("started") == 20)
    for call in waiting[::2]:
        call.cancel()
    answers = [echo.future(b"%d" % index, timeout=TIMEOUT_S) for index in range(200)]
    assert [answer.result() for answer in answers] == [b"%d" % index for index in range(200)]
    wait_until(lambda: door.servicer.count("cancelled") == 10)
    door.release()
    assert [call.result() for call in waiting[1::2]] == [b"waited"] * 10


# -------------------------------------------------------------------------------------------------------- stopping
def test_stop_lets_calls_end(door: Door) -> None:
    channel = door.channel()
    unary, stream = begin(door, "Wait", channel), begin(door, "WaitStream", channel)
    stopped = door.stop(TIMEOUT_S)
    wait_until(lambda: not can_connect(door), "a closed door")
    assert not stopped.done()
    assert door.run(door.server.wait_for_termination(0.05)) is True
    door.release()
    assert unary.result() == b"waited"
    assert list(stream) == [b"second"]
    stopped.result(TIMEOUT_S)
    assert door.run(door.server.wait_for_termination()) is False
    assert fail_of(lambda: door.call("Echo")(b"x", timeout=TIMEOUT_S)).code() is grpc.StatusCode.UNAVAILABLE


def can_connect(door: Door) -> bool:
    # Python 3.11's own event loop (not uvloop) forgets a connection that it accepts while its server is closed: nobody
    # answers that one, so a client that came in that instant waits for its deadline.
    channel = door.channel()
    try:
        door.call("Echo", channel)(b"x", timeout=2)
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return False
    return True


@pytest.mark.parametrize("grace", [None, 0.2])
def test_stop_cancels_what_goes_on(door: Door, grace: float | None) -> None:
    channel = door.channel()
    unary, stream = begin(door, "Wait", channel), begin(door, "WaitChat", channel)
    begin(door, "Stubborn", channel)
    door.stop(grace).result(TIMEOUT_S)
    assert fail_of(unary.result).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert fail_of(lambda: list(stream)).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert door.servicer.count("cancelled") == 3


def test_stop_again_with_less_grace(door: Door) -> None:
    running = begin(door, "Wait")
    patient = door.stop(1000)
    door.stop(0.1).result(TIMEOUT_S)
    patient.result(TIMEOUT_S)
    assert running.code() is not grpc.StatusCode.OK


def test_stop_before_start_and_without_calls(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind)
    begun = time.monotonic()
    door.check_next_call()
    door.stop(1000).result(TIMEOUT_S)
    assert time.monotonic() - begun < 10, "an idle client holds the server"


def test_stop_does_not_wait_for_a_silent_connection(native_door: Door) -> None:
    with socket.create_connection(("127.0.0.1", native_door.port)):
        native_door.check_next_call()
        native_door.stop(1000).result(TIMEOUT_S)


def endless() -> Iterator[bytes]:
    while True:
        yield b"1"


def test_an_endless_client_stream_is_cut(door: Door) -> None:
    running = door.call("SlowSum").future(endless(), timeout=TIMEOUT_S)
    wait_until(lambda: door.servicer.count("started") == 1)
    running.cancel()
    wait_until(lambda: door.servicer.count("cancelled") == 1)
    door.check_next_call()


def test_threads_of_cancelled_calls_are_given_back(native_door: Door) -> None:
    """More calls than threads, each blocked in reading when it is cancelled."""
    channel = native_door.channel()
    asked = threading.Event()

    def one_and_no_end() -> Iterator[bytes]:
        yield b"1"
        asked.wait(TIMEOUT_S)

    for _ in range(3):
        calls = [native_door.call("SyncSum", channel).future(one_and_no_end(), timeout=TIMEOUT_S) for _ in range(8)]
        wait_until(lambda: native_door.server.calls == 8)
        for call in calls:
            call.cancel()
        wait_until(lambda: native_door.server.calls == 0)
    asked.set()
    assert native_door.call("SyncEcho", channel)(b"x", timeout=TIMEOUT_S) == b"x"
