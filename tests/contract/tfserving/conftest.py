"""A server with models of all backends as a process, and one over identity models in this process; both ports each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, serve

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


@pytest.fixture(scope="module", params=["native", "grpcio"])
def example_server(
    request: pytest.FixtureRequest, example_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """All example models, half_plus_two and count_features."""
    models = tmp_path_factory.mktemp("models")
    for name, text in (("half_plus_two", HALF_PLUS_TWO), ("count_features", COUNT_FEATURES)):
        (models / name / "1").mkdir(parents=True)
        (models / name / "1" / "model.py").write_text(text)
    with serve(example_models, "--model-repository", str(models), "--transport", request.param) as running:
        yield running
        assert running.end() == 0
        assert "Traceback" not in running.log.read_text()
