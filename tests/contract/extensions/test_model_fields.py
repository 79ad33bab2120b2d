"""Optional inputs, warm-up data and version policies of a configuration, through a whole server with tritonclient."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from onnx import TensorProto, helper, numpy_helper
from ragged_models import write_model, write_python
from running_site import Site
from tritonclient.utils import InferenceServerException

LIBRARIES = {"grpc": grpc_client, "http": http_client}
#: Adds what is there; ROWS are those of the batch.
ADDING = """
import numpy as np
class Model:
    def execute(self, inputs):
        rows = len(inputs["X"])
        total = sum(array.sum(axis=1, keepdims=True) for array in inputs.values())
        return {"SUM": total, "ROWS": np.full((rows, 1), rows, np.int32)}
"""
TRITON_ADDING = """
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            given = [pb_utils.get_input_tensor_by_name(request, name) for name in ("X", "MORE", "REST")]
            total = sum(each.as_numpy().sum(axis=1, keepdims=True) for each in given if each is not None)
            rows = np.full((len(total), 1), len(requests), np.int32)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("SUM", total), pb_utils.Tensor("ROWS", rows)]))
        return answers
"""
PAIRS = """max_batch_size: 2 dynamic_batching { preferred_batch_size: [2] max_queue_delay_microseconds: 60000000 }
    input [ { name: "X" data_type: TYPE_FP32 dims: [1] },
            { name: "MORE" data_type: TYPE_FP32 dims: [1] optional: true },
            { name: "REST" data_type: TYPE_FP32 dims: [-1] optional: true } ]
    output [ { name: "SUM" data_type: TYPE_FP32 dims: [1] }, { name: "ROWS" data_type: TYPE_INT32 dims: [1] } ]"""

#: Writes down each batch that it sees; there is a line more for each.
WRITING = """
import json, pathlib
import numpy as np
class Model:
    def execute(self, inputs):
        with pathlib.Path(ROOT, f"{NAME}.log").open("a") as log:
            row = {name: np.asarray(array, object).tolist() for name, array in sorted(inputs.items())}
            log.write(json.dumps(row, default=bytes.decode) + chr(10))
        return {"Y": np.zeros((len(inputs["X"]), 1), np.float32)}
"""
TRITON_WRITING = """
import json, pathlib
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            inputs = {each.name(): each.as_numpy() for each in request.inputs()}
            with pathlib.Path(ROOT, f"{NAME}.log").open("a") as log:
                row = {name: np.asarray(array, object).tolist() for name, array in sorted(inputs.items())}
                log.write(json.dumps(row, default=bytes.decode) + chr(10))
            rows = np.zeros((len(inputs["X"]), 1), np.float32)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", rows)]))
        return answers
"""
WARMED = """max_batch_size: 4
    input [ { name: "X" data_type: TYPE_INT32 dims: [2] }, { name: "T" data_type: TYPE_STRING dims: [1] } ]
    output { name: "Y" data_type: TYPE_FP32 dims: [1] }
    parameters { key: "warmup" value { string_value: "false" } }
    model_warmup [
        { name: "zeros" batch_size: 3 count: 2
          inputs { key: "X" value { data_type: TYPE_INT32 dims: [2] zero_data: true } }
          inputs { key: "T" value { data_type: TYPE_STRING dims: [1] zero_data: true } } },
        { name: "random"
          inputs { key: "X" value { data_type: TYPE_INT32 dims: [2] random_data: true } }
          inputs { key: "T" value { data_type: TYPE_STRING dims: [1] random_data: true } } },
        { name: "files" batch_size: 2
          inputs { key: "X" value { data_type: TYPE_INT32 dims: [2] input_data_file: "x.raw" } }
          inputs { key: "T" value { data_type: TYPE_STRING dims: [1] input_data_file: "t.raw" } } } ]"""
RAGGED = """max_batch_size: 4
    input { name: "X" data_type: TYPE_INT32 dims: [-1] allow_ragged_batch: true }
    batch_input { kind: BATCH_ELEMENT_COUNT target_name: "N" data_type: TYPE_INT32 source_input: "X" }
    output { name: "Y" data_type: TYPE_FP32 dims: [1] }
    model_warmup { name: "zeros" count: 2 inputs { key: "X" value {
        data_type: TYPE_INT32 dims: [3] zero_data: true } } }"""

VERSIONED = """
import numpy as np
class Model:
    inputs, outputs, max_batch_size = [("X", "FP32", [1])], [("Y", "INT64", [1])], 0
    def load(self, context):
        self.version = context.model_version
    def execute(self, inputs):
        return {"Y": np.array([self.version])}
