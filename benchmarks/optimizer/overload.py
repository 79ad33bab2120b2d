"""Triton under the same overload, with the queue that it has by itself and with bounded ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.console import Console

from benchmarks.optimizer.cells import judge
from benchmarks.optimizer.site import SiteFailed, drive
from benchmarks.optimizer.workloads import Workload
from benchmarks.peers import workload as peers
from benchmarks.peers.process import ServerProcess, find_free_port
from benchmarks.peers.servers import Situation
from benchmarks.peers.triton_server import PYTRITON, plan_triton

_START_S: Final = 60.0
#: Triton's entrants, and what they put in the place of ``dynamic_batching { }``. A bounded queue, be it by time or by
#: size, is emptied in half the objective: as long as it may be without most answers being late. A full one by size
#: was seen to leave Triton idle for half a second at a time.
QUEUES: Final = {
    "triton": "dynamic_batching {{ }}",
    "triton_timed": "dynamic_batching {{ default_queue_policy {{ timeout_action: REJECT "
    "default_timeout_microseconds: {half_us} }} }}",
    "triton_sized": "dynamic_batching {{ default_queue_policy {{ max_queue_size: {bound} }} }}",
}


@dataclass(frozen=True, slots=True)
class Peer:
    """A running Triton with the workload's model."""

    entrant: str
    model: str
    port: int

    def run(
        self, workload: Workload, times_ns: npt.NDArray[np.int64], ramp_s: float, seconds: float, folder: Path, cpu: int
    ) -> dict[str, Any]:
        """Drives the load, and says what came of what was due after the ramp."""
        out = drive(self.port, times_ns, workload.encode(self.model), folder, cpu)
        return judge(out, times_ns, workload.objective_us, ramp_s, seconds)


def find_triton(cache: Path) -> str:
    """Why there is no Triton on this machine; "" where there is."""
    binaries = (cache / f"triton-{PYTRITON}").glob("lib/python*/site-packages/pytriton/tritonserver/bin/tritonserver")
    return (
        "" if any(binaries) else f"Triton: not installed here ('make bench-peers' installs nvidia-pytriton {PYTRITON})"
    )


@contextmanager
def start_triton(
    entrant: str, workload: Workload, capacity: float, folder: Path, cache: Path, cpus: tuple[int, int]
) -> Iterator[Peer]:
    """On the server's CPU (the first of two); SiteFailed where it does not answer rightly within a minute."""
    folder.mkdir(parents=True)
    port = find_free_port()
    situation = Situation(_describe(workload), port, folder, cache)
    plan = plan_triton(situation, Console(stderr=True))
    config = folder / "repository" / workload.name / "config.pbtxt"
    half_us = workload.objective_us // 2
    queue = QUEUES[entrant].format(half_us=half_us, bound=max(1, round(capacity * half_us / 1e6)))
    config.write_text(config.read_text().replace("dynamic_batching { }", queue))
    with ExitStack() as stack:
        process = stack.enter_context(ServerProcess(entrant, plan.command, cpus[0], folder / "log", plan.environment))
        process.await_port(port, _START_S)
        peer = Peer(entrant, workload.name, port)
        _await_answer(peer, workload, process, folder, cpus[1])
        yield peer


def _await_answer(peer: Peer, workload: Workload, process: ServerProcess, folder: Path, cpu: int) -> None:
    end_s = time.monotonic() + _START_S
    while time.monotonic() < end_s:
        process.check_alive()
        if drive(peer.port, np.zeros(1, np.int64), workload.encode(peer.model), folder, cpu)["code"][0] == 0:
            return
    raise SiteFailed(f"{peer.entrant} gives no answer after {_START_S:g} s")


def _describe(workload: Workload) -> peers.Workload:
    session = peers.open_session(workload.onnx)
    inputs, outputs = (
        tuple(peers.read_signature(tensor) for tensor in tensors)
        for tensors in (session.get_inputs(), session.get_outputs())
    )
    return peers.Workload(
        workload.name, workload.name, workload.max_rows, inputs, outputs, workload.rows, {}, workload.onnx
    )
