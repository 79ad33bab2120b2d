from __future__ import annotations

import dataclasses
import gc
import logging
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from aiorch_backends.python import PythonBackend
from aiorch_backends.python.imports import PrivatePackage, forget_package

from aiorch_server.backend import Backend, DeclaredSignature, LoadContext, ModelInstance
from aiorch_server.errors import ModelExecutionError, ModelLoadError, RequestError
from aiorch_server.testing import BackendConformance
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec

SUM_AND_TEXT = """
import numpy as np

class Model:
    inputs = [("x", "FP32", [-1]), ("text", "BYTES", [1])]
    outputs = [("sum", "FP64", [1]), ("upper", "BYTES", [1])]
    max_batch_size = 16

    def load(self, context):
        self.scale = float(context.parameters["scale"])

    def execute(self, inputs):
        total = inputs["x"].astype(np.float64).sum(axis=1, keepdims=True) * self.scale
        return {"sum": total, "upper": np.array([[t.decode().upper()] for t in inputs["text"][:, 0]], object)}
"""


class TestTypicalModel(BackendConformance):
    parameters: ClassVar[Mapping[str, str]] = {"scale": "2"}

    def make_backend(self) -> Backend:
        return PythonBackend()

    def write_artefact(self, folder: Path) -> Path:
        (folder / "model.py").write_text(SUM_AND_TEXT)
        return folder / "model.py"

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        x, texts = np.asarray(inputs["x"], np.float64), np.asarray(inputs["text"], object)
        upper = np.array([[text.decode().upper().encode()] for text in texts[:, 0]], object)
        return {"sum": x.sum(axis=1, keepdims=True) * 2, "upper": upper}


class TestConfiguredModel(BackendConformance):
    """Inputs and outputs come from the configuration alone; there is no batch dimension."""

    is_batching = False
    declared = DeclaredSignature(
        (TensorSpec("a", DataType.INT32, (2, 2)),), (TensorSpec("b", DataType.INT32, (2, 2)),), None
    )

    def make_backend(self) -> Backend:
        return PythonBackend()

    def write_artefact(self, folder: Path) -> Path:
        (folder / "model.py").write_text(
            "class Model:\n    def execute(self, inputs):\n        return {'b': inputs['a'].T}\n"
        )
        return folder / "model.py"

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return {"b": inputs["a"].T}

    def test_wrong_declaration_is_refused(self, backend: Backend, context: LoadContext) -> None:
        # The declaration is all there is; what contradicts it is seen when the model runs.
        declared = DeclaredSignature(self.declared.inputs, (TensorSpec("b", DataType.FP32, (2, 2)),))
        wrong = LoadContext("conformance", 3, context.model_directory, context.artefact, declared)
        instance = backend.load(wrong, backend.inspect(wrong))
        with pytest.raises(ModelExecutionError, match="'b' is int32, but FP32"):
            instance.execute({"a": np.ones((2, 2), np.int32)})


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    before = set(sys.modules)
    (tmp_path / "model" / "1").mkdir(parents=True)
    yield tmp_path / "model" / "1"
    for name in set(sys.modules) - before:
        if name.startswith("aiorch_models_"):
            sys.modules.pop(name)


def write(
    folder: Path, code: str, declared: DeclaredSignature | None = None, name: str = "model"
) -> tuple[PythonBackend, LoadContext]:
    (folder / "model.py").write_text(textwrap.dedent(code))
    context = LoadContext(name, 1, folder.parent, folder / "model.py", declared or DeclaredSignature())
    return PythonBackend(), context


def load(folder: Path, body: str, outputs: str = '[("y", "FP32", [2])]') -> ModelInstance:
    backend, context = write(
        folder,
        f"""
        import numpy as np
        from aiorch_server.errors import RequestError

        class Model:
            inputs = [("x", "FP32", [2])]
            outputs = {outputs}
            max_batch_size = 8
            def execute(self, inputs):
                {body}
        """,
    )
    return backend.load(context, backend.inspect(context))


ROWS = {"x": np.zeros((3, 2), np.float32)}


