"""Standard output and error of a server: who does not read them must not hold it up.

A pipe that nobody empties takes 64 KiB, then whoever writes waits: with them the event loop, and each request.
"""

from __future__ import annotations

import io
import os
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Final, TextIO

#: What may wait to be read, beside what the pipe itself holds.
_MAX_CHARACTERS: Final = 1 << 20
#: How long what still waits has at the end.
_PATIENCE_S: Final = 2.0


class Outlet(io.TextIOBase):
    """Takes text without ever waiting; a thread of its own writes it to ``stream``'s descriptor.

    When ``max_characters`` wait, what else comes is left out, and how many writes that were is said once there is room.
    For all threads.
    """

    def __init__(self, stream: TextIO, max_characters: int = _MAX_CHARACTERS) -> None:
        stream.flush()
        self._stream = stream
        self._fd = stream.fileno()
        self._max_characters = max_characters
        self._waiting: deque[str] = deque()
        self._n_characters = 0
        self._n_dropped = 0
        self._is_writing = False
        self._is_gone = False  # the reader
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return self._stream.encoding

    def fileno(self) -> int:
        """The descriptor of the stream."""
        return self._fd

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str) -> int:
        """Takes ``text``, or leaves it out; TypeError for what is none."""
        if not isinstance(text, str):
            raise TypeError(f"write() takes text, not {type(text).__name__}")
        with self._changed:
            if text and not self._is_gone:
                if self._n_characters + len(text) > self._max_characters:
                    self._n_dropped += 1
                else:
                    self._waiting.append(text)
                    self._n_characters += len(text)
                    self._changed.notify_all()
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="outlet", daemon=True)
                    self._thread.start()
        return len(text)

    def drain(self, patience_s: float = _PATIENCE_S) -> None:
        """Waits until all is written, or nothing could be for so long."""
        until_s = time.monotonic() + patience_s
        with self._changed:
            while (self._waiting or self._is_writing) and not self._is_gone:
                if not self._changed.wait(until_s - time.monotonic()):
                    return

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                text = "".join(self._waiting)
                self._waiting.clear()
                self._is_writing = True
            self._write(text.encode(self._stream.encoding, "backslashreplace"))
            with self._changed:
                self._n_characters -= len(text)
                self._is_writing = False
                if self._n_dropped:
                    self._waiting.append(f"... {self._n_dropped} more were left out: nobody read this\n")
                    self._n_characters += len(self._waiting[-1])
                    self._n_dropped = 0
                self._changed.notify_all()

    def _write(self, data: bytes) -> None:
        # Not through the stream: a write that hangs in there would keep its lock, and the process from ending.
        left = memoryview(data)
        while left and not self._is_gone:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:  # a descriptor that somebody made non-blocking
                select.select((), (self._fd,), ())
            except OSError:
                self._is_gone = True


@contextmanager
def never_waiting() -> Iterator[None]:
    """Puts outlets in place of standard output and error where these are pipes or sockets; drains them at the end."""
    outlets = []
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if _may_wait(stream):
                outlets.append(Outlet(stream))
                stack.enter_context(redirect(outlets[-1]))
        try:
            yield
        finally:
            for outlet in outlets:
                outlet.drain()


def _may_wait(stream: TextIO | None) -> bool:
    """A file takes everything; at a terminal sits somebody, who may want to hold it."""
    try:
        mode = os.fstat(stream.fileno()).st_mode if stream is not None else 0
    except (OSError, ValueError):  # closed, or none of the system's
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
