"""The checked-in generated package is what its .proto files give."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import aiorch_proto
import pytest

PROTO = Path(__file__).resolve().parents[2] / "proto"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_proto", PROTO / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_check_passes() -> None:
    command = [sys.executable, str(PROTO / "generate.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_check_finds_each_kind_of_drift(generator: ModuleType, tmp_path: Path) -> None:
    files = generator.generate()
    assert sorted(files) == ["inference_pb2.py", "inference_pb2.pyi", "model_config_pb2.py", "model_config_pb2.pyi"]
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")
    assert generator.find_drift(files, tmp_path) == []
    (tmp_path / "inference_pb2.py").write_text("changed", "utf-8")
    (tmp_path / "model_config_pb2.pyi").unlink()
    (tmp_path / "old_pb2.py").write_text("left over", "utf-8")
    drift = generator.find_drift(files, tmp_path)
    assert [sentence.split()[0] for sentence in drift] == ["inference_pb2.py", "model_config_pb2.pyi", "old_pb2.py"]


def test_generated_text_knows_its_package(generator: ModuleType) -> None:
    for folder in generator.SOURCES:
        package = folder.replace("/", ".")
        for name, text in generator.generate(folder).items():
            assert "from aiorch." not in text, name
            assert f"'aiorch.{package}.{name.removesuffix('.py')}'" not in text, name
            assert f"'aiorch_proto.{package}.{name.removesuffix('.py')}'" in text or name.endswith(".pyi"), name


def test_package_is_typed_and_names_no_other_package() -> None:
    folder = Path(aiorch_proto.__file__).parent
    assert (folder / "py.typed").exists()
    for path in folder.rglob("*.py"):
        assert "tritonclient" not in path.read_text("utf-8"), path


def test_every_rpc_message_and_field_is_documented() -> None:
    """A field has a comment on its line, or its enum or message explains the whole of it."""
    for path in (PROTO / "aiorch").glob("*/*.proto"):
        bare = []
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            is_field = "=" in line and line.rstrip().endswith(";") and not line.lstrip().startswith(("//", "syntax"))
            if is_field and "TYPE_" not in line:
                bare.append(f"{path.name}:{number}: {line.strip()}")
        assert not bare
