"""What several folders of tests share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# what one example takes says nothing on a machine with other work or under a sanitizer; each test has its time limit
settings.register_profile("house", deadline=None)
settings.load_profile("house")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def example_models() -> Path:
    """The example repository with its reference answers beside it (``../reference``), built where it is missing."""
    models = ROOT / ".cache" / "tests" / "models"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "prepare.py"), str(models)],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return models
