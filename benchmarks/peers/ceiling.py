"""What onnxruntime alone does with a model on one CPU: the ceiling of every server. Prints JSON.

``ceiling.py FOLDER NAME CPU SECONDS`` prints ``{"1": rows per second, "8": ..., "32": ...}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.process import raise_priority
from benchmarks.peers.workload import make_onnx, open_session

BATCHES = (1, 8, 32)


def measure(folder: Path, name: str, seconds: float) -> dict[int, float]:
    """Rows per second for batches of one row repeated, as the load generator repeats it."""
    workload = make_onnx(name, folder)
    assert workload.onnx is not None
    session = open_session(workload.onnx)
    rates = {}
    for batch in BATCHES:
        inputs = {tensor: rows[:1].repeat(batch, axis=0) for tensor, rows in workload.rows.items()}
        session.run(None, inputs)
        rounds, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds or rounds < 2:
            session.run(None, inputs)
            rounds += 1
        rates[batch] = batch * rounds / elapsed
    return rates


if __name__ == "__main__":
    # A session of its own was made by the caller, so the priority is this process's alone.
    raise_priority(os.getpid())
    os.sched_setaffinity(0, {int(sys.argv[3])})
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2], float(sys.argv[4]))))
