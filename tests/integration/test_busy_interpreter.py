"""A model's thread that never leaves Python alone: batches wait for it as shortly as the setting says."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import pytest
from aiorch_client import Client
from served import serve

BUSY_MODEL = """
import sys
import threading
import numpy as np

def spin():
    while True:
        sum(range(1000))

class Model:
    inputs = [("x", "FP32", [1])]
    outputs = [("interval", "FP64", [1])]

    def load(self, context):
        threading.Thread(target=spin, daemon=True).start()

    def execute(self, inputs):
        return {"interval": np.full(1, sys.getswitchinterval())}
"""
ROW = np.ones(1, np.float32)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "busy" / "1").mkdir(parents=True)
    (tmp_path / "busy" / "1" / "model.py").write_text(BUSY_MODEL)
    return tmp_path


def measure(repository: Path, *options: str) -> tuple[float, float]:
    """The switch interval in the server, and the median latency of a Python model beside a busy thread."""
    seconds = []
    with serve(repository, *options) as server, Client(server.grpc) as client:
        interval = client.infer("busy", {"x": ROW}).outputs["interval"].item()
        for _ in range(20):
            time.sleep(0.005)  # a client that asks again at once is back before the busy thread has woken up
            started = time.perf_counter()
            client.infer("busy", {"x": ROW})
            seconds.append(time.perf_counter() - started)
    return interval, statistics.median(seconds)


@pytest.mark.alone
def test_the_switch_interval_bounds_the_wait_for_a_busy_thread(repository: Path) -> None:
    interval, latency = measure(repository)
    assert interval == pytest.approx(0.0005)
    slow_interval, slow_latency = measure(repository, "--set", "execution_switch_interval_us=50000")
    assert slow_interval == pytest.approx(0.05)
    assert latency < 0.5 * slow_latency
