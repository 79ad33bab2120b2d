"""Tensors with another shape for clients than for the model, through a whole server with tritonclient."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from running_site import Site
from tritonclient.utils import InferenceServerException

LIBRARIES = {"grpc": grpc_client, "http": http_client}
#: Gives the input as it came in the shape of the output, and says which shape it saw.
MODEL = """
import numpy as np
class Model:
    inputs, outputs, max_batch_size = {inputs}, {outputs}, {batch}
    def execute(self, inputs):
        x = inputs["X"]
        seen = np.array([list(x.shape[{lead}:])] * (x.shape[0] if {lead} else 1), np.int64)
        return {{"Y": (x * 2).reshape({given}), "SEEN": seen if {lead} else seen[0]}}
"""


def write_model(
    root: Path, name: str, config: str, *, seen: list[int], given: list[int], batch: int, shape: str | None = None
) -> None:
    lead = int(batch > 0)
    text = MODEL.format(
        inputs=[("X", "FP32", seen)],
        outputs=[("Y", "FP32", given), ("SEEN", "INT64", [-1])],
        batch=batch,
        lead=lead,
        given=shape or [-1, *given][1 - lead :],
    )
    (root / name / "1").mkdir(parents=True)
    (root / name / "1" / "model.py").write_text(text)
    seen_output = '{ name: "SEEN" data_type: TYPE_INT64 dims: [-1] }'
    (root / name / "config.pbtxt").write_text(
        f'backend: "python" max_batch_size: {batch}\n' + config.replace("SEEN", seen_output)
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("models")
    # a model that sees [rows, 2, 3] where clients send [rows, 6], and gives scalars where they get [rows, 1]
    write_model(
        root,
        "both",
        """input { name: "X" data_type: TYPE_FP32 dims: [6] reshape { shape: [2, 3] } }
        output [ { name: "Y" data_type: TYPE_FP32 dims: [3, 2] reshape { shape: [6] } }, SEEN ]""",
        seen=[2, 3],
        given=[6],
        batch=4,
    )
    write_model(
        root,
        "scalar",
        """input { name: "X" data_type: TYPE_FP32 dims: [1] reshape { shape: [] } }
        output [ { name: "Y" data_type: TYPE_FP32 dims: [1, 1] reshape { shape: [] } }, SEEN ]""",
        seen=[],
        given=[],
        batch=4,
    )
    write_model(
        root,
        "variable",
        """input { name: "X" data_type: TYPE_FP32 dims: [2, -1, 3] reshape { shape: [1, 2, -1, 3, 1] } }
        output [ { name: "Y" data_type: TYPE_FP32 dims: [-1, 6] reshape { shape: [-1, 2, 3] } }, SEEN ]""",
        seen=[1, 2, -1, 3, 1],
        given=[-1, 2, 3],
        batch=0,
    )
    write_model(
        root,
        "liar",
        """input { name: "X" data_type: TYPE_FP32 dims: [-1] reshape { shape: [1, -1] } }
        output [ { name: "Y" data_type: TYPE_FP32 dims: [-1, 2] reshape { shape: [-1, 1, 2] } }, SEEN ]
        parameters { key: "warmup" value { string_value: "false" } }""",
        seen=[1, -1],
        given=[-1, 1, 2],
        batch=0,
        shape="[-1, 2]",
    )
    opened = Site(root, io_threads=1, execution={"backends": ["aiorch_backends.python:PythonBackend"]})
    yield opened
    opened.close()


def infer(site: Site, door: str, model: str, values: Any) -> tuple[Any, list[Any]]:
    library = LIBRARIES[door]
    with library.InferenceServerClient(site.target if door == "grpc" else site.http) as client:
        tensor = library.InferInput("X", list(values.shape), "FP32")
        tensor.set_data_from_numpy(values)
        found = client.infer(model, [tensor])
        return found.as_numpy("Y"), found.as_numpy("SEEN").tolist()


@pytest.mark.parametrize("door", LIBRARIES)
def test_the_model_sees_its_shape_and_clients_theirs(site: Site, door: str) -> None:
    values = np.arange(12, dtype=np.float32).reshape(2, 6)
    found, seen = infer(site, door, "both", values)
    assert seen == [[2, 3], [2, 3]]
    assert np.array_equal(found, 2 * values.reshape(2, 3, 2))
    found, _ = infer(site, door, "scalar", values[:, :1])
    assert np.array_equal(found, 2 * values[:, :1, None])
    values = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    found, seen = infer(site, door, "variable", values)
    assert seen == [1, 2, 4, 3, 1]
    assert np.array_equal(found, 2 * values.reshape(4, 6))


def test_clients_are_told_their_shapes_and_what_was_written(site: Site) -> None:
    with grpc_client.InferenceServerClient(site.target) as client:
        metadata = client.get_model_metadata("both", as_json=True)
        assert metadata["inputs"][0]["shape"] == ["-1", "6"]
        assert metadata["outputs"][0]["shape"] == ["-1", "3", "2"]
        config = client.get_model_config("both").config
        assert (list(config.input[0].dims), list(config.input[0].reshape.shape)) == ([6], [2, 3])
        assert (list(config.output[0].dims), list(config.output[0].reshape.shape)) == ([3, 2], [6])


def test_the_models_own_shape_is_not_for_clients(site: Site) -> None:
    with pytest.raises(InferenceServerException, match=r"unexpected shape for input 'X' .* Expected \[-1,6\]"):
        infer(site, "grpc", "both", np.zeros((1, 2, 3), np.float32))


def test_an_output_of_another_shape_is_the_models_failure(site: Site) -> None:
    with pytest.raises(InferenceServerException, match=r"output 'Y' has shape \[2, 2\], but \[-1, 1, 2\] is declared"):
        infer(site, "grpc", "liar", np.zeros(4, np.float32))
    with grpc_client.InferenceServerClient(site.target) as client:
        assert client.is_model_ready("liar")
