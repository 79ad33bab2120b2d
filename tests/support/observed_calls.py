"""Requests of every kind through every door, each in a trace of its own; for tests of what a server tells of them."""

from __future__ import annotations

import itertools
import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import httpx
from aiorch_proto.tfserving import core_pb2, serving_pb2
from aiorch_proto.v2 import inference_pb2 as pb
from running_site import SERVICE, TIMEOUT_S
from sequence_models import write_tally

PARENT = "00f067aa0ba902b7"
PREDICT = "tensorflow.serving.PredictionService/Predict"
FP32 = """
    input { name: "INPUT0" data_type: TYPE_FP32 dims: [-1] }
    output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [-1] }
"""
CONFIGS = {
    "identity": f'backend: "identity" max_batch_size: 8 {FP32}',
    "cached": f'backend: "identity" max_batch_size: 8 response_cache {{ enable: true }} {FP32}',
    "chain": f"""
        platform: "ensemble" max_batch_size: 8 {FP32}
        ensemble_scheduling {{
          step {{ model_name: "identity" model_version: -1
                  input_map {{ key: "INPUT0" value: "INPUT0" }} output_map {{ key: "OUTPUT0" value: "between" }} }}
          step {{ model_name: "cached" model_version: -1
                  input_map {{ key: "INPUT0" value: "between" }} output_map {{ key: "OUTPUT0" value: "OUTPUT0" }} }}
        }}""",
    # calls the ensemble for each of its requests, fails below zero
    "caller": f'backend: "python" max_batch_size: 8 {FP32}',
    # an answer for each element, an error for 13, and an end without an answer
    "repeat": f'backend: "python" max_batch_size: 0 model_transaction_policy {{ decoupled: true }} {FP32}',
    "repeat_chain": f"""
        platform: "ensemble" max_batch_size: 0 {FP32}
        ensemble_scheduling {{
          step {{ model_name: "repeat" model_version: -1
                  input_map {{ key: "INPUT0" value: "INPUT0" }} output_map {{ key: "OUTPUT0" value: "between" }} }}
          step {{ model_name: "identity" model_version: -1
                  input_map {{ key: "INPUT0" value: "between" }} output_map {{ key: "OUTPUT0" value: "OUTPUT0" }} }}
        }}""",
}
FILES = {
    "caller": """
from aiorch_backends.python.calling import call

class Model:
    def load(self, context):
        self.context = context

    def execute(self, inputs):
        if not inputs["INPUT0"].any():  # the warm-up, when there may be no chain yet
            return {"OUTPUT0": inputs["INPUT0"]}
        if (inputs["INPUT0"] < 0).any():
            raise ValueError("below zero")
        return {"OUTPUT0": call(self.context, "chain", {"INPUT0": inputs["INPUT0"]}, timeout_s=20)["OUTPUT0"]}
""",
    "repeat": """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for value in pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy():
                if value == 13:
                    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("thirteen")))
                else:
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", value.reshape(1))]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
""",
}


def write_observed(root: Path, *wanted: str) -> Path:
    """All these models, or those that are wanted."""
    for name, config in CONFIGS.items():
        if wanted and name not in wanted:
            continue
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(config)
        if name in FILES:
            (root / name / "1" / "model.py").write_text(FILES[name])
    if wanted:
        return root
    write_tally(root, "oldest")
    write_tally(root, "direct", strategy="direct { max_queue_delay_microseconds: 0 }")
    return root


