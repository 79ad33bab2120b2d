"""Rules for names that become paths: models, files and folders of a repository."""

from __future__ import annotations

import re

LONGEST_NAME = 255
_VERSION = re.compile(r"[1-9][0-9]{0,18}", re.ASCII)
_LARGEST_VERSION = 2**63 - 1


def check_name(name: str) -> str:
    """Gives ``name`` back if it is one plain path segment; ValueError says why it is not.

    A plain segment has no separator of any system, no control character, no leading dot (which also excludes ``.``
    and ``..``), and no space at either end.
    """
    if not name:
        raise ValueError("a name must not be empty")
    if len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME:
        raise ValueError(f"a name must have at most {LONGEST_NAME} bytes")
    if name.startswith("."):
        raise ValueError("a name must not start with '.'")
    if name != name.strip():
        raise ValueError("a name must not start or end with a space")
    if any(character in "/\\" or not character.isprintable() for character in name):
        raise ValueError("a name must not hold '/', '\\' or characters that do not print")
    return name


def check_file_name(name: str) -> str:
    """Like check_name, but empty stands for "not written"."""
    return check_name(name) if name else name


def parse_version(name: str) -> int | None:
    """The version a folder of that name stands for: a positive decimal number without leading zeros, else None."""
    if not _VERSION.fullmatch(name):
        return None
    version = int(name)
    return version if version <= _LARGEST_VERSION else None
