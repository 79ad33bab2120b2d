"""The admin services on both doors."""

from __future__ import annotations

import pytest

DOORS = ("native-1", "grpcio")


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)
