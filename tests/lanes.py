"""Runs folders of tests, each in a process of its own, in two lanes where there are two cores.

    lanes.py FOLDER... [-- PYTEST-ARGUMENT...]

Frameworks bring C libraries that do not all get along in one process, and a crash of one must not hide the results of
the rest. Most tests wait for something most of the time, so that two of them do not slow each other down; those that
measure time are marked ``alone``, and ``support/turns.py`` lets them run by themselves.

The longest folder has a lane to itself. What a folder prints comes in one piece when it is done; a single folder
writes to the terminal. Exit status 1 if any folder failed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
#: It takes as long as all others together.
LONGEST = "contract"
#: How long an interrupted folder may take to tell so and to end the servers that it started.
LEAVE_S = 30.0


class Lanes:
    """``failed``: folders whose tests did not all pass, with the exit status of each."""

    def __init__(self, folders: Sequence[str], arguments: Sequence[str], place: Path) -> None:
        self._arguments, self._place = arguments, place
        self._waiting = sorted(folders, key=lambda folder: folder != LONGEST)
        self._count = min(2, len(os.sched_getaffinity(0)))
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._is_over = False
        self.failed: dict[str, int] = {}

    def run(self) -> None:
        """Until all folders are done, or the first signal to end."""
        lanes = [threading.Thread(target=self._run_lane) for _ in range(self._count)]
        for lane in lanes:
            lane.start()
        try:
            for lane in lanes:
                lane.join()
        finally:
            self._stop()
            for lane in lanes:
                lane.join()

    def _run_lane(self) -> None:
        while True:
            with self._lock:
                if self._is_over or not self._waiting:
                    return
                folder = self._waiting.pop(0)
                print(f"== tests/{folder} begins", flush=True)
                output = (self._place / folder.replace("/", "-")).open("w+b")
                began = time.monotonic()
                process = subprocess.Popen(
                    make_command(folder, self._arguments),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "TEST_TURNS": str(self._place)},
                    start_new_session=True,  # who interrupts a terminal interrupts all in it: each is to hear it once
                )
                self._running.add(process)
            status = process.wait()
            with self._lock, output:
                self._running.discard(process)
                if status:
                    self.failed[folder] = status
                output.seek(0)
                print(f"== tests/{folder} in {time.monotonic() - began:.0f} s", flush=True)
                shutil.copyfileobj(output, sys.stdout.buffer)
                sys.stdout.buffer.flush()

    def _stop(self) -> None:
        """Interrupts what runs; kills what does not end by itself. Being interrupted again changes nothing."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with self._lock:
            self._is_over = True
            running = list(self._running)
        for process in running:
            process.send_signal(signal.SIGINT)
        until = time.monotonic() + LEAVE_S
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def make_command(folder: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", str(HERE / folder), *arguments]


def main() -> int:
    given = sys.argv[1:]
    middle = given.index("--") if "--" in given else len(given)
    folders, arguments = given[:middle], given[middle + 1 :]
    if len(folders) == 1:
        os.execv(sys.executable, make_command(folders[0], arguments))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="aiorch-lanes-") as place:
        lanes = Lanes(folders, arguments, Path(place))
        try:
            lanes.run()
        except KeyboardInterrupt:
            print("== interrupted")
            return 130
    if lanes.failed:
        print("== failed:", *(f"{folder} (exit status {status})" for folder, status in lanes.failed.items()))
    return 1 if lanes.failed else 0


if __name__ == "__main__":
    sys.exit(main())
