"""A model that was unloaded has left the process's memory, again and again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from aiorch_client import Client
from demand_site import MIB
from served import serve

LAYERS, WIDTH = 5, 2290  # 100 MiB of weights
#: All different: ONNX Runtime keeps equal weights once.
FACTORS = (2, 3, 4, 5, 6)
ROUNDS = 20
CONFIG = """
    max_batch_size: 8
    input { name: "x" data_type: TYPE_FP32 dims: [2290] }
    output { name: "y" data_type: TYPE_FP32 dims: [2290] }
    instance_group { count: 1 kind: KIND_CPU }
"""


def write_onnx(folder: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", "y"))
    weights = [numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32) * FACTORS[i], f"w{i}") for i in range(LAYERS)]
    names = ["x", *(f"h{i}" for i in range(1, LAYERS)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(LAYERS)]
    graph = helper.make_graph(nodes, "layers", [x], [y], weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx"
    )


def write_torch(folder: Path) -> None:
    import torch
    from torch import Tensor

    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    for layer, factor in zip(layers, FACTORS, strict=True):
        layer.weight.data = torch.eye(WIDTH) * factor

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(*layers)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.layers(x)}

    torch.jit.script(Layers()).save(str(folder / "model.pt"))


def read_resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) * 1024


#: glibc keeps what was freed at the end of a thread's arena, where big blocks land once one of them was freed; this
#: makes each big block a mapping of its own (docs/models.md).
SEPARATE_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(4 * MIB), "MALLOC_TRIM_THRESHOLD_": str(8 * MIB)}


@pytest.mark.parametrize(
    ("write", "environment"), [(write_onnx, {}), (write_torch, SEPARATE_BLOCKS)], ids=["onnx", "torch"]
)
def test_memory_is_given_back_on_unload(
    tmp_path: Path, write: Callable[[Path], None], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "models" / "m" / "1"
    folder.mkdir(parents=True)
    write(folder)
    (folder.parent / "config.pbtxt").write_text(CONFIG)
    values = np.ones((4, WIDTH), np.float32)
    loaded, unloaded = [], []
    with serve(tmp_path / "models", "--model-control-mode", "explicit") as server, Client(server.grpc) as client:
        for _ in range(ROUNDS):
            client.load("m", timeout_s=60)
            answer = client.infer("m", {"x": values}).outputs["y"]
            assert answer[0, 0] == np.prod(FACTORS)
            loaded.append(read_resident(server.process.pid))
            client.unload("m", timeout_s=60)
            unloaded.append(read_resident(server.process.pid))
    print(
        "MiB, loaded and unloaded:", [(round(a / MIB), round(b / MIB)) for a, b in zip(loaded, unloaded, strict=True)]
    )
    taken = [before - after for before, after in zip(loaded, unloaded, strict=True)]
    assert sorted(taken)[ROUNDS // 2] > 90 * MIB  # nearly all of the weights; now and then a block stays for a round
    # the first rounds bring the framework's libraries; what is lost in each round is there in all later ones
    assert min(unloaded[-5:]) < 1.06 * min(unloaded[1:4]), unloaded
