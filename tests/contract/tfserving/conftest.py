"""A server with models of all backends as a process, and one over identity models in this process; both ports each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio
from served import Served, serve
from serving_site import Site, serve_here

from aiorch_server.types import DataType

HALF_PLUS_TWO = """
class Model:
    inputs = [("x", "FP32", [1])]
    outputs = [("y", "FP32", [1])]
    max_batch_size = 16

    def execute(self, inputs):
        return {"y": inputs["x"] * 0.5 + 2}
"""
COUNT_FEATURES = """
import numpy as np
from aiorch_proto.tfserving.core_pb2 import Example


class Model:
    inputs = [("serialized", "BYTES", [1])]
    outputs = [("outputs", "FP32", [1])]
    max_batch_size = 16

    def execute(self, inputs):
        counts = [[len(Example.FromString(row[0]).features.feature)] for row in inputs["serialized"]]
        return {"outputs": np.array(counts, dtype=np.float32)}
"""


@pytest.fixture(scope="session")
def example_server(example_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """All example models, half_plus_two and count_features."""
    models = tmp_path_factory.mktemp("models")
    for name, text in (("half_plus_two", HALF_PLUS_TWO), ("count_features", COUNT_FEATURES)):
        (models / name / "1").mkdir(parents=True)
        (models / name / "1" / "model.py").write_text(text)
    with serve(example_models, "--model-repository", str(models)) as running:
        yield running
        assert running.end() == 0
        assert "Traceback" not in running.log.read_text()


def write_model(root: Path, name: str, config: str, versions: Sequence[int] = (1,)) -> None:
    for version in versions:
        (root / name / str(version)).mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(f'backend: "identity"\n{config}')


def tensor(kind: str, name: str, config_name: str, dims: str) -> str:
    return f'{kind} {{ name: "{name}" data_type: {config_name} dims: [{dims}] }}\n'


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("identities")
    for name, datatype, dims in (
        *((datatype.value, datatype, "-1, -1") for datatype in DataType),
        ("rank1", DataType.FP32, "-1"),
        ("rank3", DataType.INT8, "-1, -1, -1"),
    ):
        tensors = [tensor(kind, f"{kind}_bytes", datatype.config_name, dims) for kind in ("input", "output")]
        write_model(root, name, "max_batch_size: 0\n" + "".join(tensors))
    pair = "max_batch_size: 4\n"
    pair += tensor("input", "a", "TYPE_FP32", "2") + tensor("input", "b", "TYPE_STRING", "1")
    pair += tensor("output", "x", "TYPE_FP32", "2") + tensor("output", "y", "TYPE_STRING", "1")
    labels = "".join(
        f'parameters {{ key: "version_label.{label}" value {{ string_value: "{version}" }} }}\n'
        for label, version in (("stable", 2), ("canary", 4), ("gone", 3))
    )
    write_model(root, "pair", f"version_policy {{ specific {{ versions: [2, 4] }} }}\n{labels}{pair}", (2, 3, 4))
    slow = "max_batch_size: 4\n" + tensor("input", "a", "TYPE_FP32", "1") + tensor("output", "x", "TYPE_FP32", "1")
    write_model(
        root, "slow", f'{slow}parameters {{ key: "execute_delay_us" value {{ string_value: "300000" }} }}\n'
    )  # fmt: skip
    classes = "max_batch_size: 4\n" + tensor("input", "in_classes", "TYPE_STRING", "2")
    classes += tensor("input", "in_scores", "TYPE_FP32", "2")
    classes += tensor("output", "classes", "TYPE_STRING", "2") + tensor("output", "scores", "TYPE_FP32", "2")
    write_model(root, "classes", classes)
    write_model(root, "broken", f'{slow}parameters {{ key: "execute_delay_us" value {{ string_value: "x" }} }}\n')
    return root


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["native-1", "grpcio"])
async def site(request: pytest.FixtureRequest, repository: Path) -> AsyncIterator[Site]:
    async with serve_here(repository, request.param) as site:
        yield site
