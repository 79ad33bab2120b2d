"""A model's free parameters: who reads which, and what is said of those that nobody reads."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from aiorch_backends.identity import IdentityBackend
from aiorch_backends.onnxruntime import OnnxRuntimeBackend
from aiorch_backends.python import PythonBackend
from aiorch_backends.pytorch import PyTorchBackend
from aiorch_backends.sklearn import SklearnBackend
from aiorch_backends.tensorflow import TensorFlowBackend

from aiorch_server.app import Application
from aiorch_server.backend import Backend
from aiorch_server.config.model import ModelConfig
from aiorch_server.config.parameters import (
    FLAGS,
    SERVER_PARAMETERS,
    find_idle_parameters,
    find_unknown_parameters,
    read_flag,
)
from aiorch_server.config.server import ServerConfig
from aiorch_server.errors import ModelLoadError

ROOT = Path(__file__).parents[2]
BACKENDS = [IdentityBackend, OnnxRuntimeBackend, PyTorchBackend, SklearnBackend, TensorFlowBackend]


def tell(backend: type[Backend], name: str) -> str:
    assert backend.parameters is not None
    return "; ".join(map(str, find_unknown_parameters([name], backend.name, backend.parameters)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_names_what_it_reads(backend: type[Backend]) -> None:
    read = set()
    for file in (ROOT / "backends" / "aiorch_backends" / backend.name).glob("*.py"):
        read |= set(re.findall(r'parameters\.get\(\s*"(\w+)"', file.read_text()))
        read |= set(re.findall(r'is_set\(context, "(\w+)"\)', file.read_text()))
    assert set(backend.parameters or ()) == read
    for name in (*read, *SERVER_PARAMETERS, "version_label.stable"):
        assert tell(backend, name) == ""


def test_the_page_lists_them_all() -> None:
    told: dict[str, set[str]] = {}
    for line in (ROOT / "docs" / "models.md").read_text().splitlines():
        cells = line.split("|")
        if len(cells) == 5 and cells[1].strip().startswith("`") and not cells[2].strip().startswith("-"):
            for name in re.findall(r"`([\w.<>]+)`", cells[1]):
                told.setdefault(name, set()).update(re.findall(r"\w+", cells[2]))
    for backend in BACKENDS:
        for name in backend.parameters or ():
            assert backend.name in told[name]
    for name in SERVER_PARAMETERS:
        assert told[name] == {"all"}


@pytest.mark.parametrize(
    ("backend", "name", "expected"),
    [
        (
            OnnxRuntimeBackend,
            "cpu_thread",
            "parameters.cpu_thread: is unknown to backend 'onnxruntime'; did you mean 'cpu_",
        ),
        (OnnxRuntimeBackend, "graph_optimisation_level", "did you mean 'graph_optimization_level'?"),
        (
            IdentityBackend,
            "xyz",
            "known here: cpu_threads, execute_delay_us, isolate_failures, objective, tuning, version_label",
        ),
        (PyTorchBackend, "INTRA_OP_THREAD_COUNT", "is a parameter of Triton's; here it is 'cpu_threads'"),
        (TensorFlowBackend, "TF_SIGNATURE_DEF", "here it is 'signature_name'"),
        (OnnxRuntimeBackend, "TF_SIGNATURE_DEF", "Triton's that backend 'onnxruntime' does not have here; remove it"),
        (TensorFlowBackend, "TF_INIT_OPS_FILE", "Triton's that backend 'tensorflow' does not have here; remove it"),
        (IdentityBackend, "TRITON_BATCH_STRATEGY_PATH", "backend 'identity' does not have here; remove it"),
    ],
)
def test_what_nobody_reads_is_told_with_what_was_meant(backend: type[Backend], name: str, expected: str) -> None:
    assert expected in tell(backend, name)


def test_hints_for_tritons_backends_are_accepted_and_told() -> None:
    names = ["ENABLE_NVFUSER", "enable_mem_arena", "cpu_threads"]
    assert tell(PyTorchBackend, "ENABLE_NVFUSER") == ""
    notes = list(find_idle_parameters(names, ()))
    assert [note.partition(" has no effect")[0] for note in notes] == [f"parameters.{name}" for name in names[:2]]


def test_python_models_get_all() -> None:
    assert PythonBackend.parameters is None


def test_ensembles_read_labels_alone() -> None:
    tensor = [{"name": "X", "data_type": "TYPE_FP32", "dims": [1]}]
    step = {"model_name": "a", "model_version": -1, "input_map": {"X": "X"}, "output_map": {"Y": "Y"}}
    data = {
        "platform": "ensemble",
        "input": tensor,
        "output": [{**tensor[0], "name": "Y"}],
        "ensemble_scheduling": {"step": [step]},
    }
    ModelConfig.from_dict({**data, "parameters": {"version_label.stable": "1"}}, folder="e")
    with pytest.raises(ModelLoadError, match=r"parameters\.cpu_threads: an ensemble reads none but version_label"):
        ModelConfig.from_dict({**data, "parameters": {"cpu_threads": "1"}}, folder="e")


async def test_a_model_with_such_a_parameter_does_not_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "aiorch_server")
    for name, parameter in (("wrong", "execute_delay"), ("hinted", "ENABLE_NVFUSER")):
        (tmp_path / name / "1").mkdir(parents=True)
        text = f'backend: "identity" parameters {{ key: "{parameter}" value {{ string_value: "1" }} }}'
        (tmp_path / name / "config.pbtxt").write_text(text)
    config = ServerConfig.model_validate(
        {"grpc": {"port": 0}, "http": {"port": 0}, "metrics": {"port": 0}, "repository": {"paths": [str(tmp_path)]}}
    )
    async with Application(config) as app:
        entries = {entry.name: entry for entry in app.controlplane.repository_index()}
        assert entries["hinted"].state.value == "READY"
        assert "parameters.execute_delay: is unknown to backend 'identity'; did you mean 'execute_delay_us'?" in (
            entries["wrong"].reason
        )
        assert "model 'hinted': parameters.ENABLE_NVFUSER has no effect" in caplog.text


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false(name: str) -> None:
    assert [read_flag({name: value}, name) for value in ("true", "True", "1", "false", " FALSE ", "0")] == [
        True
    ] * 3 + [False] * 3
    assert read_flag({}, name)
    for value in ("no", "off", ""):
        with pytest.raises(ModelLoadError, match=f"parameter '{name}' is '{value}', true or false is right"):
            read_flag({name: value}, name)