def test_users_error_is_shown_without_its_stack(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    instance = load(folder, "raise ValueError('too hot\\nsecret line')")
    with pytest.raises(ModelExecutionError) as raised:
        instance.execute(ROWS)
    assert str(raised.value) == "ValueError: too hot"
    assert "Traceback" in caplog.text and "raise ValueError" in caplog.text


def test_endless_failures_do_not_flood_the_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    instance = load(folder, "return 1 / 0")
    for _ in range(100):
        with pytest.raises(ModelExecutionError, match="ZeroDivisionError"):
            instance.execute(ROWS)
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 7


def test_leaving_the_process_is_only_an_error(folder: Path) -> None:
    with pytest.raises(ModelExecutionError, match="SystemExit: 3"):
        load(folder, "raise SystemExit(3)").execute(ROWS)


def test_request_error_keeps_its_code(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"^too long$"):
        load(folder, "raise RequestError('too long')").execute(ROWS)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return None", "returned a NoneType, not a mapping"),
        ("return {}", "no output 'y', only nothing"),
        ("return {'z': 1}", "no output 'y', only z"),
        ("return {'y': inputs['x'].astype('f8')}", "'y' is float64, but FP32"),
        ("return {'y': inputs['x'][:1]}", r"'y' has shape \[1, 2\], but the batch has 3 rows"),
        ("return {'y': np.float32(1)}", r"'y' has shape \[\], but the batch has 3 rows"),
        ("return {'y': inputs['x'][:, :1]}", r"'y' has shape \[1\], but \[2\] is declared"),
        ("return {'y': [[1, 2], [3]]}", "output 'y': "),
    ],
)
def test_wrong_output_is_named(folder: Path, body: str, text: str) -> None:
    with pytest.raises(ModelExecutionError, match=text):
        load(folder, body).execute(ROWS)


def test_bytes_output_takes_text_and_refuses_the_rest(folder: Path) -> None:
    outputs = '[("y", "BYTES", [])]'
    answer = load(folder, "return {'y': ['a', 'é', '']}", outputs).execute(ROWS)["y"]
    assert answer.tolist() == [b"a", "é".encode(), b""]
    with pytest.raises(ModelExecutionError, match="output 'y': element 0 is a int"):
        load(folder, "return {'y': np.array([1, 2, 3])}", outputs).execute(ROWS)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("raise RuntimeError('no weights')", "RuntimeError: no weights"),
        ("import there_is_no_such_module", "ModuleNotFoundError: No module named 'there_is_no_such_module'"),
        ("x = (", "SyntaxError"),
        ("import sys; sys.exit(2)", "SystemExit: 2"),
        ("model = 1", "no class 'Model' and no class 'TritonPythonModel'$"),
        ("import c_python_backend_utils", "ModuleNotFoundError: .*c_python_backend_utils"),
        ("class TritonPythonModel: pass", "class 'TritonPythonModel' has no method 'execute'"),
        ("class Model:\n    pass", "no method 'execute'"),
        ("class Model:\n    def __init__(self, needed): pass\n    def execute(self, i): pass", "TypeError"),
        ("class Model:\n    inputs = [('x', 'FP99', [1])]\n    def execute(self, i): pass", "Model.inputs: .*FP99"),
        ("class Model:\n    inputs = [('x', 'FP32')]\n    def execute(self, i): pass", "Model.inputs"),
        ("class Model:\n    max_batch_size = 'x'\n    def execute(self, i): pass", "max_batch_size must be 0 or more"),
        (
            "class Model:\n    def execute(self, i): pass",
            r"neither class 'Model' nor the configuration declares inputs",
        ),
        (
            "class Model:\n    def signature(self): return 1\n    def execute(self, i): pass",
            "must give a ModelSignature",
        ),
    ],
)
def test_broken_file_says_why(folder: Path, code: str, text: str) -> None:
    backend, context = write(folder, code)
    before = set(sys.modules)
    with pytest.raises(ModelLoadError, match=rf"model/1/model.py': .*{text}"):
        backend.inspect(context)
    assert not {name for name in set(sys.modules) - before if name.startswith("aiorch_models_")}


def test_failing_load_says_why(folder: Path) -> None:
    backend, context = write(folder, SUM_AND_TEXT)
    signature = backend.inspect(context)
    with pytest.raises(ModelLoadError, match="KeyError: 'scale'"):
        backend.load(context, signature)


