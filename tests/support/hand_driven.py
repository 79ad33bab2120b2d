"""A small echo model, its messages, and an instance that a test steers by hand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np

from aiorch_server._core import Batch, ModelSpec, Scheduler, decode_response, encode_request
from aiorch_server.types import DataType, ModelSignature, TensorSpec

TIMEOUT_S = 20


def make_spec(max_batch_size: int = 8, *, name: str = "echo") -> ModelSpec:
    """FP32 [4] to FP32 [4], and an optional BYTES [-1] that is echoed too."""
    inputs = (TensorSpec("X", DataType.FP32, (-1,)), TensorSpec("TEXT", DataType.BYTES, (-1,), optional=True))
    outputs = (TensorSpec("Y", DataType.FP32, (-1,)),)
    return ModelSpec(name, 3, ModelSignature(inputs, outputs, max_batch_size))


def message(*values: float, id: str = "", width: int = 4) -> bytes:
    """A request with one row per value, each row filled with it."""
    rows = np.repeat(np.array(values, np.float32)[:, None], width, axis=1)
    return encode_request("echo", "", id, [("X", "FP32", rows.shape, rows.tobytes())])


def values_of(response: bytes) -> list[float]:
    """The first column of output Y."""
    _, _, _, outputs = decode_response(response)
    name, datatype, shape, data = outputs[0]
    assert (name, datatype) == ("Y", "FP32")
    rows = np.frombuffer(data, np.float32).reshape(shape)
    assert (rows == rows[:, :1]).all(), "a row holds another row's values"
    return [float(value) for value in rows[:, 0]]


class HandDriven:
    """One instance thread: it takes a batch, says so, and waits until the test lets it run."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.sizes: list[int] = []
        self._taken = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self.execute: Callable[[Batch], None] = self.echo
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @staticmethod
    def echo(batch: Batch) -> None:
        batch.settle({"Y": batch.gather()["X"] * 2})

    def _run(self) -> None:
        batch = Batch(self.scheduler)
        while self.scheduler.take(batch):
            self.sizes.append(batch.members)
            self._taken.release()
            assert self._go.acquire(timeout=TIMEOUT_S)
            self.execute(batch)

    async def until_taken(self) -> None:
        assert await asyncio.to_thread(self._taken.acquire, True, TIMEOUT_S), "no batch was taken"

    def go(self, batches: int = 1) -> None:
        self._go.release(batches)

    def stop(self) -> None:
        self.scheduler.close()
        self._go.release(1000)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
