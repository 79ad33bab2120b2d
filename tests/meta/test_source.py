"""Linters and type checkers as tests, and the promises that files make to each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff() -> None:
    run("ruff", "check", ".")


def test_format() -> None:
    run("ruff", "format", "--check", ".")


@pytest.mark.timeout(600)
def test_mypy() -> None:
    run("mypy")


def test_stubs_name_what_the_modules_have() -> None:
    """Each public name of an extension's stub exists in the extension, and the other way round."""
    import importlib
    import inspect

    for stub in sorted((ROOT / "aiorch_server/_core").glob("*.pyi")):
        module = importlib.import_module(f"aiorch_server._core.{stub.stem}")
        text = stub.read_text()
        declared = set(re.findall(r"^(?:class|def) ([A-Za-z]\w*)", text, re.M))
        found = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)
        }
        typed_only = {name for name in declared if f"class {name}(TypedDict)" in text}
        assert declared - typed_only <= found, f"{stub.name} declares {declared - typed_only - found}"
        for name in found & declared:
            value = getattr(module, name)
            if not inspect.isclass(value):
                continue
            body = re.split(rf"^class {name}\b", text, flags=re.M)[1]
            body = re.split(r"\n(?=\S)", body, maxsplit=1)[0]
            for method in vars(value):
                if not method.startswith("_"):
                    assert re.search(rf"\b{method}\b", body), f"{stub.name}: {name}.{method} is missing"


def test_versions_agree() -> None:
    import aiorch_server

    assert f'version = "{aiorch_server.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {aiorch_server.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_runs_the_readmes_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make test" in readme and "make serve" in readme
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("make test")


def test_links_in_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_dockerfile() -> None:
    """No Docker engine is assumed: the linter reads it, and each file that it copies must be there."""
    text = (ROOT / "Dockerfile").read_text()
    done = subprocess.run([Path(sys.executable).parent / "hadolint", "-"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), f"Dockerfile copies {source}"
    assert re.search(r"^USER (?!root)", text, re.M), "the server must not run as root"