"""
POLICIES = {
    "newest": ("", (10,)),
    "latest": ("version_policy { latest { num_versions: 2 } }", (3, 10)),
    "all": ("version_policy { all { } }", (1, 2, 3, 10)),
    "specific": ("version_policy { specific { versions: [3, 1] } }", (1, 3)),
}


def save_onnx(folder: Path) -> None:
    """Adds like the others; the initializers stand for what is left out, and the batch runs without the interpreter."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Add", ["X", "MORE"], ["some"]),
        helper.make_node("ReduceSum", ["REST", "one"], ["others"], keepdims=1),
        helper.make_node("Add", ["some", "others"], ["SUM"]),
        helper.make_node("Shape", ["X"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["count"], to=TensorProto.INT32),
        helper.make_node("Expand", ["count", "shape"], ["ROWS"]),
    ]
    inputs = [info("X", TensorProto.FLOAT, ["n", 1]), info("MORE", TensorProto.FLOAT, ["m", 1])]
    inputs.append(info("REST", TensorProto.FLOAT, ["r", "k"]))
    outputs = [info("SUM", TensorProto.FLOAT, ["n", 1]), info("ROWS", TensorProto.INT32, ["n", 1])]
    constants = {
        "MORE": np.zeros((1, 1), np.float32),
        "REST": np.zeros((1, 1), np.float32),
        "one": np.array([1], np.int64),
        "zero": np.array([0], np.int64),
    }
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "adding", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")


def write_warmed(root: Path, name: str, config: str, text: str) -> None:
    write_python(root, name, config, text.replace("NAME", repr(name)))
    folder = root / name / "warmup"
    folder.mkdir()
    (folder / "x.raw").write_bytes(struct.pack("<2i", 7, -8))
    (folder / "t.raw").write_bytes(b"\x05\x00\x00\x00words")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_python(root, "adding", PAIRS, ADDING)
    write_python(root, "triton_adding", PAIRS, TRITON_ADDING)
    save_onnx(write_model(root, "onnx_adding", f'backend: "onnxruntime" {PAIRS}'))
    write_warmed(root, "warmed", f"{WARMED} instance_group {{ count: 2 }}", WRITING)
    write_warmed(root, "triton_warmed", WARMED, TRITON_WRITING)
    write_warmed(root, "ragged_warmed", RAGGED, WRITING.replace('len(inputs["X"])', 'len(inputs["N"])'))
    write_warmed(root, "missing", WARMED.replace("t.raw", "gone.raw"), WRITING)
    write_warmed(root, "failing", WARMED, WRITING.replace("        return", "        return 1 / 0,"))
    for name, (policy, _) in POLICIES.items():
        write_python(root, name, policy, VERSIONED)
        for version in (2, 3, 10):
            folder = root / name / str(version)
            folder.mkdir()
            (folder / "model.py").write_text(VERSIONED)
    return root


@pytest.fixture(scope="module")
def site(repository: Path) -> Iterator[Site]:
    opened = Site(
        repository,
        io_threads=1,
        execution={
            "backends": ["aiorch_backends.python:PythonBackend", "aiorch_backends.onnxruntime:OnnxRuntimeBackend"]
        },
    )
    yield opened
    opened.close()


@pytest.fixture
def client(site: Site) -> Iterator[grpc_client.InferenceServerClient]:
    with grpc_client.InferenceServerClient(site.target) as opened:
        yield opened


def make_tensors(library: Any, values: dict[str, list[float]]) -> list[Any]:
    tensors = []
    for name, row in values.items():
        tensor = library.InferInput(name, [1, len(row)], "FP32")
        tensor.set_data_from_numpy(np.array([row], np.float32))
        tensors.append(tensor)
    return tensors


