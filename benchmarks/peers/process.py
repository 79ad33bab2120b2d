"""Server processes of the benchmark: own group, pinned, watched, always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_STOP_S = 10.0
_LOOK_S = 0.005
# Scheduling groups weigh a whole session against others; without this, whatever else runs on the machine is in the
# figures. It needs privileges; where it is refused, the run goes on and says so.
_GROUP_NICE = -15


class ServerFailed(RuntimeError):
    """A server did not start, or ended by itself; the text holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes summed over a process tree, pages that processes share counted once in ``pss_bytes``."""

    rss_bytes: int
    pss_bytes: int
    processes: int


def find_free_port() -> int:
    """A TCP port on loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def raise_priority(pid: int) -> bool:
    """Gives the process's session precedence over other sessions; False where the system does not allow it."""
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(_GROUP_NICE), encoding="ascii")
    except OSError:
        return False
    return True


@dataclass
class ServerProcess:
    """A command in a process group of its own on one CPU, from ``with`` to the end of the block."""

    name: str
    command: Sequence[str]
    cpu: int
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    has_priority: bool = field(default=False, init=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["taskset", "-c", str(self.cpu), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        self.has_priority = raise_priority(self._process.pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._signal_group(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # The group outlives its leader when a child hangs, or when Ctrl-C cut the wait short.
            self._signal_group(signal.SIGKILL)
            self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def cpu_s(self) -> float:
        """CPU seconds that the process tree has used so far (resolution: the kernel's clock tick, 10 ms)."""
        used = 0.0
        for process in self._find_tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used += times.user + times.system
        return used

    def measure_memory(self) -> Memory:
        """What the process tree holds now."""
        rss = pss = 0
        tree = self._find_tree()
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                info = process.memory_full_info()
                rss, pss = rss + info.rss, pss + info.pss
        return Memory(rss, pss, len(tree))

    def check_alive(self) -> None:
        """ServerFailed when the process has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise self._describe_end()

    def await_port(self, port: int, timeout_s: float) -> None:
        """Returns when something accepts connections on the port; ServerFailed after ``timeout_s`` or on exit."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
                return
            time.sleep(_LOOK_S)
        raise self.describe_failure(f"does not listen on port {port} after {timeout_s:g} s")

    def _find_tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            raise self._describe_end() from None

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def describe_failure(self, what: str) -> ServerFailed:
        """An error that says so and holds the end of the log."""
        return ServerFailed(f"{self.name} {what}\n{self.log.read_text(encoding='utf-8', errors='replace')[-3000:]}")

    def _describe_end(self) -> ServerFailed:
        code = self._process.poll() if self._process else None
        return self.describe_failure(f"ended by itself (code {code})")
