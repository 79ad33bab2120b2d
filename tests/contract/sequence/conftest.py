"""A server with stateful models, and what their tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sequence_models import StatefulSite, write_models


@pytest.fixture(scope="package")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StatefulSite]:
    repository = write_models(tmp_path_factory.mktemp("stateful") / "models")
    site = StatefulSite(repository)
    yield site
    site.close()


@pytest.fixture
def own_repository(tmp_path: Path) -> Path:
    """For a server of the test's own."""
    repository = tmp_path / "models"
    repository.mkdir()
    return repository
