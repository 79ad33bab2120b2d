"""``triton_python_backend_utils`` without a server: tensors, types, errors, configurations, imports, metrics."""

from __future__ import annotations

import gc
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiorch_backends.python import PythonBackend
from aiorch_backends.python.triton.model_config import fill_config
from aiorch_backends.python.triton.utilities import make_utilities

from aiorch_server.backend import DeclaredSignature, LoadContext
from aiorch_server.errors import ModelLoadError
from aiorch_server.observability.model_metrics import MAX_SERIES, ModelMetrics
from aiorch_server.types import DataType

torch = pytest.importorskip("torch")


def context_of(root: Path, code: str = "", config: dict[str, Any] | None = None, **options: Any) -> LoadContext:
    (root / "m" / "1").mkdir(parents=True, exist_ok=True)
    path = root / "m" / "1" / "model.py"
    path.write_text(code)
    return LoadContext("m", 1, root / "m", path, DeclaredSignature(), config=config or {}, **options)


@pytest.fixture
def pb(tmp_path: Path) -> Any:
    return make_utilities(context_of(tmp_path, declare_metric=ModelMetrics().declare))


@pytest.mark.parametrize("member", [each for each in DataType if each is not DataType.BF16])
def test_types_there_and_back(pb: Any, member: DataType) -> None:
    kind = pb.triton_string_to_numpy(member.config_name)
    assert np.dtype(kind) == member.numpy
    assert pb.numpy_to_triton_type(kind) == member.number
    assert np.dtype(pb.triton_to_numpy_type(member.number)) == member.numpy


def test_strings_there_and_back(pb: Any) -> None:
    array = np.array([[b"", b"a\0b"], ["\xe9", 7]], np.object_)
    data = pb.serialize_byte_tensor(array)
    assert pb.deserialize_bytes_tensor(data).tolist() == [b"", b"a\0b", "\xe9".encode(), b"7"]
    assert pb.serialize_byte_tensor(np.zeros(0, np.object_)) == ()
    with pytest.raises(ValueError, match="element 1 needs 9 bytes, 5 are left"):
        pb.deserialize_bytes_tensor(b"\0\0\0\0" + b"\5\0\0\0x")


def test_tensors_over_dlpack(pb: Any) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = pb.Tensor("X", array)
    assert torch.from_dlpack(tensor).tolist() == array.tolist()
    assert torch.utils.dlpack.from_dlpack(tensor.to_dlpack()).tolist() == array.tolist()
    for given in (torch.ones(2, 2), torch.utils.dlpack.to_dlpack(torch.ones(2, 2)), np.ones((2, 2), np.float32)):
        assert pb.Tensor.from_dlpack("Y", given).as_numpy().tolist() == [[1.0, 1.0], [1.0, 1.0]]
    half = pb.Tensor.from_dlpack("H", torch.tensor([1.5], dtype=torch.bfloat16))
    assert half.triton_dtype() == DataType.BF16.number
    assert torch.from_dlpack(half).tolist() == [1.5]
    with pytest.raises(pb.TritonModelException, match="BF16 is not supported by numpy"):
        half.as_numpy()
    with pytest.raises(pb.TritonModelException, match="string tensors"):
        pb.Tensor("S", np.array([b"x"], np.object_)).to_dlpack()
    with pytest.raises(pb.TritonModelException, match="must be a DLPack capsule"):
        pb.Tensor.from_dlpack("N", object())


def test_what_cannot_be_made(pb: Any) -> None:
    with pytest.raises(pb.TritonModelException, match="cannot be an empty string"):
        pb.Tensor("", np.zeros(1))
    with pytest.raises(TypeError, match="takes a numpy array, not a list"):
        pb.Tensor("X", [1])
    with pytest.raises(pb.TritonModelException, match="complex128"):
        pb.Tensor("X", np.zeros(1, np.complex128))
    with pytest.raises(pb.TritonModelException, match="should be a Tensor, not a int"):
        pb.InferenceResponse([5])
    with pytest.raises(TypeError, match="not 77"):
        pb.TritonError("x", 77)
    with pytest.raises(pb.TritonModelException, match="dict of bool, int, float or str"):
        pb.InferenceResponse([], parameters={"a": [1]})
    request = pb.InferenceRequest(inputs=[], requested_output_names=["Y"], model_name="other")
    for call in (request.exec, request.get_response_sender, lambda: pb.load_model("x")):
        with pytest.raises(pb.TritonModelException):
            call()


