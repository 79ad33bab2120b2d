"""What SQLite's own wait does not cover."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest

from aiorch_server.registry.connections import _prepare_sqlite


class Busy:
    """A connection whose file is being made by another so many times that somebody looks."""

    def __init__(self, times: int) -> None:
        self.isolation_level: str | None = ""
        self.told: list[str] = []
        self._times = times

    def execute(self, statement: str) -> Any:
        if "WAL" in statement and self._times:
            self._times -= 1
            raise sqlite3.OperationalError("database is locked")
        self.told.append(statement)
        return sqlite3.connect(":memory:").execute("SELECT 1")


def test_a_file_that_another_makes_is_waited_for() -> None:
    connection: Any = Busy(times=3)
    _prepare_sqlite(connection, 5.0)
    assert connection.told == ["PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "PRAGMA foreign_keys=ON"]


def test_but_not_without_end() -> None:
    connection: Any = Busy(times=1_000_000)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        _prepare_sqlite(connection, 0.05)
