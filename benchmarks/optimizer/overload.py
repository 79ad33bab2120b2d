"""Triton under the same overload, with the queue that it has by itself and with a bounded one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.optimizer.workloads import Workload


@dataclass(frozen=True, slots=True)
class Peer:
    title: str


def list_peers(workload: Workload, folder: Path, cache: Path, cpu: int, skip: Callable[[str], None]) -> Iterator[Peer]:
    yield from ()


def run_peer(
    peer: Peer, workload: Workload, times_ns: npt.NDArray[np.int64], folder: Path, load_cpu: int
) -> dict[str, Any]:
    raise NotImplementedError
