"""tensorflow-serving-api, unmodified and with TensorFlow, on models of every backend."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from served import Served

SCRIPT = Path(__file__).with_name("real_client.py")
MODELS = (
    "digits_cnn",
    "digits_cnn_ts",
    "digits_forest",
    "digits_keras",
    "digits_pipeline",
    "filetype",
    "identity_fp32",
    "text_length",
)


def list_checks() -> list[str]:
    """The script's checks, without importing it: it imports TensorFlow."""
    functions = [node.name for node in ast.parse(SCRIPT.read_text()).body if isinstance(node, ast.FunctionDef)]
    names = [name.removeprefix("check_") for name in functions if name.startswith("check_") and name != "check_predict"]
    return names + [f"predict[{model}]" for model in MODELS]


@pytest.fixture(scope="module")
def ended(example_server: Served, example_models: Path) -> dict[str, str]:
    command = [sys.executable, str(SCRIPT), example_server.grpc, str(example_models.parent / "reference")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    outcomes: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


@pytest.mark.proves("PredictionService/*", "ModelService/*", by="tensorflow-serving-api")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("check", list_checks())
def test_real_client(ended: dict[str, str], check: str) -> None:
    assert ended[check] == "ok", ended[check]


def test_no_check_is_forgotten(ended: dict[str, str]) -> None:
    assert sorted(ended) == sorted(list_checks())
