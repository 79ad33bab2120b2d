"""The wheel holds the four packages and nothing else, and works outside the checkout, without any framework."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"aiorch_server", "aiorch_backends", "aiorch_client", "aiorch_proto"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy, so that the checkout's own build folders neither help nor suffer.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\n")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    # What is packed is the question here, not how fast it runs.
    compiler = folder / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CC", "cc")} "$@" -O0 -g0\n')
    compiler.chmod(0o755)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(folder / "source")],
        check=True,
        capture_output=True,
        env={**os.environ, "CC": str(compiler)},
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.timeout(600)
def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert not [name for name in names if name.endswith((".c", ".pyx", ".html", ".o")) or "/tests/" in name]
    for package in ("aiorch_server", "aiorch_backends", "aiorch_client"):
        assert f"{package}/py.typed" in names
    sources = [(ROOT, path) for path in (ROOT / "aiorch_server/_core").glob("*.pyx")]
    sources += [(ROOT / "backends", path) for path in (ROOT / "backends").glob("aiorch_backends/*/*.pyx")]
    modules = {path.relative_to(root).with_suffix("").as_posix() for root, path in sources}
    assert {name.split(".")[0] for name in names if name.endswith(".so")} == modules
    assert modules - {name.removesuffix(".pyi") for name in names} == set(), "without a stub"
    assert "aiorch_server/include/aiorch_instance.h" in names


@pytest.mark.timeout(600)
def test_light_import_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """No framework is needed, nor touched, to start the command and the client."""
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True
    )
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "tensorflow", "onnxruntime", "sklearn", "onnx", "keras", "scipy", "magika"}:
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import aiorch_server, aiorch_server.app, aiorch_server.cli, aiorch_client, aiorch_backends.onnxruntime
assert aiorch_server.__file__.startswith(sys.argv[1]), aiorch_server.__file__
assert aiorch_client.__file__.startswith(sys.argv[1]), aiorch_client.__file__
from aiorch_server._core import Scheduler
assert Scheduler.__module__ == "aiorch_server._core.scheduler"
sys.argv = ["aiorch", "version"]
try:
    aiorch_server.cli.main()
except SystemExit as end:
    assert not end.code, end.code
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(target)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "0.1.0" in done.stdout
