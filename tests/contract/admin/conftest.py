"""The admin services on both doors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from admin_site import Site


@pytest.fixture(params=("native-1", "grpcio"))
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def site(door: str, tmp_path: Path) -> AsyncIterator[Site]:
    running = Site(tmp_path, door)
    await running.start()
    yield running
    await running.stop()
    assert running.services.watchers == 0