class Caller:
    """Sends requests to the server at two addresses; each call gives the timing that came back, by phase."""

    def __init__(self, target: str, http: str) -> None:
        self.http = f"http://{http}"
        self.channel = grpc.insecure_channel(target)
        self._values = itertools.count(1)
        self._sequences = itertools.count(1)

    def close(self) -> None:
        self.channel.close()

    def infer(self, model: str, headers: Mapping[str, str], value: float | None = None) -> dict[str, str]:
        """ModelInfer with one row."""
        number = next(self._values) if value is None else value
        request = make_request(model, number)
        call = self.channel.unary_unary(f"/{SERVICE}/ModelInfer")
        _, done = call.with_call(request.SerializeToString(), metadata=tuple(headers.items()), timeout=TIMEOUT_S)
        return read_timing(dict(done.trailing_metadata()))

    def step(
        self,
        model: str,
        headers: Mapping[str, str],
        value: int = 1,
        sequence: int = 0,
        *,
        is_start: bool = True,
        timeout_s: float = TIMEOUT_S,
    ) -> dict[str, str]:
        """One request of a sequence; where no sequence is named, all of it."""
        request = pb.ModelInferRequest(model_name=model)
        request.inputs.add(name="value", datatype="INT64", shape=[1, 1])
        request.raw_input_contents.append(value.to_bytes(8, "little", signed=True))
        request.parameters["sequence_id"].int64_param = sequence or 1000 + next(self._sequences)
        request.parameters["sequence_start"].bool_param = is_start
        request.parameters["sequence_end"].bool_param = not sequence
        call = self.channel.unary_unary(f"/{SERVICE}/ModelInfer")
        _, done = call.with_call(request.SerializeToString(), metadata=tuple(headers.items()), timeout=timeout_s)
        return read_timing(dict(done.trailing_metadata()))

    def stream(self, model: str, headers: Mapping[str, str], *values: float) -> dict[str, str]:
        """ModelStreamInfer with one request; the timing of its final answer."""
        request = make_request(model, *values)
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        call = self.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        answers = [
            pb.ModelStreamInferResponse.FromString(message)
            for message in call(iter([request.SerializeToString()]), metadata=tuple(headers.items()), timeout=TIMEOUT_S)
        ]
        assert not any("aiorch-total-us" in each.infer_response.parameters for each in answers[:-1])
        parameters = answers[-1].infer_response.parameters
        return read_timing({key: value.string_param for key, value in parameters.items()})

    def predict(self, model: str, headers: Mapping[str, str]) -> dict[str, str]:
        """TensorFlow Serving's gRPC."""
        request = serving_pb2.PredictRequest()
        request.model_spec.name = model
        tensor = request.inputs["INPUT0"]
        tensor.dtype = core_pb2.DT_FLOAT
        tensor.tensor_shape.dim.add(size=1)
        tensor.tensor_shape.dim.add(size=1)
        tensor.float_val.append(1.0)
        call = self.channel.unary_unary(f"/{PREDICT}")
        _, done = call.with_call(request.SerializeToString(), metadata=tuple(headers.items()), timeout=TIMEOUT_S)
        return read_timing(dict(done.trailing_metadata()))

    def post(self, path: str, document: Any, headers: Mapping[str, str]) -> dict[str, str]:
        """One HTTP request; what is a stream of events tells its timing in its last line."""
        answer = httpx.post(self.http + path, json=document, headers=dict(headers), timeout=TIMEOUT_S)
        assert answer.status_code == 200, answer.text
        text = answer.headers.get("server-timing", "")
        if answer.headers["content-type"].startswith("text/event-stream"):
            found = re.findall(r"^: server-timing: (.*)$", answer.text, re.MULTILINE)
            assert len(found) <= 1 and not text
            text = "".join(found)
            events = [json.loads(each) for each in re.findall(r"^data: (.*)$", answer.text, re.MULTILINE)]
            assert len(events) == len(document["INPUT0"])
        return dict(re.findall(r'(\w+);(?:dur=|desc=")([\d.]+)', text))

    def calls(self) -> dict[str, Callable[[Mapping[str, str]], dict[str, str]]]:
        """One of each kind, by name; what it gives is the timing."""
        tensor = {"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}
        models = "/v2/models"
        return {
            "plain": lambda headers: self.infer("identity", headers),
            "stream": lambda headers: self.stream("identity", headers, 1.0),
            "http": lambda headers: self.post(f"{models}/identity/infer", {"inputs": [tensor]}, headers),
            "generate": lambda headers: self.post(f"{models}/identity/generate", {"INPUT0": [1.0]}, headers),
            "oldest": lambda headers: self.step("oldest", headers),
            "direct": lambda headers: self.step("direct", headers),
            "ensemble": lambda headers: self.infer("chain", headers),
            "cached": lambda headers: self.infer("cached", headers, 0.5),
            "caller": lambda headers: self.infer("caller", headers),
            "decoupled": lambda headers: self.stream("repeat", headers, 1.0, 13.0, 2.0),
            "decoupled_chain": lambda headers: self.stream("repeat_chain", headers, 1.0, 13.0, 2.0),
            "decoupled_http": lambda headers: self.post(
                f"{models}/repeat/generate_stream", {"INPUT0": [1.0, 13.0, 2.0]}, headers
            ),
            "decoupled_one": lambda headers: self.post(f"{models}/repeat/generate", {"INPUT0": [1.0]}, headers),
            "serving": lambda headers: self.predict("identity", headers),
            "serving_http": lambda headers: self.post("/v1/models/identity:predict", {"instances": [[1.0]]}, headers),
        }


def make_request(model: str, *values: float) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model)
    shape = [len(values)] if model.startswith("repeat") else [1, len(values)]
    request.inputs.add(name="INPUT0", datatype="FP32", shape=shape)
    request.raw_input_contents.append(struct.pack(f"<{len(values)}f", *values))
    return request


def read_timing(metadata: Mapping[str, str]) -> dict[str, str]:
    """By the names that HTTP has."""
    ours = {name.removeprefix("aiorch-"): value for name, value in metadata.items() if name.startswith("aiorch-")}
    return {name.removesuffix("-us").replace("-", "_"): value for name, value in ours.items()}


def make_trace(number: int) -> str:
    """The id of a trace."""
    return f"{number:032x}"


def make_headers(trace: str, *, is_sampled: bool = True) -> dict[str, str]:
    """Of a caller with that trace, who wants to know the timing."""
    return {"traceparent": f"00-{trace}-{PARENT}-0{int(is_sampled)}", "aiorch-timing": "1"}
