"""What a server of one small ONNX model carries along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from aiorch_client import Client
from onnx import TensorProto, helper
from served import serve

FRAMEWORKS = ("torch", "tensorflow", "sklearn", "skops", "joblib", "pandas", "scipy", "fastapi", "onnx", "tritonclient")
#: The compiled instance opens ONNX Runtime's shared library without the Python package, and the native door speaks
#: gRPC without grpc's; the client and its commands belong to other processes.
#: What terminals, YAML files, reflection, scrapes, TensorFlow Serving's clients and requests for anything but inference
#: over REST need is imported when there is one; what a registry needs, where one is named.
NEEDLESS = (
    *FRAMEWORKS,
    "aiorch_server.frontends.tfserving.service",
    "aiorch_server.frontends.tfserving.rest",
    "aiorch_server.frontends.rest.openapi",
    "aiorch_backends.pytorch.exported",
    "aiorch_backends.tensorflow.programs",
    "aiorch_proto.tfserving.serving_pb2",
    "aiorch_server.scheduling.ensemble",
    "aiorch_server.scheduling.sequence",
    "msgspec",
    "starlette",
    "prometheus_client",
    "onnxruntime",
    "grpc",
    "aiorch_client",
    "rich",
    "yaml",
    "grpc_reflection",
    "sqlalchemy",
    "google.rpc",
    "numpy.ma",
    "aiorch_proto.admin.v1.registry_pb2",
    "aiorch_server.frontends.admin",
    "aiorch_server.registry",
    "aiorch_server.deployments",
)
#: Measured 99 to 105 MB; what the kernel maps of libraries beside the pages that are read varies by 4 MB.
MOST_RESIDENT_BYTES = 107_000_000

REPORTING_MODEL = """
import sys
import numpy as np

class Model:
    inputs = [("name", "BYTES", [-1])]
    outputs = [("is_imported", "BOOL", [-1])]

    def execute(self, inputs):
        return {"is_imported": np.array([name.decode() in sys.modules for name in inputs["name"]])}
"""


def write_relu(path: Path) -> None:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True)
    onnx.save(model, path)


def test_a_server_of_one_onnx_model_stays_small(tmp_path: Path) -> None:
    write_relu(tmp_path / "relu" / "1" / "model.onnx")
    (tmp_path / "report" / "1").mkdir(parents=True)
    (tmp_path / "report" / "1" / "model.py").write_text(REPORTING_MODEL)
    with serve(tmp_path) as server, Client(server.grpc) as client:
        rows = np.array([[-1, 0, 1, 2]], np.float32)
        np.testing.assert_array_equal(client.infer("relu", {"x": rows}).outputs["y"], [[0, 0, 1, 2]])
        names = np.array([*NEEDLESS, "numpy"], object)
        is_imported = client.infer("report", {"name": names}).outputs["is_imported"]
        libraries = Path(f"/proc/{server.process.pid}/maps").read_text()
        status = Path(f"/proc/{server.process.pid}/status").read_text()
    assert [name for name, found in zip(names, is_imported, strict=True) if found] == ["numpy"]
    assert "libonnxruntime" in libraries
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    assert int(resident.split()[1]) * 1024 < MOST_RESIDENT_BYTES
