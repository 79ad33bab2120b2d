"""Models that add up the elements of each request of a ragged batch, in every framework; and some that misbehave."""

from __future__ import annotations

from pathlib import Path

INPUT = '{ name: "INPUT" data_type: TYPE_FP32 dims: [-1] allow_ragged_batch: true }'
SUM = '{ name: "SUM" data_type: TYPE_FP32 dims: [1] }'
TWICE = '{ name: "TWICE" data_type: TYPE_FP32 dims: [-1] }'
COUNT = '{ name: "COUNT" data_type: TYPE_INT32 dims: [1] }'
ENDS = """batch_input { kind: BATCH_ACCUMULATED_ELEMENT_COUNT
    target_name: "INDEX" data_type: TYPE_INT32 source_input: "INPUT" }"""
SCATTER = 'batch_output { target_name: "TWICE" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "INPUT" }'
#: What every model here gives: the sum of the request's elements, their doubles, and how many ran in its batch.
TENSORS = f"input {INPUT} output [ {SUM}, {TWICE}, {COUNT} ] {ENDS} {SCATTER}"

#: 13 fails the batch that it is in, 26 makes an output too short; 100 and more waits for the file of that number.
PYTHON = """
import pathlib, time
import numpy as np

class Model:
    def execute(self, inputs):
        values, ends = inputs["INPUT"], inputs["INDEX"]
        assert values.ndim == ends.ndim == 1 and ends[-1] == len(values)
        if 13 in values:
            raise ValueError("thirteen")
        until = time.monotonic() + 30
        for gate in values[values >= 100]:
            while not pathlib.Path(ROOT, f"{gate:.0f}").exists() and time.monotonic() < until:
                time.sleep(0.002)
        sums = np.array([part.sum() for part in np.split(values, ends[:-1])], np.float32)
        count = np.full((len(ends), 1), len(ends), np.int32)
        return {"SUM": sums.reshape(-1, 1), "TWICE": 2 * values[int(26 in values):], "COUNT": count}
"""
#: Sees its requests as they came.
TRITON = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            values = pb_utils.get_input_tensor_by_name(request, "INPUT").as_numpy()
            answers.append(pb_utils.InferenceResponse([
                pb_utils.Tensor("SUM", values.sum(axis=1, keepdims=True)),
                pb_utils.Tensor("TWICE", 2 * values),
                pb_utils.Tensor("COUNT", np.full((len(values), 1), len(requests), np.int32)),
            ]))
        return answers
"""


def write_model(root: Path, name: str, config: str, *, file: str = "", text: str = "") -> Path:
    """The version's folder, with a config.pbtxt beside it and perhaps a file of text in it."""
    folder = root / name / "1"
    folder.mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(config)
    if file:
        (folder / file).write_text(text)
    return folder


def write_python(root: Path, name: str, config: str, text: str = PYTHON) -> None:
    text = text.replace("ROOT", repr(str(root)))
    write_model(root, name, f'backend: "python" {config}', file="model.py", text=text)


def save_onnx(folder: Path) -> None:
    """Sums by a running sum over all elements, looked up where each request ends."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("CumSum", ["INPUT", "axis"], ["running"]),
        helper.make_node("Concat", ["zero", "running"], ["padded"], axis=0),
        helper.make_node("Gather", ["padded", "INDEX"], ["until_end"]),
        helper.make_node("Slice", ["until_end", "first", "last"], ["until_end_before"]),
        helper.make_node("Concat", ["zero", "until_end_before"], ["until_start"], axis=0),
        helper.make_node("Sub", ["until_end", "until_start"], ["sums"]),
        helper.make_node("Unsqueeze", ["sums", "one"], ["SUM"]),
        helper.make_node("Mul", ["INPUT", "two"], ["TWICE"]),
        helper.make_node("Shape", ["INDEX"], ["members"]),
        helper.make_node("Cast", ["members"], ["count"], to=TensorProto.INT32),
        helper.make_node("Unsqueeze", ["count", "one"], ["row"]),
        helper.make_node("Concat", ["members", "one"], ["shape"], axis=0),
        helper.make_node("Expand", ["row", "shape"], ["COUNT"]),
    ]
    import numpy as np

    constants = {
        "axis": np.array(0, np.int64),
        "zero": np.zeros(1, np.float32),
        "two": np.full(1, 2, np.float32),
        "first": np.array([0], np.int64),
        "last": np.array([-1], np.int64),
        "one": np.array([1], np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "sums",
        [info("INPUT", TensorProto.FLOAT, ["elements"]), info("INDEX", TensorProto.INT32, ["members"])],
        [
            info("SUM", TensorProto.FLOAT, ["rows", 1]),
            info("TWICE", TensorProto.FLOAT, ["elements"]),
            info("COUNT", TensorProto.INT32, ["rows", 1]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "model.onnx"
    )


def save_torch(folder: Path) -> None:
    """TorchScript, which learns types, names and shapes from the configuration."""
    import torch
    from torch import Tensor, nn

    class Sums(nn.Module):
        def forward(self, INPUT: Tensor, INDEX: Tensor) -> dict[str, Tensor]:
            padded = torch.cat([torch.zeros(1), torch.cumsum(INPUT, 0)])
            until_end = padded[INDEX.long()]
            sums = until_end - torch.cat([torch.zeros(1), until_end[:-1]])
            count = torch.full([INDEX.size(0), 1], INDEX.size(0), dtype=torch.int32)
            return {"SUM": sums.unsqueeze(1), "TWICE": INPUT * 2, "COUNT": count}

    torch.jit.save(torch.jit.script(Sums().eval()), folder / "model.pt")


def save_tensorflow(folder: Path) -> None:
    import tensorflow as tf

    def add_up(INPUT: tf.Tensor, INDEX: tf.Tensor) -> dict[str, tf.Tensor]:
        segments = tf.searchsorted(INDEX, tf.range(tf.size(INPUT)), side="right")
        members = tf.size(INDEX)
        return {
            "SUM": tf.math.unsorted_segment_sum(INPUT, segments, members)[:, None],
            "TWICE": INPUT * 2,
            "COUNT": tf.fill([members, 1], members),
        }

    module = tf.Module()
    module.add_up = tf.function(
        add_up,
        input_signature=[tf.TensorSpec([None], tf.float32, "INPUT"), tf.TensorSpec([None], tf.int32, "INDEX")],
    )
    tf.saved_model.save(module, str(folder / "model.savedmodel"), signatures=module.add_up)
