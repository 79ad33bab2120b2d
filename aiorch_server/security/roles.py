"""Roles and the names of models that they hold for."""

from __future__ import annotations

import enum


class Role(enum.IntEnum):
    """From least to most: each may do what those below it may. The numbers are those of access.proto."""

    VIEWER = 1
    CLIENT = 2
    DEPLOYER = 3
    ADMIN = 4


def matches(pattern: str, model: str) -> bool:
    """Whether a pattern of model names, with ``*`` for any characters, covers ``model``.

    In linear time, whatever both are: callers choose the name. Each part is taken where it is found first, and what
    follows has the most room there.
    """
    first, *between = pattern.split("*")
    if not between:
        return model == first
    last = between.pop()
    if len(model) < len(first) + len(last) or not model.startswith(first) or not model.endswith(last):
        return False
    at, end = len(first), len(model) - len(last)
    for part in between:
        at = model.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True