def test_two_models_and_two_instances_share_nothing(tmp_path: Path) -> None:
    before = set(sys.modules)
    instances = []
    for name in ("first", "second", "second"):
        folder = tmp_path / name / "1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocabulary.py").write_text(f"NAME = {name!r}\n")
        backend, context = write(
            folder,
            """
            import numpy as np
            from . import vocabulary
            calls = []

            class Model:
                inputs = [("x", "FP32", [1])]
                outputs = [("y", "BYTES", [1])]
                def execute(self, inputs):
                    calls.append(1)
                    return {"y": [f"{vocabulary.NAME} {len(calls)}"]}
            """,
            name=name,
        )
        instances.append(backend.load(context, backend.inspect(context)))
    one = {"x": np.zeros(1, np.float32)}
    answers = [instance.execute(one)["y"][0] for instance in (*instances, instances[0])]
    assert answers == [b"first 1", b"second 1", b"second 1", b"first 2"]
    assert "model" not in sys.modules and "vocabulary" not in sys.modules
    for instance in instances:
        instance.close()
    assert not [name for name in set(sys.modules) - before if name.startswith("aiorch_models_")]


def test_close_is_called_once_and_may_fail(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend, context = write(
        folder,
        """
        class Model:
            inputs = outputs = [("x", "FP32", [1])]
            def execute(self, inputs):
                return inputs
            def close(self):
                raise OSError("still open")
        """,
    )
    instance = backend.load(context, backend.inspect(context))
    instance.close()
    instance.close()
    assert len([record for record in caplog.records if "close() failed" in record.message]) == 1
    with pytest.raises(ModelExecutionError, match="closed"):
        instance.execute({"x": np.zeros(1, np.float32)})


def test_module_of_a_dropped_instance_is_forgotten(folder: Path) -> None:
    before = set(sys.modules)
    instance = load(folder, "return {'y': inputs['x']}")
    assert set(sys.modules) - before
    del instance
    gc.collect()
    assert not set(sys.modules) - before


def test_signature_method_and_optional_inputs(folder: Path) -> None:
    backend, context = write(
        folder,
        """
        import numpy as np
        from aiorch_server.types import DataType, ModelSignature, TensorSpec

        class Model:
            def signature(self):
                x = TensorSpec("x", DataType.FP32, (1,))
                scale = TensorSpec("scale", DataType.FP32, (1,), optional=True)
                return ModelSignature((x, scale), (TensorSpec("y", DataType.FP32, (1,)),), 4)
            def execute(self, inputs):
                return {"y": inputs["x"] * inputs.get("scale", np.float32(10))}
        """,
    )
    signature = backend.inspect(context)
    assert signature == ModelSignature(
        (TensorSpec("x", DataType.FP32, (1,)), TensorSpec("scale", DataType.FP32, (1,), optional=True)),
        (TensorSpec("y", DataType.FP32, (1,)),),
        4,
    )
    instance = backend.load(context, signature)
    assert instance.execute({"x": np.ones((1, 1), np.float32)})["y"].tolist() == [[10]]


def test_configuration_may_lower_but_not_raise_the_batch(folder: Path) -> None:
    backend, context = write(folder, SUM_AND_TEXT, DeclaredSignature(max_batch_size=4))
    assert backend.inspect(context).max_batch_size == 4
    backend, context = write(folder, SUM_AND_TEXT, DeclaredSignature(max_batch_size=64))
    with pytest.raises(ModelLoadError, match="64 is declared, but the model takes 16 rows at most"):
        backend.inspect(context)


def test_the_batch_that_the_class_declares_is_not_narrowed_by_the_default(folder: Path) -> None:
    backend, context = write(folder, SUM_AND_TEXT)
    assert backend.inspect(dataclasses.replace(context, default_max_batch_size=4)).max_batch_size == 16


def test_a_file_that_was_edited_a_moment_ago_is_not_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size and within the same second: Python's own cache of compiled files does not see that."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "model.py"
    versions = []
    for number in (1, 2):
        path.write_text(f"from part import PART\nnumber = {number}\n")
        (tmp_path / "part.py").write_text(f"PART = {number}\n")
        for each in (path, tmp_path / "part.py"):
            os.utime(each, (1_700_000_000, 1_700_000_000))
        module = PrivatePackage(f"aiorch_models_edited_{number}", [tmp_path], {}).open(path)
        versions.append((module.number, module.PART))
        forget_package(module.__name__)
    assert versions == [(1, 1), (2, 2)]
