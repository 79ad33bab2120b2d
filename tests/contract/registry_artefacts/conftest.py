"""A store of each kind."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto_server import MotoServer

from aiorch_server.registry.store import ArtefactStore, open_store


@pytest.fixture(scope="session")
def moto() -> Iterator[MotoServer]:
    server = MotoServer()
    yield server
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtefactStore]:
    if request.param == "folder":
        opened = open_store(str(tmp_path / "store"))
    else:
        moto: MotoServer = request.getfixturevalue("moto")
        opened = open_store(f"s3://models/{uuid.uuid4().hex}", scratch=tmp_path / "scratch", options=moto.options)
    yield opened
    opened.close()


@pytest.fixture
def folder_store(tmp_path: Path) -> Iterator[ArtefactStore]:
    opened = open_store(str(tmp_path / "store"))
    yield opened
    opened.close()
