"""The fuzzers' corpus through the ordinary build: what broke something once, and what reaches far into the core."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUZZ = ROOT / "tests" / "fuzz"
TARGETS = sorted(path.name for path in (FUZZ / "corpus").iterdir())


def make_environment(compiled: Path) -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(compiled)])}
    environment.pop("PYTHONSAFEPATH", None)  # the scripts find each other beside themselves
    return environment


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The targets, compiled as the ordinary build is; quick when nothing has changed."""
    place = ROOT / ".cache" / "fuzz" / "plain"
    code = f"from compile_targets import *; compile_targets(Path({str(place)!r}), ROOT)"
    subprocess.run([sys.executable, "-c", code], cwd=FUZZ, env=make_environment(place), check=True)
    return place


def replay(compiled: Path, target: str, *inputs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FUZZ / "replay.py"), target, *map(str, inputs)]
    return subprocess.run(command, env=make_environment(compiled), capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(compiled: Path, target: str) -> None:
    folder = FUZZ / "corpus" / target
    done = replay(compiled, target, folder)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}: {done.stderr}"
    assert done.stdout.splitlines()[-1] == f"{len(list(folder.iterdir()))} inputs"


def test_a_broken_law_is_told(compiled: Path, tmp_path: Path) -> None:
    """The targets' own checks can fail: here for an answer of another model's making."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import runpy, sys\n"
        "import fuzz_batch\n"
        "fuzz_batch.decode_response = lambda data: ('m', '2', '', [])\n"
        f"sys.path.insert(0, {str(FUZZ)!r})\n"
        f"sys.argv = ['replay.py', 'batch', {str(FUZZ / 'corpus' / 'batch' / 'seed-0')!r}]\n"
        f"runpy.run_path({str(FUZZ / 'replay.py')!r}, run_name='__main__')\n"
    )
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=make_environment(compiled), capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "broken: the short path" in done.stderr
