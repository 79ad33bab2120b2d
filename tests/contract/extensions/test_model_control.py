"""Loading with another configuration and with files, and unloading, by tritonclient over gRPC and HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from served import Served, serve
from tritonclient.utils import InferenceServerException

LIBRARIES = {"grpc": grpc_client, "http": http_client}
DOUBLED = b"""
class Model:
    inputs, outputs, max_batch_size = [("INPUT0", "FP32", [-1])], [("OUTPUT0", "FP32", [-1])], 8

    def execute(self, inputs):
        return {"OUTPUT0": 2 * inputs["INPUT0"]}
"""


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with serve(models, "--model-control-mode", "explicit", "--allow-code", "--id", "somebody") as server:
        yield server


@pytest.fixture(params=LIBRARIES)
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(served: Served, door: str) -> Iterator[Any]:
    client = LIBRARIES[door].InferenceServerClient(served.grpc if door == "grpc" else served.http)
    yield client
    client.unload_model("identity")
    client.close()


def read_config(client: Any, door: str) -> dict[str, Any]:
    answer = client.get_model_config("identity", **({"as_json": True} if door == "grpc" else {}))
    return dict(answer["config"] if door == "grpc" else answer)


def ask(client: Any, door: str) -> Any:
    tensor = LIBRARIES[door].InferInput("INPUT0", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.array([[1, 2]], np.float32))
    return client.infer("identity", [tensor]).as_numpy("OUTPUT0").tolist()


@pytest.mark.proves("RepositoryModelLoad", by=("tritonclient.grpc", "tritonclient.http"))
def test_another_configuration(client: Any, door: str) -> None:
    """Numbers may be text, as protobuf's JSON has them; a plain load goes back to what is stored."""
    client.load_model("identity")
    assert read_config(client, door)["max_batch_size"] == 8
    client.load_model("identity", config='{"backend": "identity", "max_batch_size": "16"}')
    assert read_config(client, door)["max_batch_size"] == 16
    client.load_model("identity")
    assert read_config(client, door)["max_batch_size"] == 8


@pytest.mark.proves("RepositoryModelLoad", by=("tritonclient.grpc", "tritonclient.http"))
def test_files_stand_in_for_the_model(client: Any, door: str) -> None:
    """Their versions are the model's, until it is loaded plainly again."""
    client.load_model("identity", config='{"backend": "python"}', files={"file:3/model.py": DOUBLED})
    assert ask(client, door) == [[2, 4]]
    metadata = client.get_model_metadata("identity")
    assert list(metadata["versions"] if door == "http" else metadata.versions) == ["3"]
    client.load_model("identity")
    assert ask(client, door) == [[1, 2]]


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"config": '"parameters": {"a": {{}}}'}, "INTERNAL", "failed to poll from model repository: "),
        ({"config": "[]"}, "INTERNAL", "must be a JSON object"),
        ({"config": '{"max_batch_size": "x"}'}, "INTERNAL", "should be a valid integer"),
        ({"config": '{"name": "other"}'}, "INTERNAL", "must equal the model's folder name 'identity'"),
        ({"config": "{}", "files": {"file:" + "A" * 256: b"a"}}, "INTERNAL", "must be named <version>/<file name>"),
        ({"config": "{}", "files": {"file:1/../x": b"a"}}, "INTERNAL", "cannot be stored"),
        ({"config": "{}", "files": {"file:1/" + "A" * 256: b"a"}}, "INTERNAL", "failed to poll from model repository"),
        ({"config": '{"backend": "nobody"}'}, "INVALID_ARGUMENT", "there is no backend 'nobody'"),
        ({"files": {"file:1/model.py": b"a"}}, "INVALID_ARGUMENT", "config"),
    ],
)
def test_overrides_that_are_refused(client: Any, door: str, options: Any, code: str, text: str) -> None:
    """What served before goes on."""
    client.load_model("identity")
    with pytest.raises(InferenceServerException) as caught:
        client.load_model("identity", **options)
    assert caught.value.status() == (f"StatusCode.{code}" if door == "grpc" else "500" if code == "INTERNAL" else "400")
    assert text in caught.value.message()
    if code == "INTERNAL":
        assert caught.value.message().startswith("failed to load 'identity', failed to poll from model repository")
    assert ask(client, door) == [[1, 2]]


@pytest.mark.proves("RepositoryModelUnload", by=("tritonclient.grpc", "tritonclient.http"))
def test_unloading(client: Any) -> None:
    client.load_model("identity")
    client.unload_model("identity", unload_dependents=True)
    assert not client.is_model_ready("identity")
    with pytest.raises(InferenceServerException, match="failed to load 'nobody', failed to poll from model repository"):
        client.load_model("nobody")


def test_the_server_has_the_name_it_was_given(client: Any, door: str) -> None:
    metadata = client.get_server_metadata()
    assert (metadata["name"] if door == "http" else metadata.name) == "somebody"
