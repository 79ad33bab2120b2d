"""A repository for the servers of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from secured import write_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("secured"))
