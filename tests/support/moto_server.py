"""An S3 server on loopback, in a process of its own: started by a test, and taken away by it."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request

_PROGRAM = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
KEY, SECRET = "test-access-key", "test-secret-key"


class MotoServer:
    """Runs until ``stop``; everything in it is forgotten then."""

    def __init__(self, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _PROGRAM, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.options = {"endpoint_url": f"http://127.0.0.1:{self.port}", "key": KEY, "secret": SECRET}
        self._put_bucket()

    def _put_bucket(self) -> None:
        deadline = time.monotonic() + 30
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/models", method="PUT")
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    return
            except OSError:
                if time.monotonic() > deadline:
                    raise

    def stop(self) -> None:
        """Nobody answers at its port any more; may be called again."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
