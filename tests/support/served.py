"""``aiorch serve`` as a process of its own, on ports that nobody else has."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_LIMIT_S = 240.0


@dataclass
class Served:
    """A running server; ``ready`` is the event that it printed."""

    process: subprocess.Popen[bytes]
    ready: dict[str, Any]
    log: Path

    @property
    def grpc(self) -> str:
        return str(self.ready["addresses"]["grpc"])

    @property
    def http(self) -> str:
        return str(self.ready["addresses"]["http"])

    @property
    def metrics(self) -> str:
        return str(self.ready["addresses"]["metrics"])

    def end(self, limit_s: float = 60.0) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limit_s)


def read_events(process: subprocess.Popen[bytes], limit_s: float) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    buffer = b""
    until = time.monotonic() + limit_s
    while True:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
        assert ready, f"not ready within {limit_s} s; last: {buffer!r}"
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        yield from map(json.loads, lines)


@contextmanager
def serve(repository: Path, *options: str) -> Iterator[Served]:
    """Starts it, waits until it is ready, and makes sure that it ends."""
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "aiorch_server.cli", "serve", "--json", "--model-repository", str(repository)]
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen([*command, *ports, *options], stdout=subprocess.PIPE, stderr=log)
        try:
            for event in read_events(process, START_LIMIT_S):
                if event["event"] == "ready":
                    yield Served(process, event, Path(log.name))
                    break
            else:
                raise AssertionError(f"the server ended at once: {Path(log.name).read_text()}")
        finally:
            process.kill()
            process.wait(30)
            if process.stdout is not None:
                process.stdout.close()
