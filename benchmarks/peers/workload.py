"""What the servers of the comparison are asked, and how their answers are judged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from tritonclient.grpc import service_pb2

from benchmarks.machine import ROOT

IDENTITY = "identity_fp32"
DATATYPES: dict[str, np.dtype[np.generic]] = {"FP32": np.dtype(np.float32), "INT64": np.dtype(np.int64)}
#: The largest batch that each server may form. Where batches no longer pay on one core (see the ceiling's figures),
#: a larger one would only make callers wait.
MAX_BATCH = {"identity": 64, "mlp": 64, "minilm": 8, "image": 8}
_MAKE_MODELS = ROOT / "benchmarks" / "models" / "make.py"

Array = npt.NDArray[np.generic]


class WrongAnswer(RuntimeError):
    """A server answered something else than the model does."""


@dataclass(frozen=True, slots=True)
class TensorSignature:
    """A tensor of a served model; ``dims`` without the batch dimension, -1 for any size."""

    name: str
    datatype: str
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """One model: its signature, rows to ask about (``[n, *dims]`` by input), and the right outputs for these rows."""

    name: str
    model: str
    max_batch: int
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    rows: Mapping[str, Array]
    answers: Mapping[str, Array]
    onnx: Path | None = None

    @property
    def row_count(self) -> int:
        return len(self.rows[self.inputs[0].name])

    @property
    def row_bytes(self) -> int:
        """Bytes of all input tensors of one row."""
        return sum(rows[0].nbytes for rows in self.rows.values())

    def request(self, indices: Sequence[int], request_id: str = "bench") -> bytes:
        """A serialised ModelInferRequest for these rows with raw contents; all outputs are wanted."""
        message = service_pb2.ModelInferRequest(model_name=self.model, id=request_id)
        for tensor in self.inputs:
            rows = self.rows[tensor.name].take(indices, axis=0)
            message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=rows.shape)
            message.raw_input_contents.append(np.ascontiguousarray(rows).tobytes())
        return bytes(message.SerializeToString())

    def body(self, index: int) -> bytes:
        """One row as bare bytes, input after input: what servers without a protocol of their own get."""
        return b"".join(self.rows[tensor.name][index].tobytes() for tensor in self.inputs)

    def compare(self, response: bytes, indices: Sequence[int], request_id: str) -> None:
        """WrongAnswer unless the serialised ModelInferResponse holds this request's id and the right outputs."""
        message = service_pb2.ModelInferResponse.FromString(response)
        if message.id != request_id:
            raise WrongAnswer(f"{self.model}: the answer to '{request_id}' carries the id '{message.id}'")
        found: dict[str, Array] = {}
        for output, raw in zip(message.outputs, message.raw_output_contents, strict=True):
            found[output.name] = np.frombuffer(raw, DATATYPES[output.datatype]).reshape(tuple(output.shape))
        if found.keys() != self.answers.keys():
            raise WrongAnswer(f"{self.model}: outputs {sorted(found)}, expected {sorted(self.answers)}")
        for name, array in found.items():
            self._compare_tensor(name, array, self.answers[name].take(indices, axis=0), request_id)

    def compare_body(self, response: bytes, index: int) -> None:
        """WrongAnswer unless the bytes are the one output for this row."""
        ((name, answers),) = self.answers.items()
        if len(response) != answers[index].nbytes:
            raise WrongAnswer(f"{self.model}: {len(response)} bytes of answer, expected {answers[index].nbytes}")
        found = np.frombuffer(response, answers.dtype).reshape(answers[index].shape)
        self._compare_tensor(name, found, answers[index], f"row {index}")

    def is_right(self, response: bytes, indices: Sequence[int], request_id: str) -> bool:
        """Whether ``compare`` accepts the response."""
        try:
            self.compare(response, indices, request_id)
        except WrongAnswer:
            return False
        return True

    def _compare_tensor(self, name: str, found: Array, expected: Array, what: str) -> None:
        is_same = found.dtype == expected.dtype and found.shape == expected.shape
        if not (is_same and np.allclose(found, expected, rtol=1e-4, atol=1e-5)):
            raise WrongAnswer(f"{self.model}: output '{name}' of '{what}' is not what the model gives")


def make_identity() -> Workload:
    """Echoes FP32 [4]: nothing but the server's own cost."""
    rows = np.random.default_rng(7).standard_normal((64, 4), dtype=np.float32)
    return Workload(
        name="identity",
        model=IDENTITY,
        max_batch=MAX_BATCH["identity"],
        inputs=(TensorSignature("INPUT0", "FP32", (4,)),),
        outputs=(TensorSignature("OUTPUT0", "FP32", (4,)),),
        rows={"INPUT0": rows},
        answers={"OUTPUT0": rows},
    )


def make_onnx(name: str, folder: Path) -> Workload:
    """``<name>.onnx`` and its rows ``<name>.npz`` of a folder; judged by onnxruntime in this process."""
    onnx = folder / f"{name}.onnx"
    session = open_session(onnx)
    inputs = tuple(read_signature(tensor) for tensor in session.get_inputs())
    outputs = tuple(read_signature(tensor) for tensor in session.get_outputs())
    with np.load(folder / f"{name}.npz") as stored:
        rows = {tensor.name: stored[tensor.name] for tensor in inputs}
    names = [tensor.name for tensor in outputs]
    answers = dict(zip(names, session.run(names, rows), strict=True))
    return Workload(name, f"bench_{name}", MAX_BATCH.get(name, 64), inputs, outputs, rows, answers, onnx)


def make_workload(name: str, folder: Path) -> Workload:
    """``identity``, or a model of the folder."""
    return make_identity() if name == "identity" else make_onnx(name, folder)


def open_session(onnx: Path) -> onnxruntime.InferenceSession:
    """One thread, as every server of the comparison has it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])


def ensure_models(folder: Path) -> Path:
    """The folder with all models, made by benchmarks/models/make.py when that has changed or nothing is there."""
    stamp, source = folder / "complete", _MAKE_MODELS.read_text(encoding="utf-8")
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != source:
        folder.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        subprocess.run([sys.executable, str(_MAKE_MODELS), str(folder)], check=True, timeout=600)
        stamp.write_text(source, encoding="utf-8")
    return folder


def read_signature(tensor: onnxruntime.NodeArg) -> TensorSignature:
    datatype = {"tensor(float)": "FP32", "tensor(int64)": "INT64"}[tensor.type]
    return TensorSignature(tensor.name, datatype, tuple(d if isinstance(d, int) else -1 for d in tensor.shape[1:]))
