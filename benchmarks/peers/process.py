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
# Scheduling groups weigh a whole session against others; without this, whatever else runs on the machine is in the
# figures. It needs privileges; where it is refused, the run goes on and says so.
_GROUP_NICE = -15


class ServerFailed(RuntimeError):
    """A server did not start, or ended by itself; the text holds the end of its log."""


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
        try:
            root = psutil.Process(self.pid)
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            raise self._describe_failure() from None
        used = 0.0
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used += times.user + times.system
        return used

    def check_alive(self) -> None:
        """ServerFailed when the process has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise self._describe_failure()

    def await_port(self, port: int, timeout_s: float) -> None:
        """Returns when something accepts connections on the port; ServerFailed after ``timeout_s`` or on exit."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
                return
            time.sleep(0.05)
        raise ServerFailed(f"{self.name} does not listen on port {port} after {timeout_s:g} s\n{self._read_log_end()}")

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _describe_failure(self) -> ServerFailed:
        code = self._process.poll() if self._process else None
        return ServerFailed(f"{self.name} ended by itself (code {code})\n{self._read_log_end()}")

    def _read_log_end(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
