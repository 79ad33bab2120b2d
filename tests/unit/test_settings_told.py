"""What docs/settings.md and ``aiorch serve --help`` say about settings is what the configuration does."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from aiorch_server.cli import build_app
from aiorch_server.config.load import ALIASES, setting_names
from aiorch_server.config.server import ServerConfig

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def default_of(path: tuple[str, ...]) -> str:
    value: Any = ServerConfig()
    for step in path:
        value = getattr(value, step)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return str(value.value)
    return f"{value:g}" if isinstance(value, float) else "" if value in (None, ()) else str(value)


def test_the_page_lists_every_setting_with_its_short_name_and_default() -> None:
    told = {}
    for line in PAGE.read_text().splitlines():
        cells = [re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:4]]
        if len(cells) == 3 and cells[0]:
            names, shorts, defaults = cells
            for position, name in enumerate(names):
                short = shorts[position] if shorts else None
                told[tuple(name.split("."))] = (short, "".join(defaults))
    short_names = {path: name for name, path in ALIASES.items()}
    assert told == {path: (short_names.get(path), default_of(path)) for path in set(setting_names().values())}


def list_told_defaults() -> list[tuple[str, str]]:
    options = typer.main.get_command(build_app()).commands["serve"].params  # type: ignore[attr-defined]
    found = [(option.name, re.findall(r"; default (.+)\.$", option.help or "")) for option in options]
    return [(name, default) for name, (default,) in filter(all, found)]


@pytest.mark.parametrize(("option", "told"), list_told_defaults())
def test_the_help_tells_the_defaults_there_are(option: str, told: str) -> None:
    names = setting_names()
    assert told == default_of(names[option])


def test_the_help_tells_the_default_of_every_option_that_has_one() -> None:
    options = {parameter.name for parameter in typer.main.get_command(build_app()).commands["serve"].params}  # type: ignore[attr-defined]
    paths = {name: path for name, path in setting_names().items() if name in options and default_of(path)}
    assert paths.keys() - dict(list_told_defaults()).keys() == {
        "allow_code",
        "grpc_use_ssl_mutual",
        "insecure",
    }  # plain flags
