"""Sessions and their driver give their memory back: a script per case, in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LEAKS = Path(__file__).parent / "leaks"


@pytest.mark.parametrize("case", ["session", "driver", "thread", "asking"])
def test_memory_is_given_back(case: str) -> None:
    done = subprocess.run(
        [sys.executable, str(LEAKS / "sessions.py"), case], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr


def test_mixed_traffic_leaves_nothing() -> None:
    """A short one of ``make leak-run``: its fewest rounds."""
    command = [sys.executable, str(LEAKS / "traffic.py"), "--seconds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
