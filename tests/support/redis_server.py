"""A Redis server of the test's own, which it may stop, pause and start again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from patience import PATIENCE

START_LIMIT_S = 20.0 * PATIENCE


class RedisServer:
    """``redis-server`` (Debian's package of that name) in memory alone, on a unix socket in ``folder`` and a port."""

    def __init__(self, folder: Path, *options: str) -> None:
        program = shutil.which("redis-server")
        assert program is not None, "redis-server is missing; install Debian's package of that name"
        self.path = str(folder / "redis.sock")
        self._log = folder / "redis.log"
        with socket.create_server(("127.0.0.1", 0)) as door:
            self.port = door.getsockname()[1]
        ports = () if "--tls-port" in options else ("--port", str(self.port))
        self._command = [program, *ports, "--unixsocket", self.path, "--dir", str(folder), "--save", "", *options]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        until = time.monotonic() + START_LIMIT_S
        while True:
            try:
                self.call(lambda client: client.ping())
                return
            except redis.exceptions.AuthenticationError:
                return
            except redis.exceptions.ConnectionError:
                assert time.monotonic() < until and self._process.poll() is None, self._log.read_text()
                time.sleep(0.01)

    def call(self, do: Callable[[redis.Redis], Any], password: str | None = None) -> Any:
        """What ``do`` gives with a client."""
        with redis.Redis(unix_socket_path=self.path, password=password) as client:
            return do(client)

    def send(self, number: signal.Signals) -> None:
        """A signal, such as SIGSTOP and SIGCONT."""
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(START_LIMIT_S)
            self._process = None
            Path(self.path).unlink(missing_ok=True)
