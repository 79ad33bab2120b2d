from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from aiorch_backends.common import (
    FoundTensor,
    OpenedArtefacts,
    complete_signature,
    import_framework,
    is_set,
    locate,
    refuse,
)

from aiorch_server.backend import Backend, DeclaredSignature, LoadContext
from aiorch_server.errors import ModelLoadError
from aiorch_server.types import DataType, TensorSpec

CLASSES = {
    "onnxruntime": "OnnxRuntimeBackend",
    "pytorch": "PyTorchBackend",
    "tensorflow": "TensorFlowBackend",
    "sklearn": "SklearnBackend",
    "python": "PythonBackend",
    "identity": "IdentityBackend",
}
FRAMEWORKS = {"onnxruntime", "torch", "tensorflow", "keras", "sklearn", "skops", "joblib", "threadpoolctl"}


def make_context(artefact: Path, **parameters: str) -> LoadContext:
    folder = artefact.parent.parent
    return LoadContext("model", 2, folder, artefact, DeclaredSignature(), parameters=parameters)


@pytest.mark.parametrize(("folder", "name"), CLASSES.items())
def test_each_backend_is_where_its_entry_point_says(folder: str, name: str) -> None:
    backend = getattr(importlib.import_module(f"aiorch_backends.{folder}"), name)()
    assert isinstance(backend, Backend)
    assert backend.name == folder
    assert backend.platforms


def test_importing_backends_imports_no_framework() -> None:
    code = "; ".join(f"import aiorch_backends.{folder}" for folder in CLASSES)
    code += f"; import sys; print(sorted(set(sys.modules) & {FRAMEWORKS!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("folder", "framework", "artefact", "extra"),
    [
        ("onnxruntime", "onnxruntime", "model.onnx", "onnx"),
        ("pytorch", "torch", "model.pt2", "torch"),
        ("pytorch", "torch", "model.pt", "torch"),
        ("tensorflow", "tensorflow", "model.keras", "tensorflow"),
        ("tensorflow", "tensorflow", "model.savedmodel", "tensorflow"),
        ("sklearn", "sklearn", "model.skops", "sklearn"),
    ],
)
def test_missing_framework_names_the_extra(
    folder: str, framework: str, artefact: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, framework, None)
    (tmp_path / artefact).write_bytes(b"anything")
    backend: Backend = getattr(importlib.import_module(f"aiorch_backends.{folder}"), CLASSES[folder])()
    with pytest.raises(ModelLoadError, match=rf"'{framework}' is not installed; .*aiorchestrator\[{extra}\]"):
        backend.inspect(make_context(tmp_path / artefact))


def test_framework_that_breaks_while_importing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_a_framework.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelLoadError, match=r"is installed, but cannot be imported: .*no_such_dependency"):
        import_framework("half_a_framework", extra="onnx")


def test_texts_name_the_model_and_hide_the_servers_folders(tmp_path: Path) -> None:
    context = make_context(tmp_path / "model" / "2" / "model.onnx")
    assert locate(context) == "model/2/model.onnx"
    text = str(refuse(context, f"cannot\n  open {context.artefact}"))
    assert text == "model 'model' version 2, 'model/2/model.onnx': cannot open model/2/model.onnx"
    assert len(str(refuse(context, "x" * 10_000))) < 700
    assert str(refuse(context, EOFError())).endswith(": EOFError")


def test_flags_are_true_or_false() -> None:
    context = make_context(Path("m/1/f"), yes="True", no="0", maybe="perhaps")
    assert is_set(context, "yes")
    assert not is_set(context, "no")
    assert not is_set(context, "absent")
    with pytest.raises(ModelLoadError, match="'maybe' must be"):
        is_set(context, "maybe")


def test_opened_artefacts_are_given_out_once_and_bounded(tmp_path: Path) -> None:
    discarded: list[int] = []
    opened: OpenedArtefacts[int] = OpenedArtefacts(discarded.append)
    contexts = []
    for place in range(6):
        (tmp_path / f"{place}").write_text("x")
        contexts.append(make_context(tmp_path / f"{place}"))
        opened.put(contexts[-1], place)
    assert discarded == [0, 1]
    assert [opened.take(context) for context in contexts] == [None, None, 2, 3, 4, 5]
    assert opened.take(contexts[5]) is None
    opened.put(contexts[5], 50)
    opened.put(contexts[5], 51)
    assert discarded == [0, 1, 50]
    (tmp_path / "5").write_text("changed")
    assert opened.take(contexts[5]) is None


FOUND = (FoundTensor("x", DataType.FP32, (-1, 4)),)
OUT = (FoundTensor("y", DataType.FP32, (-1,)),)


@pytest.mark.parametrize(("declared", "size"), [(None, 32), (0, 0), (1, 1), (500, 500)])
def test_batch_size_is_the_declared_one(declared: int | None, size: int) -> None:
    context = LoadContext("m", 1, Path("m"), Path("m/1/f"), DeclaredSignature(max_batch_size=declared))
    signature = complete_signature(context, FOUND, OUT)
    assert signature.max_batch_size == size
    assert signature.inputs[0].shape == ((4,) if size else (-1, 4))
    assert signature.outputs[0].shape == (() if size else (-1,))


def test_labels_and_narrower_sizes_of_a_declaration_are_kept() -> None:
    output = TensorSpec("y", DataType.FP32, (3,), labels=("a", "b", "c"))
    context = LoadContext("m", 1, Path("m"), Path("m/1/f"), DeclaredSignature((), (output,), 8))
    assert complete_signature(context, FOUND, (FoundTensor("y", DataType.FP32, (-1, -1)),)).outputs == (output,)
