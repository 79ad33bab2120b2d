"""Calls that need a header: Triton's ``--grpc-restricted-protocol`` and ``--http-restricted-api``.

Written ``GROUP,GROUP...:KEY=VALUE``. The value is a secret: no text that is made here has any part of what was written
but the name of a group.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Final

from pydantic import BeforeValidator, SecretStr

from aiorch_server.config.problems import Problem
from aiorch_server.config.section import Section

_EXPECTED: Final = "should be written GROUP,GROUP...:KEY=VALUE, for example model-repository,logging:admin-key=SECRET"
_KEY: Final = re.compile(r"[0-9A-Za-z_.-]{1,100}", re.ASCII)
#: What a header carries unchanged, through any proxy: printable ASCII, without spaces at its ends.
_VALUE: Final = re.compile(r"[!-~](?:[ -~]{0,510}[!-~])?", re.ASCII)
#: A group's name that may be told, since no part of a secret has strayed into it.
_WORD: Final = re.compile(r"[A-Za-z_-]{1,30}", re.ASCII)


class Group(enum.StrEnum):
    """What calls have in common, by Triton's names (server/src/restricted_features.h)."""

    HEALTH = "health"
    METADATA = "metadata"
    INFERENCE = "inference"
    SHARED_MEMORY = "shared-memory"
    MODEL_CONFIG = "model-config"
    MODEL_REPOSITORY = "model-repository"
    STATISTICS = "statistics"
    TRACE = "trace"
    LOGGING = "logging"


class Restriction(Section):
    """Calls of ``groups`` must carry the header ``key`` (at the gRPC door with a prefix) with this value."""

    groups: tuple[Group, ...]
    key: str
    value: SecretStr


def _read(written: object) -> object:
    if isinstance(written, Restriction):
        return written
    if not isinstance(written, str):
        raise ValueError(_EXPECTED)
    names, colon, header = written.partition(":")
    key, equals, value = header.partition("=")
    if not (colon and equals and names.strip()):
        raise ValueError(_EXPECTED)
    if not _KEY.fullmatch(key):
        raise ValueError(f"{_EXPECTED}; KEY is 1 to 100 letters, digits, '-', '_' and '.'")
    if not _VALUE.fullmatch(value):
        raise ValueError(f"{_EXPECTED}; VALUE is 1 to 512 printable ASCII characters without spaces at its ends")
    groups = [name.strip() for name in names.split(",")]
    for name in groups:
        if name not in tuple(Group):
            named = f" '{name}'" if _WORD.fullmatch(name) else ""
            raise ValueError(f"{_EXPECTED}; there is no group{named}, groups are {', '.join(Group)}")
    return {"groups": groups, "key": key, "value": value}


def find_repeated(field: str, restrictions: Sequence[Restriction]) -> Iterator[Problem]:
    """A problem for each group that ``restrictions``, the value of ``field``, have more than once."""
    seen: set[Group] = set()
    for index, restriction in enumerate(restrictions):
        for group in restriction.groups:
            if group in seen:
                yield Problem((field, index), f"has group '{group}' again; a group has one header, so name it once")
            seen.add(group)


def find_binary(field: str, restrictions: Sequence[Restriction]) -> Iterator[Problem]:
    """A problem for each key that gRPC's metadata cannot have with a plain value."""
    for index, restriction in enumerate(restrictions):
        if restriction.key.lower().endswith("-bin"):
            yield Problem((field, index), "has a key that ends in '-bin', which gRPC keeps for base64; choose another")


Restricted = Annotated[Restriction, BeforeValidator(_read)]
