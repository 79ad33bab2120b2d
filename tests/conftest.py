"""What several folders of tests share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings
from turns import take_turn

# what one example takes says nothing on a machine with other work or under a sanitizer; each test has its time limit
settings.register_profile("house", deadline=None)
settings.load_profile("house")

ROOT = Path(__file__).parents[1]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    with take_turn():  # frameworks are imported, on all cores
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Outside of the test's time limit, which begins with its turn."""
    with take_turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


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
