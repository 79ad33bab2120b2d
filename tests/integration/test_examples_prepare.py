"""The example repository is really built, once for this module, and what the backends answer is what it recorded."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aiorch_server.backend import DeclaredSignature, LoadContext
from aiorch_server.types import DataType, TensorSpec

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "prepare.py"
FLOAT = DataType.FP32
#: model -> (backend package, class, artefact, what its configuration declares)
MODELS = {
    "digits_forest": ("onnxruntime", "OnnxRuntimeBackend", "model.onnx", DeclaredSignature()),
    "digits_cnn": ("pytorch", "PyTorchBackend", "model.pt2", DeclaredSignature()),
    "digits_cnn_ts": (
        "pytorch",
        "PyTorchBackend",
        "model.pt",
        DeclaredSignature((TensorSpec("INPUT__0", FLOAT, (64,)),), (TensorSpec("OUTPUT__0", FLOAT, (10,)),), 64),
    ),
    "digits_keras": ("tensorflow", "TensorFlowBackend", "model.keras", DeclaredSignature()),
    "digits_pipeline": ("sklearn", "SklearnBackend", "model.skops", DeclaredSignature()),
    "filetype": (
        "onnxruntime",
        "OnnxRuntimeBackend",
        "model.onnx",
        DeclaredSignature(
            (TensorSpec("bytes", DataType.INT32, (2048,)),), (TensorSpec("target_label", FLOAT, (214,)),), 64
        ),
    ),
    "identity_fp32": (
        "identity",
        "IdentityBackend",
        "",
        DeclaredSignature((TensorSpec("INPUT0", FLOAT, (4,)),), (TensorSpec("OUTPUT0", FLOAT, (4,)),), 64),
    ),
    "text_length": ("python", "PythonBackend", "model.py", DeclaredSignature()),
}
ROWS_AT_ONCE = 29

pytestmark = pytest.mark.timeout(600)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("examples") / "models"
    done = run(str(models))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" built  ") == 7, done.stdout
    return models


def test_layout_is_tritons(repository: Path) -> None:
    assert sorted(path.name for path in repository.iterdir()) == sorted(MODELS)
    for name, (_, _, artefact, _) in MODELS.items():
        assert (repository / name / "1" / artefact).exists()
    configured = {path.parent.name for path in repository.glob("*/config.pbtxt")}
    assert configured == {"digits_cnn_ts", "filetype", "identity_fp32"}
    assert len((repository / "filetype" / "labels.txt").read_text().splitlines()) == 214


def test_split_is_held_out(repository: Path) -> None:
    data = np.load(repository.parent / "reference" / "digits.npz")
    assert data["train_images"].shape == (1200, 64)
    assert data["images"].shape == (597, 64)
    train = {image.tobytes() for image in data["train_images"]}
    assert not any(image.tobytes() in train for image in data["images"])


@pytest.mark.parametrize("name", MODELS)
def test_backend_gives_the_frameworks_answers(repository: Path, name: str) -> None:
    package, class_name, artefact, declared = MODELS[name]
    backend = getattr(importlib.import_module(f"aiorch_backends.{package}"), class_name)()
    folder = repository / name
    context = LoadContext(name, 1, folder, folder / "1" / artefact, declared)
    signature = backend.inspect(context)
    assert signature.max_batch_size > 0
    instance = backend.load(context, signature)
    answers = np.load(repository.parent / "reference" / f"{name}.npz")
    total = len(answers[f"input.{signature.inputs[0].name}"])
    for first in range(0, total, ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        inputs = {
            spec.name: np.ascontiguousarray(answers[f"input.{spec.name}"][part]).astype(spec.datatype.numpy)
            for spec in signature.inputs
        }
        outputs = instance.execute(inputs)
        for spec in signature.outputs:
            expected = answers[f"output.{spec.name}"][part]
            np.testing.assert_allclose(outputs[spec.name], expected, rtol=1e-4, atol=1e-5, err_msg=spec.name)
    instance.close()


def test_second_run_keeps_everything(repository: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    done = run(str(repository))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" kept  ") == 7, done.stdout
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before


def test_damaged_model_is_made_again(repository: Path) -> None:
    damaged = repository / "text_length" / "1" / "model.py"
    good = damaged.read_text()
    damaged.write_text("broken")
    done = run(str(repository), "--only", "text_length")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "built  identity_fp32, text_length" in done.stdout
    assert damaged.read_text() == good


def test_failing_recipe_is_shown_and_leaves_the_old_model(repository: Path, tmp_path: Path) -> None:
    # digits.npz is made by an own recipe; without its arrays the forest's recipe cannot run.
    references = tmp_path / "reference"
    models = tmp_path / "models"
    done = run(str(models), "--reference", str(references), "--only", "plain")
    assert done.returncode == 0, done.stdout + done.stderr
    (models / "digits_forest").mkdir()
    (models / "digits_forest" / "kept.txt").write_text("old")
    stamp = references / ".digits.json"
    data = references / "digits.npz"
    np.savez(data, nothing=np.zeros(1))
    _restamp(stamp, data)
    done = run(str(models), "--reference", str(references), "--only", "forest")
    assert done.returncode == 1
    assert "failed" in done.stdout and "KeyError" in done.stdout
    assert (models / "digits_forest" / "kept.txt").read_text() == "old"
    assert not list(models.glob(".preparing-*"))


def _restamp(stamp: Path, data: Path) -> None:
    import hashlib
    import json

    content = json.loads(stamp.read_text())
    content["files"][f"references/{data.name}"] = hashlib.sha256(data.read_bytes()).hexdigest()
    stamp.write_text(json.dumps(content))


def test_unknown_model_is_refused(tmp_path: Path) -> None:
    done = run(str(tmp_path / "models"), "--only", "no_such_model")
    assert done.returncode == 2
    assert "digits_forest" in done.stderr
