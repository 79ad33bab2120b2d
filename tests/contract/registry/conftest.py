"""The registry on each kind of database: a new one for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from databases import KINDS, migrated_database, new_database

from aiorch_server.registry.database import Database


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def empty_url(kind: str, tmp_path: Path) -> str:
    """A database without tables."""
    return new_database(kind, tmp_path)


@pytest.fixture
def url(kind: str, tmp_path: Path) -> str:
    return migrated_database(kind, tmp_path)


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = Database(url)
    yield opened
    opened.close()
