"""kill -9 at random moments of deploys, uploads and rollouts; `make chaos` does many more of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from chaos_campaign import campaign
from chaos_mishaps import fill_disk, stop_database
from databases import new_database

SEED = int(os.environ.get("AIORCH_CHAOS_SEED", "1"))

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(("kind", "n_servers", "rounds"), [("sqlite", 1, 3), ("postgresql", 2, 2)])
def test_killed_servers_lose_nothing(tmp_path: Path, kind: str, n_servers: int, rounds: int) -> None:
    url = new_database(kind, tmp_path)
    with campaign(tmp_path, url, seed=SEED, n_servers=n_servers, most_bytes=1 << 20) as found:
        found.run(rounds)
        result = found.result()
    assert result["kills"] >= rounds and result["acknowledged"] > 20
    assert result["requests_answered"] > 100 and not result["requests_failed"] + result["requests_wrong"]


def test_a_database_that_stands_still_stops_changes_alone(tmp_path: Path) -> None:
    result = stop_database(tmp_path, 4.0, seed=SEED)
    assert result["changes_refused"] >= 1


def test_a_full_disk_stops_uploads_alone(tmp_path: Path) -> None:
    result = fill_disk(tmp_path, new_database("sqlite", tmp_path), attempts=4, seed=SEED)
    assert result["refused"] >= 1
