"""A server with stateful models, and what their tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sequence_models import write_models
from served import Served, serve


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    repository = tmp_path_factory.mktemp("stateful")
    write_models(repository)
    with serve(repository) as running:
        states = {model["name"]: (model["state"], model["reason"]) for model in running.ready["models"]}
        assert set(states.values()) == {("READY", "")}, states
        yield running
        assert running.end() == 0
        assert "Traceback" not in running.log.read_text()
