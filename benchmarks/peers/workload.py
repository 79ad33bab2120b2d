"""What every server of the comparison is asked, and how its answers are judged."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
import onnxruntime
from sklearn.datasets import load_digits
from tritonclient.grpc import service_pb2

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
IDENTITY = "identity_fp32"
DIGITS = "digits_forest"
_DATATYPES: dict[str, np.dtype[np.generic]] = {"FP32": np.dtype(np.float32), "INT64": np.dtype(np.int64)}
_CHECKED = 48
_AT_ONCE = 16
_TIMEOUT_S = 30.0

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
    """One model: its signature, rows to ask about (``[n, *dims]``), and the right outputs for any batch of rows."""

    name: str
    model: str
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    rows: Array
    answer: Callable[[Array], Mapping[str, Array]]

    def request(self, rows: Array, request_id: str = "bench") -> bytes:
        """A serialised ModelInferRequest for ``rows`` with raw contents; all outputs are wanted."""
        tensor = self.inputs[0]
        message = service_pb2.ModelInferRequest(model_name=self.model, id=request_id)
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=rows.shape)
        message.raw_input_contents.append(np.ascontiguousarray(rows).tobytes())
        return bytes(message.SerializeToString())

    def frame(self) -> bytes:
        """The gRPC frame (flag, length, message) of one row, as h2load posts it."""
        message = self.request(self.rows[:1])
        return struct.pack(">BI", 0, len(message)) + message

    def check(self, port: int) -> int:
        """Asks 48 different requests of 1 to 3 rows, 16 at a time, and then the frame's own.

        Returns the bytes of DATA that a right answer to the frame takes. Raises WrongAnswer, or grpc.RpcError.
        """
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(MODEL_INFER)
            for start in range(0, _CHECKED, _AT_ONCE):
                asked = []
                for number in range(start, start + _AT_ONCE):
                    rows = self.rows.take(range(number, number + 1 + number % 3), axis=0, mode="wrap")
                    future = call.future(self.request(rows, f"check-{number}"), timeout=_TIMEOUT_S)
                    asked.append((f"check-{number}", rows, future))
                for request_id, rows, future in asked:
                    self.compare(future.result(), rows, request_id)
            response: bytes = call(self.request(self.rows[:1]), timeout=_TIMEOUT_S)
            self.compare(response, self.rows[:1], "bench")
            return 5 + len(response)

    def compare(self, response: bytes, rows: Array, request_id: str) -> None:
        """WrongAnswer unless the serialised ModelInferResponse holds this request's id and the right outputs."""
        message = service_pb2.ModelInferResponse.FromString(response)
        if message.id != request_id:
            raise WrongAnswer(f"{self.model}: the answer to '{request_id}' carries the id '{message.id}'")
        found: dict[str, Array] = {}
        for output, raw in zip(message.outputs, message.raw_output_contents, strict=True):
            found[output.name] = np.frombuffer(raw, _DATATYPES[output.datatype]).reshape(tuple(output.shape))
        expected = self.answer(rows)
        if found.keys() != expected.keys():
            raise WrongAnswer(f"{self.model}: outputs {sorted(found)}, expected {sorted(expected)}")
        for name, array in expected.items():
            is_same = found[name].dtype == array.dtype and found[name].shape == array.shape
            if not (is_same and np.allclose(found[name], array, rtol=1e-5, atol=1e-6)):
                raise WrongAnswer(f"{self.model}: output '{name}' of '{request_id}' is not what the model gives")

    def is_right(self, response: bytes, rows: Array, request_id: str) -> bool:
        """Whether ``compare`` accepts the response."""
        try:
            self.compare(response, rows, request_id)
        except WrongAnswer:
            return False
        return True


def make_identity() -> Workload:
    """Echoes FP32 [4]: nothing but the server's own cost."""
    rows = np.random.default_rng(7).standard_normal((64, 4), dtype=np.float32)
    return Workload(
        name="identity",
        model=IDENTITY,
        inputs=(TensorSignature("INPUT0", "FP32", (4,)),),
        outputs=(TensorSignature("OUTPUT0", "FP32", (4,)),),
        rows=rows,
        answer=lambda batch: {"OUTPUT0": batch},
    )


def make_digits(onnx: Path) -> Workload:
    """A random forest on 8x8 images of digits, FP32 [64]; judged by onnxruntime in this process."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
    inputs = tuple(_read_signature(tensor) for tensor in session.get_inputs())
    outputs = tuple(_read_signature(tensor) for tensor in session.get_outputs())
    names = [tensor.name for tensor in outputs]

    def answer(batch: Array) -> Mapping[str, Array]:
        return dict(zip(names, session.run(names, {inputs[0].name: batch}), strict=True))

    return Workload(
        name="digits",
        model=DIGITS,
        inputs=inputs,
        outputs=outputs,
        rows=load_digits().data.astype(np.float32),
        answer=answer,
    )


def make_workloads(repository: Path) -> Sequence[Workload]:
    """The workloads for a model repository that holds ``digits_forest``."""
    return [make_identity(), make_digits(repository / DIGITS / "1" / "model.onnx")]


def _read_signature(tensor: onnxruntime.NodeArg) -> TensorSignature:
    datatype = {"tensor(float)": "FP32", "tensor(int64)": "INT64"}[tensor.type]
    return TensorSignature(tensor.name, datatype, tuple(d if isinstance(d, int) else -1 for d in tensor.shape[1:]))
