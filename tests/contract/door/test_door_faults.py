"""Faults around I/O threads: descriptors held elsewhere, no memory, no threads, loops that are stuck or gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hyperframe.frame import SettingsFrame

from aiorch_server.frontends.grpc import NativeGrpcServer

from .conftest import TIMEOUT_S, Door, wait_until
from .test_door_attacks import Attacker

THREADS = ["native-asyncio-1", "native-uvloop-2"]


def find_other_end(client: socket.socket) -> int:
    """A second descriptor of the server's side of this connection, as a forked child would hold one."""
    for entry in sorted(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            if entry.is_socket():
                with socket.socket(fileno=os.dup(int(entry.name))) as end:
                    if end.getpeername() == client.getsockname():
                        return end.detach()
    raise AssertionError("the server's end is not to be found")


def watched_inodes() -> set[int]:
    """What this process's epoll descriptors watch; see proc(5)."""
    found: set[int] = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
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
