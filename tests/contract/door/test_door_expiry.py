"""Calls by the thousand that expire at once: their client resets them all, and keeps its connection."""

from __future__ import annotations

import threading
from collections.abc import Callable

import grpc
import pytest

from .conftest import NATIVE, TIMEOUT_S, Door

CALLS = 6_000


class Connectivity:
    """The states that a channel goes through."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.states: list[grpc.ChannelConnectivity] = []
        self.is_ready = threading.Event()
        channel.subscribe(self.note, try_to_connect=True)
        assert self.is_ready.wait(TIMEOUT_S)

    def note(self, state: grpc.ChannelConnectivity) -> None:
        self.states.append(state)
        if state is grpc.ChannelConnectivity.READY:
            self.is_ready.set()


@pytest.mark.parametrize("kind", NATIVE)
def test_calls_that_expire_at_once_leave_the_connection(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind)
    channel = door.channel()
    seen = Connectivity(channel)
    wait = door.call("Wait", channel)
    calls = [wait.future(b"x", timeout=1.5) for _ in range(CALLS)]
    codes = {call.exception(TIMEOUT_S).code() for call in calls}
    assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED}
    door.check_next_call(channel)
    assert seen.states[seen.states.index(grpc.ChannelConnectivity.READY) :] == [grpc.ChannelConnectivity.READY]
