"""A whole server with the optional extensions switched on, for clients that others wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running_site import Site
from served import Served, serve

FP32 = """
    input { name: "INPUT0" data_type: TYPE_FP32 dims: [-1] }
    output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [-1] }
"""
MODELS = {
    "identity": f'backend: "identity" max_batch_size: 8 {FP32}',
    # a request waits here until a second one comes, or its caller gives up
    "gate": f"""backend: "identity" max_batch_size: 2 {FP32}
        dynamic_batching {{ preferred_batch_size: [2] max_queue_delay_microseconds: 60000000 }}""",
    "impatient": f"""backend: "identity" max_batch_size: 2 {FP32}
        dynamic_batching {{
            preferred_batch_size: [2] max_queue_delay_microseconds: 60000000
            priority_levels: 1 default_priority_level: 1
            default_queue_policy {{ allow_timeout_override: true }} }}""",
    "inner": f'backend: "identity" max_batch_size: 8 {FP32}',
    "outer": f"""platform: "ensemble" max_batch_size: 8 {FP32}
        ensemble_scheduling {{ step {{
            model_name: "inner" model_version: -1
            input_map {{ key: "INPUT0" value: "INPUT0" }} output_map {{ key: "OUTPUT0" value: "OUTPUT0" }} }} }}""",
    # an answer for each element, an error for 13
    "repeat": """backend: "python" max_batch_size: 0 model_transaction_policy { decoupled: true }
        input { name: "INPUT0" data_type: TYPE_INT32 dims: [-1] }
        output { name: "OUTPUT0" data_type: TYPE_INT32 dims: [1] }""",
    # gives the value, and 100 more at the start of a sequence
    "steps": f"""backend: "python" max_batch_size: 8 {FP32.replace("[-1]", "[1]")}
        sequence_batching {{ control_input {{
            name: "START" control {{ kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] }} }} }}""",
    "text": """
        backend: "identity" max_batch_size: 0
        input { name: "INPUT0" data_type: TYPE_STRING dims: [-1] }
        output { name: "OUTPUT0" data_type: TYPE_STRING dims: [-1] }""",
    **{
        name: f"""
        backend: "identity" max_batch_size: 8
        input {{ name: "INPUT0" data_type: TYPE_INT32 dims: [{size}] }}
        output {{ name: "OUTPUT0" data_type: TYPE_INT32 dims: [{size}] }}"""
        for name, size in (("column", 1), ("pairs", 2))
    },
    "to_half": """
        backend: "python" max_batch_size: 0
        input { name: "INPUT0" data_type: TYPE_FP32 dims: [1] }
        output { name: "OUTPUT0" data_type: TYPE_FP16 dims: [1] }""",
}
NUMERIC = ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BF16")
MODELS |= {
    f"scores_{datatype}": f"""
        backend: "identity" max_batch_size: {8 if datatype == "FP32" else 0}
        input {{ name: "INPUT0" data_type: TYPE_{datatype} dims: [-1, -1] }}
        output {{ name: "OUTPUT0" data_type: TYPE_{datatype} dims: [-1, -1] label_filename: "labels.txt" }}"""
    for datatype in (*NUMERIC, "BOOL", "STRING")
}
FILES = {
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
    "to_half": """
class Model:
    inputs, outputs, max_batch_size = [("INPUT0", "FP32", [1])], [("OUTPUT0", "FP16", [1])], 0

    def execute(self, inputs):
        return {"OUTPUT0": inputs["INPUT0"].astype("float16")}
""",
    "steps": """
class Model:
    def execute(self, inputs):
        return {"OUTPUT0": inputs["INPUT0"] + 100 * inputs["START"].reshape(inputs["INPUT0"].shape)}
""",
}
LABELS = "null\neins\nzwei: blau\ndrei\n"


def write_models(root: Path, models: dict[str, str]) -> Path:
    for name, config in models.items():
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(config)
        if name in FILES:
            (root / name / "1" / "model.py").write_text(FILES[name])
        if "label_filename" in config:
            (root / name / "labels.txt").write_text(LABELS)
    return root


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), MODELS)


@pytest.fixture(scope="session")
def site(models: Path) -> Iterator[Site]:
    opened = Site(
        models,
        io_threads=1,
        shared_memory={"keys": "on", "max_bytes": 8 << 20, "max_regions": 16},
        execution={"backends": ["aiorch_backends.identity:IdentityBackend", "aiorch_backends.python:PythonBackend"]},
    )
    yield opened
    opened.close()


@pytest.fixture(scope="package")
def controlled(models: Path) -> Iterator[Served]:
    """A process whose every setting can be changed by its clients."""
    options = ("--model-control-mode", "explicit", "--shared-memory", "on", "--trace-endpoint", "http://127.0.0.1:9")
    loaded = [word for model in ("identity", "text", "scores_FP32") for word in ("--load-model", model)]
    with serve(models, *options, *loaded) as server:
        yield server


@pytest.fixture
def open_site(models: Path) -> Iterator[Callable[..., Site]]:
    """Opens servers of the test's own with the given sections."""
    opened: list[Site] = []

    def make(**sections: Any) -> Site:
        opened.append(Site(models, io_threads=1, **sections))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.fixture
def new_key() -> Iterator[Callable[[str], str]]:
    """Keys of shared memory objects that nobody else has; their objects are gone after the test."""
    made: list[str] = []

    def make(name: str) -> str:
        made.append(f"aiorch_test_{os.getpid()}_{name}")
        return f"/{made[-1]}"

    yield make
    for name in made:
        Path("/dev/shm", name).unlink(missing_ok=True)
