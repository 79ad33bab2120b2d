"""A registry in SQLite, and servers that follow it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from databases import migrated_database
from rollout_site import Fleet, PuppetBackend


@pytest.fixture(autouse=True)
def record_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few requests are enough to find one to warm with."""
    monkeypatch.setattr("aiorch_server.deployments.wish.RECORDED", 2_000)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    made = Fleet(tmp_path, migrated_database("sqlite", tmp_path))
    PuppetBackend.loads.clear()
    PuppetBackend.rows.clear()
    yield made
    PuppetBackend.on_load = None
    await made.close()
