"""A scripted admin server, and the clients under test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from aiorch_client.admin import AdminClient
from aiorch_client.retry import RetryPolicy
from scripted_admin import ScriptedAdmin

#: As the client's own, but in a hurry.
HASTE = RetryPolicy(max_attempts=6, initial_backoff_s=0.01, max_backoff_s=0.05)


@pytest.fixture
def server() -> Iterator[ScriptedAdmin]:
    scripted = ScriptedAdmin()
    yield scripted
    scripted.close()


@pytest.fixture
def client(server: ScriptedAdmin) -> Iterator[AdminClient]:
    with AdminClient(server.url, retry=HASTE, timeout_s=20.0) as made:
        yield made
