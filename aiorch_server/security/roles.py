"""Roles and the names of models that they hold for."""

from __future__ import annotations

import enum
import re
from functools import lru_cache


class Role(enum.IntEnum):
    """From least to most: each may do what those below it may. The numbers are those of access.proto."""

    VIEWER = 1
    CLIENT = 2
    DEPLOYER = 3
    ADMIN = 4


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in pattern.split("*")), re.DOTALL)


def matches(pattern: str, model: str) -> bool:
    """Whether a pattern of model names, with ``*`` for any characters, covers ``model``."""
    return pattern == "*" or _compile(pattern).fullmatch(model) is not None
