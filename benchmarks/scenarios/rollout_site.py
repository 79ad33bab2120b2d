"""A server with a registry on one CPU, its operator, and a steady load from another, each a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from aiorch_client.admin import AdminClient, Deployment, Rollout, RolloutPlan, RolloutState

from benchmarks.machine import ROOT
from benchmarks.peers.h2load import LoadFailed
from benchmarks.peers.process import ServerProcess, find_free_port
from benchmarks.peers.servers import find_aiorch

MODEL = "adder"
START_S = 60.0
STATE_S = 120.0
_END_S = 30.0
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cpus:
    """Where the server runs, and where everything else."""

    server: int
    load: int


@dataclass(frozen=True, slots=True)
class Load:
    """What became of each request, in the order of sending; see paced.py."""

    due_ns: Numbers
    sent_ns: Numbers
    answered_ns: Numbers
    version: Numbers
    code: Numbers
    errors: tuple[str, ...]
    has_precedence: bool

    @property
    def lost(self) -> int:
        """Requests without an answer."""
        return int((self.answered_ns == 0).sum())

    @property
    def failed(self) -> int:
        """Requests whose answer is not OK, or is wrong."""
        return int((self.code != 0).sum())

    def latency_us(self, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """From due to answered, of the chosen requests that were answered well."""
        kept = chosen & (self.code == 0) & (self.answered_ns > 0)
        return (self.answered_ns[kept] - self.due_ns[kept]) / 1000

    def lag_us(self) -> npt.NDArray[np.float64]:
        """From due to sent: how late the generator itself was."""
        return (self.sent_ns - self.due_ns) / 1000


class PacedLoad:
    """A load that goes on until ``finish``; from ``with`` to the end of the block."""

    def __init__(self, port: int, folder: Path, cpu: int, *, rate: float, limit: int = 0) -> None:
        self._output = folder / f"load-{time.monotonic_ns()}.npz"
        command = ["taskset", "-c", str(cpu), sys.executable, str(ROOT / "benchmarks" / "scenarios" / "paced.py")]
        command += [str(port), MODEL, str(self._output), "--rate", str(rate), "--limit", str(limit)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> PacedLoad:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise LoadFailed("the load did not begin")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def finish(self, limit_s: float = _END_S) -> Load:
        """Sends nothing more (a load with a limit: when that is sent), waits for answers, and gives what came."""
        if self._process.stdin is not None:
            self._process.stdin.close()
            self._process.stdin = None
        return self.await_end(limit_s)

    def await_end(self, limit_s: float) -> Load:
        """Waits until the load's own limit is reached."""
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise LoadFailed(f"the load did not end within {limit_s:g} s") from None
        if code:
            raise LoadFailed(f"the load ended with code {code}")
        with np.load(self._output) as found:
            return Load(
                *(found[name].astype(np.int64) for name in ("due_ns", "sent_ns", "answered_ns", "version", "code")),
                errors=tuple(str(text) for text in found["errors"]),
                has_precedence=bool(found["has_precedence"]),
            )


@dataclass(frozen=True, slots=True)
class Site:
    """A running server, and who operates it."""

    process: ServerProcess
    port: int
    admin: AdminClient
    folder: Path
    cpus: Cpus

    def push(self, folder: Path, version: int) -> None:
        """Uploads a folder as the version of that number."""
        pushed = self.admin.push(MODEL, folder)
        if pushed.version != version:
            raise LoadFailed(f"what was pushed became version {pushed.version}, expected {version}")

    def deploy(self, version: int, plan: RolloutPlan | None = None) -> Rollout:
        """Begins a rollout."""
        deployment: Deployment = self.admin.deploy(MODEL, version, plan=plan)
        if deployment.rollout is None:
            raise LoadFailed(f"deploying version {version} began no rollout")
        return deployment.rollout

    def finish(self, rollout: Rollout, wanted: RolloutState, *, look_s: float = 0.1) -> Rollout:
        """Waits for a rollout's end; LoadFailed where it is another one than ``wanted``."""
        ended = self.admin.wait(rollout, timeout_s=STATE_S, look_s=look_s)
        if ended.state is not wanted:
            raise LoadFailed(f"the rollout to version {ended.to_version} is {ended.state.value}: {ended.reason}")
        return ended

    def load(self, rate: float, limit: int = 0) -> PacedLoad:
        """Requests without a version for the model."""
        return PacedLoad(self.port, self.folder, self.cpus.load, rate=rate, limit=limit)


@contextmanager
def start_site(folder: Path, cpus: Cpus, scheduling: str = "plain") -> Iterator[Site]:
    """A server without models, with an empty registry on SQLite, all of it below ``folder``."""
    folder.mkdir()
    (folder / "models").mkdir()
    port = find_free_port()
    settings = {
        "repository": {"paths": [str(folder / "models")]},
        "grpc": {"host": "127.0.0.1", "port": port},
        "http": {"enabled": False},
        "metrics": {"enabled": False},
        "execution": {"allow_code": True, "scheduling": scheduling},
        "registry": {
            "url": f"sqlite:///{folder / 'registry.db'}",
            "artefacts": str(folder / "artefacts"),
            "cache_folder": str(folder / "cache"),
        },
    }
    (folder / "server.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    command, environment = find_aiorch()
    command += ["--config", str(folder / "server.yaml")]
    with ServerProcess("aiorch", command, cpus.server, folder / "log", environment) as process:
        process.await_port(port, START_S)
        with AdminClient(f"127.0.0.1:{port}") as admin:
            yield Site(process, port, admin, folder, cpus)
