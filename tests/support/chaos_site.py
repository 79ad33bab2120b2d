"""Servers over one registry as processes of their own, to be killed and started again at the same addresses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patience import PATIENCE

#: What a server says when it is surprised; a model that does not load says less.
COMPLAINTS = ("never retrieved", "could not be brought", "it is tried again", "the next one comes", "internal error")


class Timeline:
    """What happened when, for whoever has to find out why something went wrong; for all threads."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._entries: deque[str] = deque(maxlen=4000)

    def note(self, text: str) -> None:
        self._entries.append(f"{time.monotonic() - self._began:9.3f}  {text}")

    def tell(self, count: int = 120) -> str:
        return "\n".join(list(self._entries)[-count:])


class Server:
    """``aiorch serve`` with a registry; its ports are the same after each start. Not for two threads at a time."""

    def __init__(self, name: str, folder: Path, url: str, artefacts: Path, timeline: Timeline, **registry: Any) -> None:
        self.name, self.cache, self.log = name, folder / "cache", folder / "log"
        folder.mkdir(parents=True)
        self.port = find_port()
        self.target = f"127.0.0.1:{self.port}"
        self._timeline = timeline
        self._process: subprocess.Popen[bytes] | None = None
        #: When it went and came: a call that fails between two of these has an excuse.
        self.down_at: list[float] = [time.monotonic()]
        self.up_at: list[float] = []
        self.starts_s: list[float] = []
        self._config = folder / "config.yaml"
        sections = {
            "grpc": {"port": self.port},
            "http": {"enabled": False},
            "metrics": {"enabled": False},
            "execution": {"backends": ["aiorch_backends.python:PythonBackend"], "allow_code": True},
            "registry": {
                "url": url,
                "artefacts": str(artefacts),
                "cache_folder": str(self.cache),
                "min_free_bytes": 0,
                **registry,
            },
        }
        self._config.write_text(json.dumps(sections))

    @property
    def is_up(self) -> bool:
        return len(self.up_at) == len(self.down_at)

    def launch(self) -> None:
        """Starts the process, and does not wait."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AIORCH_REGISTRY")}
        command = [sys.executable, "-m", "aiorch_server.cli", "serve", "--json"]
        command += ["--config", str(self._config)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
        self._launched = time.monotonic()
        self._timeline.note(f"{self.name}: launched, pid {self._process.pid}")

    def wait_ready(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:  # a server that does not start ends, or the test's time limit does
            if json.loads(line)["event"] == "ready":
                break
        else:
            raise AssertionError(f"{self.name} ended at once: {self.tell_log()}")
        self.up_at.append(time.monotonic())
        self.starts_s.append(self.up_at[-1] - self._launched)
        self._timeline.note(f"{self.name}: ready after {self.starts_s[-1]:.2f} s")

    def start(self) -> None:
        self.launch()
        self.wait_ready()

    def kill(self) -> None:
        """SIGKILL; it is gone on return."""
        assert self._process is not None
        assert self._process.poll() is None, f"{self.name} has ended by itself: {self.tell_log()}"
        if self.is_up:
            self.down_at.append(time.monotonic())
        self._timeline.note(f"{self.name}: kill -9")
        self._process.kill()
        self._process.wait(30)
        self._close_pipe()
        self._process = None

    def end(self) -> None:
        """SIGTERM, and its exit status must say that all went well."""
        if self._process is None:
            return
        if self.is_up:
            self.down_at.append(time.monotonic())
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(60 * PATIENCE) == 0, self.tell_log()
        self._close_pipe()
        self._process = None

    def close(self) -> None:
        """Kills it if it is still there."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._close_pipe()
            self._process = None

    def has_excuse(self, began: float, ended: float) -> bool:
        """Whether the process was not there, or not ready, at some time between the two."""
        downs = zip(self.down_at, [*self.up_at, float("inf")], strict=False)
        return any(down <= ended and began <= up for down, up in downs)

    def tell_log(self, most: int = 6000) -> str:
        return self.log.read_text(errors="replace")[-most:]

    def find_complaints(self) -> list[str]:
        """Lines of the log that tell of what should never happen."""
        text = self.log.read_text(errors="replace")
        return [line for line in text.splitlines() if any(each in line for each in COMPLAINTS)]

    def _close_pipe(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()


def find_port() -> int:
    """A port that was free just now, below those that the system gives to connections."""
    for port in _candidates():
        with socket.socket() as door:
            try:
                door.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


_next_port = 20_000 + os.getpid() * 7 % 10_000


def _candidates() -> Iterator[int]:
    global _next_port
    for _ in range(2000):
        _next_port = 20_000 + (_next_port - 20_000 + 1) % 12_000
        yield _next_port
