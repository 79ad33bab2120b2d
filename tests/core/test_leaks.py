"""Each compiled module gives its memory back: a script per case, in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "leaks" / "core.py"


@pytest.mark.parametrize(
    "case", ["wire", "former", "histogram", "scheduler", "contents", "members", "routes", "threads"]
)
def test_memory_is_given_back(case: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), case], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
