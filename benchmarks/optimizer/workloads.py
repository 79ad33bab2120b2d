"""The models of the comparison of batching policies, whose right answers to "how many in a batch?" differ.

- ``mlp``: 512-5120-5120-16, seeded weights. They are read once for a batch, so that batches pay.
- ``minilm``: the sentence embedding of ``benchmarks/models``; batches bring nothing, and large ones cost.
- ``forest``: scikit-learn's random forest of 1600 trees on its digits, converted to ONNX; eight rows in each request.

Each is served as several models, one for each policy, from one file and with one instance.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from aiorch_proto.v2 import inference_pb2 as pb
from onnx import TensorProto, helper, numpy_helper, save_model

from benchmarks.peers.workload import ensure_models, open_session

#: The parameter ``tuning`` of the models that a workload is served as.
TUNINGS: Final = ("auto", "aimd", "linear", "off")
_WIDTHS: Final = (512, 5120, 5120, 16)
_TREES: Final = 1600
_BATCHES: Final = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Workload:
    """A model as it is asked: ``request_rows`` in each request, at most ``max_requests`` of them in a batch."""

    name: str
    onnx: Path
    objective_us: int
    rows: dict[str, np.ndarray] = field(repr=False)
    request_rows: int = 1
    max_requests: int = 32

    @property
    def max_rows(self) -> int:
        """Of a batch."""
        return self.request_rows * self.max_requests

    def encode(self, model: str) -> bytes:
        """A serialised request to one of the models."""
        request = pb.ModelInferRequest(model_name=model)
        for name, values in self.rows.items():
            taken = values[: self.request_rows]
            datatype = {"float32": "FP32", "int64": "INT64"}[str(taken.dtype)]
            request.inputs.add(name=name, datatype=datatype, shape=taken.shape)
            request.raw_input_contents.append(np.ascontiguousarray(taken).tobytes())
        return bytes(request.SerializeToString())

    def write(self, repository: Path) -> dict[str, str]:
        """Writes the models into a repository: their names, by the policy."""
        names = {tuning: f"{self.name}_{tuning}" for tuning in TUNINGS}
        for tuning, name in names.items():
            (repository / name / "1").mkdir(parents=True)
            shutil.copy(self.onnx, repository / name / "1" / "model.onnx")
            text = f'name: "{name}" backend: "onnxruntime" max_batch_size: {self.max_rows}\ndynamic_batching {{ }}\n'
            text += "instance_group [ { count: 1 kind: KIND_CPU } ]\n"
            for key, value in (("objective", f"p99={self.objective_us}us"), ("tuning", tuning)):
                text += f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
            (repository / name / "config.pbtxt").write_text(text)
        return names

    def measure_curve(self) -> dict[int, float]:
        """Milliseconds by requests in a batch, in this process and on one thread; the best of some."""
        session = open_session(self.onnx)
        curve = {}
        for count in _BATCHES:
            # what the load sends: the same request again and again
            rows = {name: np.concatenate([values[: self.request_rows]] * count) for name, values in self.rows.items()}
            times, end_s = [], time.perf_counter() + 0.3
            while len(times) < 3 or time.perf_counter() < end_s:
                began_s = time.perf_counter()
                session.run(None, rows)
                times.append(time.perf_counter() - began_s)
            curve[count] = 1000 * min(times[1:])
        return curve


def make_mlp(folder: Path) -> Workload:
    path = folder / "mlp.onnx"
    if not path.exists():
        random = np.random.default_rng(1)
        nodes, weights, name = [], [], "x"
        for layer, (taken, given) in enumerate(itertools.pairwise(_WIDTHS)):
            values = random.standard_normal((taken, given), np.float32) / np.float32(math.sqrt(taken))
            weights.append(numpy_helper.from_array(values, f"w{layer}"))
            nodes.append(helper.make_node("MatMul", [name, f"w{layer}"], [f"m{layer}"]))
            nodes.append(helper.make_node("Tanh", [f"m{layer}"], [name := f"y{layer}"]))
        ends = [
            helper.make_tensor_value_info(each, TensorProto.FLOAT, ["n", size])
            for each, size in (("x", _WIDTHS[0]), (name, _WIDTHS[-1]))
        ]
        graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], weights)
        _keep(path, lambda at: save_model(_make_model(graph), at))
    rows = np.random.default_rng(2).standard_normal((32, _WIDTHS[0]), np.float32)
    return Workload("mlp", path, 50_000, {"x": rows})


def make_forest(folder: Path) -> Workload:
    from sklearn.datasets import load_digits

    path, digits = folder / f"forest-{_TREES}.onnx", load_digits()
    images = digits.data.astype(np.float32)
    if not path.exists():
        from skl2onnx import to_onnx
        from sklearn.ensemble import RandomForestClassifier

        forest = RandomForestClassifier(_TREES, random_state=1).fit(images, digits.target)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = to_onnx(forest, images[:1], options={id(forest): {"zipmap": False}}, target_opset=17)
        _keep(path, lambda at: save_model(made, at))
    name = open_session(path).get_inputs()[0].name
    return Workload("forest", path, 20_000, {name: images[:256]}, request_rows=8, max_requests=8)


def make_minilm(folder: Path) -> Workload:
    made = ensure_models(folder.parent / "onnx")
    with np.load(made / "minilm.npz") as stored:
        return Workload("minilm", made / "minilm.onnx", 300_000, dict(stored))


MAKERS: Final[dict[str, Callable[[Path], Workload]]] = {
    "mlp": make_mlp,
    "minilm": make_minilm,
    "forest": make_forest,
}


def _make_model(graph: Any) -> Any:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _keep(path: Path, save: Callable[[Path], None]) -> None:
    """Whole, or not at all; it must be a model that runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save(partial)
    onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
    partial.replace(path)
