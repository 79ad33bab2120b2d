"""Threads that go before others: who has precedence, what a system that refuses it is told, and slices."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from aiorch_client import Client
from served import serve
from sqlalchemy import text

from aiorch_server.config.load import load_server_config
from aiorch_server.errors import InvalidSettings
from aiorch_server.execution.precedence import SLICE_US, ask_short_slices, check_precedence
from aiorch_server.registry.connections import open_engine
from aiorch_server.registry.urls import DatabaseUrl

MODEL = """
import threading
import numpy as np

class Model:
    inputs = [("x", "FP32", [1])]
    outputs = [("thread", "INT64", [1])]

    def execute(self, inputs):
        return {"thread": np.full(1, threading.get_native_id())}
"""
#: Whose ordinary threads have slices of their own (EEVDF).
HAS_SLICES = tuple(map(int, re.findall(r"\d+", platform.release())[:2])) >= (6, 12) and platform.machine() == "x86_64"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "who" / "1").mkdir(parents=True)
    (tmp_path / "who" / "1" / "model.py").write_text(MODEL)
    return tmp_path


def may_have_precedence() -> bool:
    try:
        check_precedence()
    except InvalidSettings:
        return False
    return True


def read_slice_us(thread_id: int) -> float:
    """``sched_runtime`` of sched_getattr(2)."""
    attributes = (ctypes.c_uint64 * 6)()
    assert ctypes.CDLL(None).syscall(315, thread_id, attributes, 48, 0) == 0
    return attributes[3] / 1000


def run_in_thread(*steps: object) -> list[object]:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend(step() for step in steps))  # type: ignore[operator]
    thread.start()
    thread.join()
    return found


def test_a_server_gives_precedence_to_its_io_threads_alone(repository: Path) -> None:
    options = ("--scheduling", "realtime", "--io-threads", "2", "--allow-code")
    if not may_have_precedence():
        done = refuse(repository, [], *options)
        assert done.returncode != 0 and "execution.scheduling: found realtime" in done.stderr
        return
    with serve(repository, *options) as server, Client(server.grpc) as client:
        instance = client.infer("who", {"x": np.ones(1, np.float32)}).outputs["thread"].item()
        ids = [int(path.name) for path in Path(f"/proc/{server.process.pid}/task").iterdir()]
        policies = {thread: os.sched_getscheduler(thread) for thread in ids}
        first = [thread for thread, policy in policies.items() if policy & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR]
        assert len(first) == 2
        assert [os.sched_getparam(thread).sched_priority for thread in first] == [1, 1]
        assert all(policy == os.SCHED_OTHER for thread, policy in policies.items() if thread not in first)
        if HAS_SLICES:
            assert read_slice_us(instance) == SLICE_US
        assert server.end() == 0


def test_plain_threads_have_no_precedence_but_short_slices(repository: Path) -> None:
    with serve(repository, "--allow-code") as server, Client(server.grpc) as client:
        instance = client.infer("who", {"x": np.ones(1, np.float32)}).outputs["thread"].item()
        ids = [int(path.name) for path in Path(f"/proc/{server.process.pid}/task").iterdir()]
        assert {os.sched_getscheduler(thread) for thread in ids} == {os.SCHED_OTHER}
        if HAS_SLICES:
            short = [thread for thread in ids if read_slice_us(thread) == SLICE_US]
            assert len(short) == 2 and instance in short  # and the I/O thread


def refuse(repository: Path, prefix: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aiorch_server.cli", "serve", "--model-repository", str(repository)]
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    return subprocess.run([*prefix, *command, *ports, *options], capture_output=True, text=True, timeout=60)


def test_a_server_without_the_privilege_does_not_start_and_says_what_it_lacks(repository: Path) -> None:
    prefix = []
    if may_have_precedence():
        drop = shutil.which("setpriv")
        assert drop is not None, "setpriv of util-linux drops the privilege for this test"
        prefix = [drop, "--bounding-set=-sys_nice", "--inh-caps=-sys_nice"]
    done = refuse(repository, prefix, "--scheduling", "realtime", "--allow-code")
    told = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert "execution.scheduling: found realtime, which the system refuses (Operation not permitted)" in told
    assert "CAP_SYS_NICE" in told and "Traceback" not in told


@pytest.mark.parametrize("error", [PermissionError(errno.EPERM, "Operation not permitted"), AttributeError()])
def test_what_the_system_refuses_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse_all(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "sched_setscheduler", refuse_all)
    with pytest.raises(InvalidSettings, match=r"found realtime, which the system refuses \((Operation|there is no)"):
        check_precedence()


@pytest.mark.parametrize("section", [{"io_threads": 0}, {"transport": "grpcio"}, {"allow_grpc": False}])
def test_without_io_threads_nobody_could_have_precedence(section: dict[str, object]) -> None:
    with pytest.raises(InvalidSettings, match=r"execution\.scheduling.*realtime.*needs gRPC with transport native"):
        load_server_config({"scheduling": "realtime", **section})


def test_a_thread_asks_for_short_slices_and_keeps_the_rest() -> None:
    def slow_down() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 3)

    def look() -> tuple[int, int]:
        thread = threading.get_native_id()
        return os.getpriority(os.PRIO_PROCESS, thread), os.sched_getscheduler(thread)

    _, is_taken, (nice, policy) = run_in_thread(slow_down, ask_short_slices, look)  # type: ignore[misc]
    assert (nice, policy) == (3, os.SCHED_OTHER)
    assert is_taken == HAS_SLICES


def test_a_thread_that_is_gone_is_told() -> None:
    (thread,) = run_in_thread(threading.get_native_id)
    assert isinstance(thread, int) and not ask_short_slices(thread)


def test_transactions_on_sqlite_pause_between_statements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("aiorch_server.pauses.time.sleep", pauses.append)
    engine = open_engine(DatabaseUrl(f"sqlite:///{tmp_path / 'a.db'}"), connections=1, connect_s=1.0, timeout_s=1.0)
    with engine.connect() as connection:
        before = len(pauses)
        for _ in range(3):
            assert connection.execute(text("SELECT 1")).scalar() == 1
        assert len(pauses) - before >= 6
    engine.dispose()


def test_a_system_without_the_call_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    assert run_in_thread(ask_short_slices) == [False]
