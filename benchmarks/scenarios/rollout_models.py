"""Versions of a model to roll out: each answers ``input + its number``, some with a fault of their own."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save_model

_CONFIG = """
backend: "{backend}" max_batch_size: 64
input [ {{ name: "INPUT0" data_type: TYPE_FP32 dims: [ 4 ] }} ]
output [ {{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 4 ] }} ]
dynamic_batching {{ }}
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
"""
_CODE = """
import time

import numpy as np


class Model:
    calls = 0

    def execute(self, inputs):
        rows = inputs["INPUT0"]
        self.calls += 1
        {fault}
        return {{"OUTPUT0": rows + np.float32({version})}}
"""


class Fault(StrEnum):
    """What is wrong with a candidate."""

    NONE = "good"
    SLOW = "slow"
    ERRING = "erring"
    DIFFERING = "differing"


#: What an erring candidate says; the stable version never does.
COMPLAINT = "the candidate gave up"
SLOW_MS = 5
_FAULTS = {
    Fault.NONE: "pass",
    Fault.SLOW: f"time.sleep({SLOW_MS / 1000})",
    Fault.ERRING: f'if (rows[:, 0] % 5120 == 1024).any():\n            raise ValueError("{COMPLAINT}")',
    Fault.DIFFERING: "rows = np.where(rows % 5120 == 1024, rows + np.float32(512), rows)",
}


def write_onnx(folder: Path, version: int) -> Path:
    """A version in ONNX Runtime: FP32 [rows, 4], and ``version`` added; the folder to be pushed."""
    folder.mkdir(parents=True)
    shape = ["rows", 4]
    graph = helper.make_graph(
        [helper.make_node("Add", ["INPUT0", "VERSION"], ["OUTPUT0"])],
        "adder",
        [helper.make_tensor_value_info("INPUT0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("OUTPUT0", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.float32(version).reshape(()), "VERSION")],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    save_model(model, str(folder / "model.onnx"))
    (folder / "config.pbtxt").write_text(_CONFIG.format(backend="onnxruntime"), encoding="utf-8")
    return folder


def write_python(folder: Path, version: int, fault: Fault) -> Path:
    """A version in Python, the same but for its fault: slow in each batch, or wrong about every fifth request.

    Never about zeros: a server warms up with them, and does not load what fails then.
    """
    folder.mkdir(parents=True)
    code = _CODE.format(version=version, fault=_FAULTS[fault])
    (folder / "model.py").write_text(code, encoding="utf-8")
    (folder / "config.pbtxt").write_text(_CONFIG.format(backend="python"), encoding="utf-8")
    return folder