def test_models_complete_their_configuration(pb: Any) -> None:
    config = pb.ModelConfig(json.dumps({"name": "m", "max_batch_size": 4, "input": [], "output": []}))
    config.set_max_batch_size(8)
    config.add_input({"name": "X", "data_type": "TYPE_FP32", "dims": [3]})
    config.add_input({"name": "X", "data_type": "TYPE_FP32", "dims": [3], "optional": True})
    config.set_model_transaction_policy({"decoupled": True})
    assert config.as_dict()["max_batch_size"] == 8
    assert config.as_dict()["input"] == [{"name": "X", "data_type": "TYPE_FP32", "dims": [3], "optional": True}]
    assert pb.using_decoupled_model_transaction_policy(config.as_dict())
    for wrong in (
        lambda: config.set_max_batch_size(2),
        lambda: config.add_input({"name": "X", "data_type": "TYPE_FP64", "dims": [3]}),
        lambda: config.add_input({"name": "X", "data_type": "TYPE_FP32", "dims": [4]}),
        lambda: config.add_output({"name": "Y", "dims": [4]}),
        lambda: config.add_output({"name": "Y", "data_type": "TYPE_FP32", "dims": [4], "optional": True}),
        lambda: config.set_model_transaction_policy({"other": True}),
        lambda: pb.ModelConfig('{"ensemble_scheduling": {}}').set_dynamic_batching(),
        lambda: pb.ModelConfig('{"model_transaction_policy": {}}').set_model_transaction_policy({"decoupled": True}),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_a_filled_configuration_has_what_models_read() -> None:
    filled = fill_config({"name": "m", "input": [{"name": "X", "data_type": "TYPE_FP32", "dims": [1]}]})
    assert filled["model_transaction_policy"] == {"decoupled": False} and filled["parameters"] == {}
    assert filled["input"][0]["format"] == "FORMAT_NONE" and filled["output"] == []


def list_models() -> set[str]:
    """Other tests may have left some."""
    return {name for name in sys.modules if name.startswith("aiorch_models_")}


CLASS = """
class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        {body}
    def execute(self, requests):
        return []
"""


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return config", "declares an input"),
        ("return 5", "must return the ModelConfig"),
        ("raise ValueError('not today')", "ValueError: not today"),
        ("config.add_input({'name': 'X', 'data_type': 'FP32', 'dims': [1]}); return config", "declares an output"),
    ],
)
def test_a_configuration_that_says_too_little(tmp_path: Path, body: str, text: str) -> None:
    before = list_models()
    with pytest.raises(ModelLoadError, match=text):
        PythonBackend().inspect(context_of(tmp_path, CLASS.format(body=body)))
    assert list_models() <= before


def test_models_import_their_own_files_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list_models()
    installed = types.ModuleType("triton_python_backend_utils")
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", installed)
    modules = []
    for name in ("one", "two"):
        code = (
            "import triton_python_backend_utils as pb_utils\nimport text\nimport json\nfrom parts import words\n"
            "from parts.words import WORD\nclass Model:\n    inputs = [('X', 'FP32', [1])]\n"
            "    outputs = [('Y', 'FP32', [1])]\n    max_batch_size = 0\n"
            "    found = (text.NAME, WORD, words.WORD, json.__name__, text.pb_utils is pb_utils, pb_utils)\n"
            "    def execute(self, inputs): return {}\n"
        )
        context = context_of(tmp_path / name, code)
        folder = context.artefact.parent
        (folder / "text.py").write_text(f"import triton_python_backend_utils as pb_utils\nNAME = {name!r}\n")
        (folder / "json.py").write_text("raise AssertionError('the standard library comes first')\n")
        (context.model_directory / "parts").mkdir()
        (context.model_directory / "parts" / "words.py").write_text("import text\nWORD = text.NAME + '!'\n")
        backend = PythonBackend()
        signature = backend.inspect(context)
        instance: Any = backend.load(context, signature)
        modules.append(instance)
        *found, utilities = instance._module.model.found
        assert found == [name, f"{name}!", f"{name}!", "json", True]
        assert utilities is not installed and hasattr(utilities, "Tensor")
    assert sys.modules["triton_python_backend_utils"] is installed and "text" not in sys.modules
    for instance in modules:
        instance.close()
    assert list_models() <= before


def test_metrics_are_bounded_and_do_not_contradict_each_other() -> None:
    metrics = ModelMetrics()
    held = metrics.declare("a", "first", "counter", {"x": "1"})
    held.increment(2)
    again = metrics.declare("a", "first", "counter", {"x": "1"})
    again.increment(1)
    assert held.value() == 3.0
    for wrong in (
        ("a", "", "gauge", {}),
        ("nv_mine", "", "gauge", {}),
        ("1a", "", "gauge", {}),
        ("b", "", "summary", {}),
        ("b", "", "gauge", {"__x": "1"}),
        ("b", "", "gauge", {"x": 1}),
        ("b", "", "gauge", {"x": "1" * 2000}),
        ("b", "", "histogram", {}),
        ("b", "", "histogram", {}, (2, 1)),
    ):
        with pytest.raises(ValueError):
            metrics.declare(*wrong)  # type: ignore[arg-type]
    more = [metrics.declare("a", "first", "counter", {"x": str(index)}) for index in range(2, MAX_SERIES + 1)]
    with pytest.raises(ValueError, match="more are not kept"):
        metrics.declare("a", "first", "counter", {"x": "0"})
    del held, again, more
    gc.collect()
    assert list(metrics.collect()) == []
