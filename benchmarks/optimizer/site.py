"""A real server on one CPU and its callers on another: one workload under all policies, one after the other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from aiorch_server.optimizer.window import Window
from benchmarks.machine import ROOT
from benchmarks.optimizer.workloads import Workload
from benchmarks.scenarios.foretold import Watched, read_observation

_TIMED = ROOT / "benchmarks" / "scenarios" / "timed.py"
#: Answers that come later than this after the last request was due are not waited for.
DRAIN_S: Final = 1.0
#: So many that what is not answered yet stays within the streams that a server allows on each.
CONNECTIONS: Final = 64
_EMPTY_S: Final = 20.0
#: Looks at the server meanwhile: what a tuner's windows are made of.
_LOOK_S: Final = 1.0


class SiteFailed(RuntimeError):
    """The server or its caller did not do what it should; the text says what."""


@dataclass(frozen=True, slots=True)
class Point:
    """A fixed way to batch; ``max_requests`` in one batch at most."""

    max_requests: int
    delay_us: int = 0

    def __str__(self) -> str:
        return f"{self.max_requests} at most" + (f", {self.delay_us / 1000:g} ms" if self.delay_us else "")


@dataclass(frozen=True, slots=True)
class Drive:
    """What became of requests, and what the server saw of it; ``looks`` are a second apart.

    ``out`` has for each request ``due_ns``, ``sent_ns``, ``answered_ns`` (0: no answer) by the monotonic clock, and
    ``code``: gRPC's status, -1 without an answer.
    """

    out: dict[str, npt.NDArray[Any]]
    looks: tuple[Window, ...]
    window: Window
    told_before: dict[str, Any]
    told_after: dict[str, Any]


def drive(
    port: int, times_ns: npt.NDArray[np.int64], message: bytes, folder: Path, cpu: int, look: Any = None
) -> dict[str, npt.NDArray[Any]]:
    """Sends requests at these times, from a process of its own; ``look`` is called once a second."""
    (folder / "message").write_bytes(message)
    np.savez(folder / "times.npz", times_ns=times_ns)
    (folder / "out.npz").unlink(missing_ok=True)
    command = ["taskset", "-c", str(cpu), sys.executable, str(_TIMED), str(port)]
    command += [str(folder / name) for name in ("times.npz", "message", "out.npz")] + [str(DRAIN_S), str(CONNECTIONS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as caller:
        try:
            end_s = time.monotonic() + (float(times_ns[-1]) / 1e9 if len(times_ns) else 0.0) + 30.0
            while caller.poll() is None:
                try:
                    caller.wait(_LOOK_S)
                except subprocess.TimeoutExpired:
                    if time.monotonic() > end_s:
                        raise SiteFailed("the caller does not come to an end") from None
                if look is not None:
                    look()
        finally:
            if caller.poll() is None:
                caller.kill()
        assert caller.stderr is not None
        if caller.returncode != 0:
            raise SiteFailed(f"the caller failed: {caller.stderr.read()[-1000:]}")
    with np.load(folder / "out.npz") as stored:
        return dict(stored)


class Site:
    """From ``with`` to the end of the block: a server with a workload's models, none of them asked but by ``drive``."""

    def __init__(self, workload: Workload, folder: Path, server_cpu: int, load_cpu: int) -> None:
        self.workload, self._folder, self._load_cpu = workload, folder, load_cpu
        (folder / "models").mkdir(parents=True, exist_ok=True)
        self.models = workload.write(folder / "models")
        os.environ["OMP_NUM_THREADS"] = "1"
        self._server = Watched(folder / "models", cpu=server_cpu)
        self.has_priority = self._server.has_priority

    def __enter__(self) -> Site:
        self.tell()
        return self

    def __exit__(self, *details: Any) -> None:
        self._server.__exit__(*details)

    def tell(self, **policy: Any) -> dict[str, Any]:
        """Sets the policy of a ``model``, if any, and reads what the server tells of itself."""
        try:
            return self._server.tell(**policy)
        except (OSError, ValueError) as error:
            raise SiteFailed(f"the server has ended: {error}") from error

    def drive(self, policy: str | Point, times_ns: npt.NDArray[np.int64]) -> Drive:
        """The requests under a policy; the server has nothing left to do before and after."""
        tuning = policy if isinstance(policy, str) else "off"
        model = self.models[tuning]
        if isinstance(policy, Point):
            rows = policy.max_requests * self.workload.request_rows
            self.tell(model=model, max_rows=rows, delay_us=policy.delay_us)
        first = told = self._await_empty(model)
        looks = []

        def look() -> None:
            nonlocal told
            before, told = told, self.tell()
            looks.append(Window.between(read_observation(before, model), read_observation(told, model)))

        out = drive(told["port"], times_ns, self.workload.encode(model), self._folder, self._load_cpu, look)
        window = Window.between(read_observation(first, model), read_observation(told, model))
        self._await_empty(model)
        return Drive(out, tuple(looks), window, first, told)

    def _await_empty(self, model: str) -> dict[str, Any]:
        end_s = time.monotonic() + _EMPTY_S
        while time.monotonic() < end_s:
            told = self.tell()
            if told["models"][model]["waiting"] == 0 and told["models"][model]["running"] == 0:
                return told
            time.sleep(0.05)
        raise SiteFailed(f"'{model}' has requests left {_EMPTY_S:g} s after the last caller has gone")
