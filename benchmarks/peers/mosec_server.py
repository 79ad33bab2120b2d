"""A mosec server for one workload: raw bytes of a row in, raw bytes of the output out, one call per batch.

Runs in an environment of its own: mosec, numpy and onnxruntime, nothing of this project. The workload comes in
``BENCH_WORKLOAD`` as JSON, because mosec starts the process that runs the model anew; the command line is mosec's.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import onnxruntime
from mosec import Server, Worker  # type: ignore[import-not-found]


class Model(Worker):  # type: ignore[misc]
    """The rows' inputs are split by offset, joined per input, and the output is split by rows."""

    def __init__(self) -> None:
        workload = json.loads(os.environ["BENCH_WORKLOAD"])
        self._inputs = [(name, np.dtype(kind), dims) for name, kind, dims in workload["inputs"]]
        self._session = None
        if workload["onnx"]:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.inter_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(workload["onnx"], options, providers=["CPUExecutionProvider"])

    def deserialize(self, data: bytes) -> bytes:
        return data

    def serialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[bytes]:
        if self._session is None:
            return data
        inputs: dict[str, Any] = {}
        start = 0
        for name, dtype, dims in self._inputs:
            end = start + dtype.itemsize * int(np.prod(dims))
            inputs[name] = np.frombuffer(b"".join([row[start:end] for row in data]), dtype).reshape(-1, *dims)
            start = end
        (output,) = self._session.run(None, inputs)
        return [row.tobytes() for row in output]


if __name__ == "__main__":
    settings = json.loads(os.environ["BENCH_WORKLOAD"])
    server = Server()
    server.append_worker(Model, num=1, max_batch_size=settings["max_batch"], timeout=60)
    server.run()
