"""The admin services on both doors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from admin_site import Site
from databases import migrated_database


@pytest.fixture(params=("native-1", "grpcio"))
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    """SQLite, but for tests that ask for every kind of database."""
    return str(getattr(request, "param", "sqlite"))


@pytest.fixture
async def site(door: str, kind: str, tmp_path: Path) -> AsyncIterator[Site]:
    running = Site(tmp_path, door, url="" if kind == "sqlite" else migrated_database(kind, tmp_path))
    await running.start()
    yield running
    await running.stop()
    assert running.services.watchers == 0