@pytest.mark.parametrize("model", ["adding", "triton_adding", "onnx_adding"])
@pytest.mark.parametrize("door", LIBRARIES)
def test_requests_are_batched_with_those_that_bring_the_same_inputs(site: Site, model: str, door: str) -> None:
    """Each waits for its like: the last four complete the pairs that the first four began."""
    library = LIBRARIES[door]
    sent: list[dict[str, list[float]]] = [{"X": [1]}, {"X": [2], "MORE": [10]}, {"REST": [100, 200], "X": [3]}]
    sent += [{"MORE": [20], "X": [4], "REST": [300]}]
    sent += [{name: [value + 5 for value in row] for name, row in values.items()} for values in sent]
    address = site.target if door == "grpc" else site.http
    found: dict[int, Any] = {}

    def ask(place: int) -> None:
        with library.InferenceServerClient(address) as caller:
            found[place] = caller.infer(model, make_tensors(library, sent[place]))

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(sent))]
    for place, thread in enumerate(threads):
        thread.start()
        await_queue(site, model, place + 1 if place < 4 else 7 - place)
    for thread in threads:
        thread.join(30)
    for place, values in enumerate(sent):
        assert found[place].as_numpy("SUM").tolist() == [[sum(map(sum, values.values()))]]
        assert found[place].as_numpy("ROWS").tolist() == [[2]]


def await_queue(site: Site, model: str, count: int) -> None:
    until = time.monotonic() + 30
    while site.count_pending(model) != count:
        assert time.monotonic() < until, f"{site.count_pending(model)} requests wait for '{model}', not {count}"
        time.sleep(0.002)


def test_what_is_not_optional_is_missed(client: grpc_client.InferenceServerClient) -> None:
    text = r"expected number of inputs between 1 and 3 but got 1 inputs .* missing required input\(s\) \['X'\]"
    with pytest.raises(InferenceServerException, match=text):
        client.infer("adding", make_tensors(grpc_client, {"MORE": [1]}))
    flags = {
        each["name"]: each.get("optional", False)
        for each in client.get_model_config("adding", as_json=True)["config"]["input"]
    }
    assert flags == {"X": False, "MORE": True, "REST": True}


def read_log(repository: Path, model: str) -> list[Any]:
    return [json.loads(line) for line in (repository / f"{model}.log").read_text().splitlines()]


@pytest.mark.parametrize(("model", "instances"), [("warmed", 2), ("triton_warmed", 1)])
def test_each_instance_sees_its_warm_up_before_a_client(
    client: grpc_client.InferenceServerClient, repository: Path, model: str, instances: int
) -> None:
    assert client.is_model_ready(model)
    seen = read_log(repository, model)
    zeros, random, files = seen[0], seen[2], seen[3]
    assert seen == [zeros, zeros, random, files] * instances
    assert zeros == {"X": [[0, 0]] * 3, "T": [[""]] * 3}
    assert files == {"X": [[7, -8]] * 2, "T": [["words"]] * 2}
    assert len(random["X"]) == 1 and random["T"] != [[""]]
    counted = client.get_inference_statistics(model, as_json=True)["model_stats"][0]
    assert counted.get("execution_count", "0") == "0"  # nobody asked for them


def test_a_ragged_model_is_warmed_as_it_will_run(site: Site, repository: Path) -> None:
    assert read_log(repository, "ragged_warmed") == [{"N": [3], "X": [0, 0, 0]}] * 2


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("missing", "model_warmup 'files', input 'T': 'gone.raw' cannot be read from the warmup folder"),
        ("failing", "warm-up 'zeros' failed: .*division by zero"),
    ],
)
def test_a_warm_up_that_cannot_run_fails_the_load(
    client: grpc_client.InferenceServerClient, model: str, text: str
) -> None:
    assert not client.is_model_ready(model)
    states = client.get_model_repository_index(as_json=True)["models"]
    (reason,) = (each["reason"] for each in states if each["name"] == model)
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(reason)


@pytest.mark.parametrize("model", POLICIES)
def test_the_policy_says_which_versions_are_served(client: grpc_client.InferenceServerClient, model: str) -> None:
    served = POLICIES[model][1]
    tensor = grpc_client.InferInput("X", [1], "FP32")
    tensor.set_data_from_numpy(np.zeros(1, np.float32))
    for version in (1, 2, 3, 10):
        assert client.is_model_ready(model, str(version)) == (version in served)
        if version in served:
            assert client.infer(model, [tensor], str(version)).as_numpy("Y").tolist() == [version]
            continue
        with pytest.raises(InferenceServerException, match=f"'{model}' version {version}"):
            client.infer(model, [tensor], str(version))
    assert client.infer(model, [tensor]).as_numpy("Y").tolist() == [max(served)]
    metadata = client.get_model_metadata(model, as_json=True)
    assert metadata["versions"] == [str(version) for version in served]
    config = client.get_model_config(model).config
    assert config.version_policy.WhichOneof("policy_choice") == (model if model != "newest" else "latest")
