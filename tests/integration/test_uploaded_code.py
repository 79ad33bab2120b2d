"""Load requests that bring or choose something that runs code, over real gRPC: refused unless allowed."""

from __future__ import annotations

import contextlib
import json
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import InferenceStub

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig

DEADLINE_S = 60.0
BACKENDS = [
    "aiorch_backends.identity:IdentityBackend",
    "aiorch_backends.python:PythonBackend",
    "aiorch_backends.pytorch:PyTorchBackend",
    "aiorch_backends.sklearn:SklearnBackend",
    "aiorch_backends.tensorflow:TensorFlowBackend",
]


def write_code(proof: Path) -> str:
    """A ``model.py`` that leaves ``proof`` behind as soon as it is imported."""
    return textwrap.dedent(
        f"""
        import pathlib

        pathlib.Path({str(proof)!r}).write_text("ran")


        class Model:
            inputs = [("X", "INT32", [1])]
            outputs = [("X", "INT32", [1])]
            max_batch_size = 4

            def execute(self, inputs):
                return dict(inputs)
        """
    )


@contextlib.asynccontextmanager
async def serving(root: Path, **execution: Any) -> AsyncIterator[InferenceStub]:
    config = ServerConfig.model_validate(
        {
            "grpc": {"port": 0},
            "http": {"enabled": False},
            "metrics": {"enabled": False},
            "repository": {"paths": [str(root)]},
            "lifecycle": {"control_mode": "explicit"},
            "execution": {"backends": BACKENDS, **execution},
        }
    )
    async with Application(config) as app, grpc.aio.insecure_channel(f"127.0.0.1:{app.grpc_port}") as channel:
        yield InferenceStub(channel)


async def load(
    stub: InferenceStub, name: str, config: dict[str, Any] | None = None, files: dict[str, bytes] | None = None
) -> None:
    request = pb.RepositoryModelLoadRequest(model_name=name)
    if config is not None:
        request.parameters["config"].string_param = json.dumps(config)
    for path, content in (files or {}).items():
        request.parameters[f"file:{path}"].bytes_param = content
    await stub.RepositoryModelLoad(request, timeout=DEADLINE_S)


async def expect_refused(stub: InferenceStub, *load_arguments: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await load(stub, *load_arguments)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = str(caught.value.details())
    assert "allow_code" in details and "--allow-code" in details
    return details


def store(root: Path, name: str, *, config: str = "", **files: str) -> None:
    folder = root / name / "1"
    folder.mkdir(parents=True)
    for stem, content in files.items():
        (folder / f"{stem}.py").write_text(content)
    if config:
        (root / name / "config.pbtxt").write_text(config)


@pytest.mark.parametrize("named", [{"backend": "python"}, {"platform": "python"}, {}])
async def test_uploaded_python_is_refused_unread(tmp_path: Path, named: dict[str, str]) -> None:
    proof = tmp_path / "proof"
    root = tmp_path / "models"
    root.mkdir()
    async with serving(root) as stub:
        details = await expect_refused(stub, "guest", named, {"1/model.py": write_code(proof).encode()})
        assert "'guest' version 1" in details and "backend 'python'" in details and "model.py" in details
        assert not proof.exists()
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="guest"), timeout=DEADLINE_S)).ready


async def test_uploaded_python_replaces_no_model_of_the_operator(tmp_path: Path) -> None:
    own, proof = tmp_path / "own", tmp_path / "proof"
    store(tmp_path / "models", "house", model=write_code(own))
    async with serving(tmp_path / "models") as stub:
        await load(stub, "house")
        assert own.exists()
        await expect_refused(stub, "house", {"backend": "python"}, {"1/model.py": write_code(proof).encode()})
        assert not proof.exists()
        assert (await stub.ModelReady(pb.ModelReadyRequest(name="house"), timeout=DEADLINE_S)).ready


async def test_a_configuration_in_the_request_chooses_no_code(tmp_path: Path) -> None:
    """Files that the operator stored, but not as what runs: notes beside another model, a second script."""
    proof = tmp_path / "proof"
    identity = 'backend: "identity"\ninput { name: "X" data_type: TYPE_INT32 dims: 1 }\n'
    store(tmp_path / "models", "plain", config=identity, model=write_code(proof))
    store(tmp_path / "models", "house", model=write_code(tmp_path / "own"), other=write_code(proof))
    async with serving(tmp_path / "models") as stub:
        await load(stub, "plain")
        await expect_refused(stub, "plain", {"backend": "python"})
        await expect_refused(stub, "plain", {})
        await expect_refused(stub, "house", {"backend": "python", "default_model_filename": "other.py"})
        assert not proof.exists()


async def test_a_configuration_in_the_request_may_tune_code_of_the_operator(tmp_path: Path) -> None:
    store(tmp_path / "models", "house", model=write_code(tmp_path / "own"))
    async with serving(tmp_path / "models") as stub:
        await load(stub, "house", {"backend": "python", "max_batch_size": 2})
        config = await stub.ModelConfig(pb.ModelConfigRequest(name="house"), timeout=DEADLINE_S)
        assert config.config.max_batch_size == 2


async def test_uploaded_python_runs_where_the_operator_allows_it(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    root = tmp_path / "models"
    root.mkdir()
    async with serving(root, allow_code=True) as stub:
        await load(stub, "guest", {"backend": "python"}, {"1/model.py": write_code(proof).encode()})
        assert proof.exists()


@pytest.mark.parametrize(
    ("backend", "file"),
    [
        ("pytorch", "1/model.pt2"),
        ("pytorch", "1/model.pt"),
        ("tensorflow", "1/model.savedmodel/saved_model.pb"),
        ("tensorflow", "1/model.keras"),
        ("sklearn", "1/model.joblib"),
    ],
)
async def test_uploaded_programs_are_refused(tmp_path: Path, backend: str, file: str) -> None:
    """Their formats are programs, or run some when they are read: no check of ours can tell good ones from bad."""
    async with serving(tmp_path) as stub:
        await expect_refused(stub, "guest", {"backend": backend}, {file: b"not even opened"})


async def test_a_plugin_must_say_that_its_artefacts_are_data(tmp_path: Path) -> None:
    module = tmp_path / "a_plugin_of_the_house.py"
    module.write_text(
        "from aiorch_backends.identity import IdentityBackend\n"
        "from aiorch_server.backend import Backend\n\n\n"
        "class Silent(IdentityBackend):\n    name = 'silent'\n    runs_code = Backend.runs_code\n"
    )
    root = tmp_path / "models"
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        async with serving(root, backends=[*BACKENDS, f"{module.stem}:Silent"]) as stub:
            config = {"backend": "silent", "input": [{"name": "X", "data_type": "TYPE_INT32", "dims": [1]}]}
            assert "backend 'silent'" in await expect_refused(stub, "guest", config, {"1/x": b""})


async def test_types_that_a_request_calls_trusted_are_not(tmp_path: Path) -> None:
    skio = pytest.importorskip("skops.io")
    from sklearn.preprocessing import FunctionTransformer

    dumped = skio.dumps(FunctionTransformer(func=textwrap.dedent))
    config = {
        "backend": "sklearn",
        "parameters": {"trusted_types": {"string_value": "textwrap.dedent"}},
        "input": [{"name": "X", "data_type": "TYPE_FP32", "dims": [1]}],
    }
    async with serving(tmp_path) as stub:
        details = await expect_refused(stub, "guest", config, {"1/model.skops": dumped})
        assert "trusted_types" in details
