"""Queue policies per priority level and the order of answers, through a whole server with tritonclient."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from running_site import Site

TENSORS = """
    input { name: "X" data_type: TYPE_FP32 dims: [1] }
    output { name: "Y" data_type: TYPE_FP32 dims: [1] }"""
#: An input of 100 or more waits for the file of that number; each run gives its place in the order of runs.
MODEL = """
import pathlib, time
class Model:
    inputs, outputs, max_batch_size = [("X", "FP32", [1])], [("Y", "FP32", [1])], 1
    runs = 0
    def execute(self, inputs):
        value = inputs["X"][0, 0]
        gate, until = pathlib.Path(ROOT, f"{value:.0f}"), time.monotonic() + 30
        while value >= 100 and not gate.exists() and time.monotonic() < until:
            time.sleep(0.002)
        self.runs += int(value > 0)
        return {"Y": inputs["X"] * 0 + self.runs}
"""
CONFIGS = {
    "levels": """dynamic_batching {
        priority_levels: 3 default_priority_level: 2
        default_queue_policy { max_queue_size: 2 }
        priority_queue_policy { key: 1 value { max_queue_size: 1 allow_timeout_override: true } }
        priority_queue_policy { key: 3 value {
            timeout_action: DELAY default_timeout_microseconds: 100000000 allow_timeout_override: true } } }""",
    "ordered": "dynamic_batching { preserve_ordering: true } instance_group { count: 2 }",
}


class Asking:
    """Requests under way; ``found`` are the answers in the order in which they came."""

    def __init__(self, site: Site, model: str) -> None:
        self.found: list[tuple[str, Any]] = []
        self._servable = next(each for each in site.application.manager.servables() if each.name == model)
        self._model = model
        self._client = grpc_client.InferenceServerClient(site.target)
        self._came = threading.Condition()

    def send(self, name: str, value: float, *, is_queued: bool = True, **options: Any) -> Any:
        """Returns once it waits in the queue, or runs with ``is_queued`` False, or is answered."""

        def keep(result: Any, error: Any) -> None:
            with self._came:
                self.found.append((name, str(error) if error else float(result.as_numpy("Y")[0, 0])))
                self._came.notify_all()

        tensor = grpc_client.InferInput("X", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.array([[value]], np.float32))
        scheduler = self._servable.scheduler
        queued, in_flight, answered = scheduler.pending, scheduler.in_flight, len(self.found)
        call = self._client.async_infer(self._model, [tensor], keep, **options)
        wait_until(
            lambda: (
                scheduler.pending > queued
                if is_queued
                else (scheduler.in_flight > in_flight and scheduler.pending == 0) or len(self.found) > answered
            )
        )
        return call

    def wait(self, count: int) -> list[tuple[str, Any]]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.found) >= count, 30)
            return list(self.found)

    def close(self) -> None:
        self._client.close()


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(10_000):
        if condition():
            return
        pause.wait(0.002)
    raise AssertionError("did not come")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    for name, config in CONFIGS.items():
        (tmp_path / "models" / name / "1").mkdir(parents=True)
        (tmp_path / "models" / name / "1" / "model.py").write_text(MODEL.replace("ROOT", repr(str(tmp_path))))
        (tmp_path / "models" / name / "config.pbtxt").write_text(
            f'backend: "python" max_batch_size: 1 {TENSORS} {config}'
        )
    opened = Site(tmp_path / "models", io_threads=1, execution={"backends": ["aiorch_backends.python:PythonBackend"]})
    yield opened
    opened.close()


def test_each_level_by_its_own_policy(site: Site, tmp_path: Path) -> None:
    asking = Asking(site, "levels")
    asking.send("first", 100, is_queued=False)
    asking.send("short", 1, priority=1, timeout=1_500_000)
    asking.send("full", 1, is_queued=False, priority=1)
    assert "Exceeds maximum queue size" in asking.wait(1)[0][1]
    asking.send("two", 1)
    asking.send("two again", 1, timeout=1)  # its level does not let a request say so
    asking.send("full too", 1, is_queued=False, priority=2)
    assert "Exceeds maximum queue size" in asking.wait(2)[1][1]
    asking.send("delayed", 1, priority=3, timeout=1000)
    for index in range(4):  # any number
        asking.send(f"three {index}", 1, priority=3)
    assert "Request timeout expired" in asking.wait(3)[2][1], "while the first runs"
    (tmp_path / "100").touch()
    found = dict(asking.wait(11))
    asking.close()
    assert "Request timeout expired" in found["short"]
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    assert numbers == {
        "first": 1, "two": 2, "two again": 3, "three 0": 4, "three 1": 5, "three 2": 6, "three 3": 7, "delayed": 8,
    }  # fmt: skip
    with grpc_client.InferenceServerClient(site.target) as client:
        shown = client.get_model_config("levels").config.dynamic_batching
    assert shown.priority_queue_policy[1].max_queue_size == 1
    assert shown.priority_queue_policy[3].timeout_action == 1
    assert (shown.priority_levels, shown.default_queue_policy.max_queue_size) == (3, 2)


def test_answers_leave_in_order_whoever_is_cancelled(site: Site, tmp_path: Path) -> None:
    """Two instances: what the second one has run waits for what the first one runs."""
    asking = Asking(site, "ordered")
    given_up = asking.send("given up", 100, is_queued=False)
    asking.send("slow", 101, is_queued=False)
    for index in range(3):
        asking.send(str(index), 1)
    given_up.cancel()
    assert "Locally cancelled" in asking.wait(1)[0][1]
    (tmp_path / "100").touch()
    scheduler = next(each for each in site.application.manager.servables() if each.name == "ordered").scheduler
    wait_until(lambda: scheduler.counters().rows >= 3)  # the three have run behind the one that was given up
    assert scheduler.in_flight == 4
    assert len(asking.found) == 1
    (tmp_path / "101").touch()
    assert [name for name, _ in asking.wait(5)] == ["given up", "slow", "0", "1", "2"]
    asking.close()
    with grpc_client.InferenceServerClient(site.target) as client:
        assert client.get_model_config("ordered").config.dynamic_batching.preserve_ordering
