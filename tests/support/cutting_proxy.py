"""A TCP proxy whose connections a test cuts."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator


class CuttingProxy:
    """Forwards to ``target`` until ``cut``; connections that come later are forwarded again."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._far_address = (host, int(port))
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._all: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.n_cut = 0
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._far_address, 10)
            except OSError:
                return
            with self._lock:
                self._open += (near, far)
                self._all += (near, far)
            self._start(self._pump, near, far)
            self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Ends all connections that are open, whatever is under way on them."""
        with self._lock:
            cut, self._open = self._open, []
        self.n_cut += bool(cut)
        for each in cut:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """As ``cut``; from now on nobody answers."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def join(self) -> None:
        """After ``close``: waits for its threads, and gives the sockets back."""
        for thread in self._threads:
            thread.join(10)
        for each in self._all:
            each.close()


@contextlib.contextmanager
def cutting(target: str) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
        proxy.join()
