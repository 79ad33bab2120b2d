"""Pages of the documentation that are run as they stand: what a reader pastes, and what the page says comes of it.

A page's fenced blocks, in their order: ``python`` after a line that says to save it as `NAME` is a file; ``console``
are lines for a shell, run one by one; ``text`` is what the lines of the block before show, of which there may be more.
In it ``...`` stands for anything, and so does each number of more than one digit; runs of spaces are one.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Self

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SAVED = re.compile(r"[Ss]ave this as `([\w.-]+)`|and this as `([\w.-]+)`")
_NUMBER = re.compile(r"(?=(\D*\d){2})\(?[\d.,:-]+[%),;]*")
#: Commands that start a server, or ask none: these take no --url.
_LOCAL = ("serve", "registry", "init", "version")
_END = "-- end of the line, exit code"


@dataclass
class Step:
    """A file to write (``name``), or lines for the shell and what they show."""

    text: str
    name: str = ""
    shown: list[str] = field(default_factory=list)

    @property
    def fails(self) -> bool:
        """Whether the page shows that the last line ends with an error."""
        return any(line.startswith("error:") for line in self.shown)


def read_page(path: Path, section: str = "") -> list[Step]:
    """What the page at ``path``, or its ``section`` of that heading, says to do, in order."""
    page, steps, end = path.read_text(), [], 0
    if section:
        found = re.search(rf"^#+ {re.escape(section)}$(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
        assert found, f"{path.name} has no section '{section}'"
        page = found[1]
    for block in _BLOCK.finditer(page):
        before, end = page[end : block.start()], block.end()
        kind, text = block[1], block[2]
        if kind == "python":
            names = [name for found in _SAVED.findall(before) for name in found if name]
            assert names, f"{path.name} does not say what to save this as: {text}"
            steps.append(Step(text, names[-1]))
        elif kind == "console":
            steps.append(Step(text))
        elif kind == "text":
            assert steps and not steps[-1].name, f"{path.name} shows what nothing has said: {text}"
            steps[-1].shown += text.splitlines()
    return steps


def find_missing(shown: list[str], output: str) -> str | None:
    """The first of the lines in ``shown`` that the rest of ``output`` does not have."""
    lines = iter([" ".join(line.split()) for line in output.splitlines()])
    for each in shown:
        pattern = re.compile(" ?".join(_write_pattern(token) for token in each.split()))
        if each.strip() and not any(pattern.fullmatch(line) for line in lines):
            return each
    return None


def _write_pattern(token: str) -> str:
    if token == "...":
        return ".*"
    return r"[\d.,:%();-]+" if _NUMBER.fullmatch(token) else re.escape(token)


class Shell:
    """One bash, as a reader has it: variables and what runs in the background stay from line to line."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._bash = subprocess.Popen(
            ["bash"], cwd=folder, env=dict(environment), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._lines: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._bash.stdout is not None
        for line in self._bash.stdout:
            self._lines.put(line)

    def run(self, line: str, limit_s: float) -> tuple[int, str]:
        """The exit code and the output of a line; AssertionError when it takes longer than ``limit_s``."""
        assert self._bash.stdin is not None
        self._bash.stdin.write(f'{line}\necho "{_END} $?"\n')
        self._bash.stdin.flush()
        shown, end = "", time.monotonic() + limit_s
        while True:
            try:
                found = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except Empty:
                raise AssertionError(f"not done after {limit_s:g} s: {line}\n{shown}") from None
            if found.startswith(_END):
                return int(found.split()[-1]), shown
            shown += found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends it; what it left in the background gets SIGKILL."""
        self.run("kill -9 $(jobs -p) 2>/dev/null; wait", 20)
        assert self._bash.stdin is not None and self._bash.stdout is not None
        self._bash.stdin.close()
        self._bash.wait(20)
        self._reader.join(20)
        self._bash.stdout.close()


class ServerShell(Shell):
    """With ``python`` and ``aiorch`` of this environment, and ports of this test's own instead of the usual ones."""

    def __init__(self, folder: Path, **environment: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as door:
            self.port = int(door.getsockname()[1])
        programs = folder / "programs"
        programs.mkdir()
        aiorch = f"""#!/bin/sh
            case $1 in {"|".join(_LOCAL)}) ;; *) set -- "$@" --url 127.0.0.1:{self.port} ;; esac
            exec {sys.executable} -m aiorch_server.cli "$@"
        """
        for name, text in {"aiorch": aiorch, "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n'}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        ports = {"AIORCH_GRPC_PORT": str(self.port), "AIORCH_HTTP_PORT": "0", "AIORCH_METRICS_PORT": "0"}
        path = f"{programs}:{os.environ['PATH']}"
        super().__init__(folder, {**os.environ, **ports, "PATH": path, "COLUMNS": "250", **environment})

    def change(self, text: str) -> str:
        """A text of a page as it is run here."""
        return text.replace("127.0.0.1:8001", f"127.0.0.1:{self.port}")


def list_lines(step: Step) -> Iterator[str]:
    """The lines of a ``console`` block; a line that ends with a backslash goes on in the next one."""
    yield from step.text.replace("\\\n", " ").splitlines()


def run_page(
    steps: list[Step], shell: Shell, folder: Path, change: Callable[[str], str], *, limit_s: float
) -> None:  # fmt: skip
    """Does what a page says: each line must end well, or as it is shown, and show what is shown.

    ``change`` gives a text as it is run here, with other ports.
    """
    for step in steps:
        if step.name:
            (folder / step.name).write_text(change(step.text))
            continue
        lines, output = list(list_lines(step)), ""
        for number, line in enumerate(lines, 1):
            code, shown = shell.run(change(line), limit_s)
            output += shown
            is_failure = step.fails and number == len(lines)
            assert (code != 0) == is_failure, f"{line}: exit code {code}\n{output}"
        missing = find_missing(step.shown, output)
        assert missing is None, f"not shown: {missing}\n\nby\n{step.text}\nbut\n{output}"
