"""Drives ``h2load`` (nghttp2): a fixed number of requests from one pinned process, and what it says about them."""

from __future__ import annotations

import re
import resource
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.peers.process import raise_priority

_FINISHED = re.compile(r"^finished in \S+, ([\d.]+) req/s", re.M)
_REQUESTS = re.compile(
    r"^requests: (\d+) total, \d+ started, (\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout",
    re.M,
)
_STATUS = re.compile(r"^status codes: (\d+) 2xx", re.M)
_TRAFFIC = re.compile(r"^traffic: .*?\((\d+)\) total, .*?\((\d+)\) headers.*?\((\d+)\) data", re.M)


class LoadFailed(RuntimeError):
    """The run is void: h2load failed, or not every request was answered as it should be."""


@dataclass(frozen=True, slots=True)
class H2LoadRun:
    """One run in which every request succeeded; ``data_bytes`` counts DATA payload: error answers make it too small."""

    requests: int
    req_per_s: float
    data_bytes: int
    cpu_s: float

    @property
    def wall_s(self) -> float:
        return self.requests / self.req_per_s


@dataclass(frozen=True, slots=True)
class H2Load:
    """How to call h2load: where to post what, with which headers, and the CPU to run on."""

    url: str
    payload: Path
    headers: Sequence[str]
    cpu: int
    is_http1: bool = False

    def run(self, connections: int, streams: int, requests: int, response_bytes: int) -> H2LoadRun:
        """Sends ``requests`` calls; LoadFailed unless each got exactly ``response_bytes`` of DATA."""
        run = self._start(connections, streams, requests)
        if run.data_bytes != requests * response_bytes:
            raise LoadFailed(
                f"{requests} answers carried {run.data_bytes} bytes of DATA, expected {requests * response_bytes}: "
                "some answers were errors or not the right ones"
            )
        return run

    def measure_latencies_us(self, connections: int, streams: int, requests: int) -> npt.NDArray[np.float64]:
        """Response times of ``requests`` calls, float64 ``[requests]`` microseconds."""
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            self._start(connections, streams, requests, "--log-file", str(log))
            rows = np.fromfile(log, sep=" ").reshape(-1, 3)  # start in us, HTTP status, duration in us
        if len(rows) != requests or not (rows[:, 1] == 200).all():
            raise LoadFailed(f"the log holds {len(rows)} requests of {requests}, or some were not answered with 200")
        return np.ascontiguousarray(rows[:, 2])

    def _start(self, connections: int, streams: int, requests: int, *more: str) -> H2LoadRun:
        if self.is_http1:  # one request at a time on a connection
            connections, streams = connections * streams, 1
            more = ("--h1", *more)
        command = ["taskset", "-c", str(self.cpu), "h2load", "-t1", f"-c{connections}", f"-m{streams}", f"-n{requests}"]
        command += [argument for header in self.headers for argument in ("-H", header)]
        command += ["-d", str(self.payload), *more, self.url]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        text = _run_bounded(command, timeout_s=120.0)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
        return parse_output(text, cpu_s)


def parse_output(text: str, cpu_s: float = 0.0) -> H2LoadRun:
    """Reads h2load's summary; LoadFailed when it is not one or any request did not succeed with HTTP 2xx."""
    finished, counted, status, traffic = (pattern.search(text) for pattern in (_FINISHED, _REQUESTS, _STATUS, _TRAFFIC))
    if not (finished and counted and status and traffic):
        raise LoadFailed(f"h2load gave no summary:\n{text[-2000:]}")
    total, done, succeeded, failed, errored, timed_out = (int(value) for value in counted.groups())
    if not (total == done == succeeded == int(status[1])) or failed or errored or timed_out:
        raise LoadFailed(f"not every request succeeded: {counted[0]}; {status[0]}")
    return H2LoadRun(total, float(finished[1]), int(traffic[3]), cpu_s)


def _run_bounded(command: list[str], timeout_s: float) -> str:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        raise_priority(process.pid)
        try:
            text, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise LoadFailed(f"h2load did not finish within {timeout_s:g} s") from None
        finally:
            process.kill()
    if process.returncode != 0:
        raise LoadFailed(f"h2load ended with code {process.returncode}:\n{text[-2000:]}")
    return text
