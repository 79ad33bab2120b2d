"""What callers are told of a registry that is away: that it is, and nothing of where it is and who uses it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from running_site import encode_values
from secured import DOORS, INFER, Secured, make_key, serve_secured

from aiorch_server.frontends import telling
from aiorch_server.frontends.admin.registry_access import RegistryAccess
from aiorch_server.registry.database import Database

#: Nobody listens there.
URL = "postgresql://spyuser:spypassword@127.0.0.1:1/spybooks"
KEY = make_key()
SHOWN = ("spyuser", "spybooks", "127.0.0.1", "spypassword")


async def ask_all(site: Secured) -> list[tuple[object, str]]:
    answers: list[tuple[object, str]] = []
    for path in (INFER, "/inference.GRPCInferenceService/ServerMetadata", "/no.Such/Method"):
        answer = await site.call(path, encode_values([1.0], "own-one"), KEY)
        answers.append((answer.code, answer.text))
    for method, path in (
        ("GET", "/v2"), ("POST", "/v2/models/own-one/infer"), ("GET", "/v1/models/own-one"), ("GET", "/nothing")
    ):  # fmt: skip
        response = await site.ask(method, path, KEY, **({"json": {}} if method == "POST" else {}))
        answers.append((response.status_code, response.text + str(response.headers)))
    return answers


@pytest.mark.parametrize("door", DOORS)
async def test_a_registry_that_is_away(models: Path, door: str, caplog: pytest.LogCaptureFixture) -> None:
    telling._logged_at.clear()
    async with serve_secured(models, door) as site:
        gate: Any = site.application._gate
        database = Database(URL, timeout_s=1.0)
        gate._authenticators[0]._others = RegistryAccess(database)
        with caplog.at_level(logging.WARNING):
            answers = await ask_all(site)
        await database.aclose()
    for code, text in answers:
        assert code in ("UNAVAILABLE", 503)
        assert "the registry is away: its database cannot be used; nothing was changed, try again" in text
        assert not [word for word in SHOWN if word in text], text
    told = [record.getMessage() for record in caplog.records if "callers are told" in record.getMessage()]
    assert len(told) == 1, "once for all calls"
    assert "postgresql://spyuser:***@127.0.0.1:1/spybooks cannot be used" in told[0] and "spypassword" not in told[0]
