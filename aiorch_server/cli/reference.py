"""A model as it is written on command lines: ``digits``, ``digits:7``, ``digits@prod``."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import typer

from aiorch_server.cli.output import UsageError

Reference = Annotated[str, typer.Argument(metavar="MODEL[:VERSION|@ALIAS]", help="The latest version without either.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name.")]


class Named(NamedTuple):
    """What a reference names; ``version`` 0 and no ``alias``: the latest."""

    model: str
    version: int = 0
    alias: str = ""


def parse_reference(text: str) -> Named:
    """What ``text`` names; UsageError where it is no reference."""
    model, at, alias = text.partition("@")
    model, colon, number = model.partition(":")
    if not model or (at and (colon or not alias)) or (colon and not (number.isascii() and number.isdecimal())):
        raise UsageError(f"'{text}' names no version: expected MODEL, MODEL:7 or MODEL@alias")
    if colon and int(number) == 0:
        raise UsageError(f"'{text}': versions begin with 1")
    return Named(model, int(number or 0), alias)


def check_model_name(text: str) -> str:
    """``text`` itself; UsageError where it also names a version, which has no meaning there."""
    if "@" in text or ":" in text:
        raise UsageError(f"'{text}': expected the model's name alone, without version or alias")
    return text


def parse_pairs(entries: list[str], option: str) -> dict[str, str]:
    """``NAME=VALUE`` entries; UsageError."""
    pairs = {}
    for entry in entries:
        name, separator, value = entry.partition("=")
        if not separator or not name:
            raise UsageError(f"{option} {entry}: expected NAME=VALUE")
        pairs[name] = value
    return pairs


def parse_number(text: str, option: str) -> float:
    """A number; UsageError."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{option}: '{text}' is no number") from None
