"""The section of the model registry: its database, its artefacts, and what uploads may take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BeforeValidator, Field, SecretStr, model_validator

from aiorch_server.config.problems import Problem, raise_problems
from aiorch_server.config.section import Number, Section, Whole

#: What the database's URL may begin with.
DATABASES: Final = ("sqlite", "postgresql", "mysql", "mariadb")
_STORE = re.compile(r"(s3://[A-Za-z0-9][A-Za-z0-9._-]*(/[^\s]*)?|(?![a-z0-9+]+://).+)", re.DOTALL)
#: Bytes on a disk.
Room = Annotated[Whole, Field(ge=0, le=2**62)]


def _read_url(value: object) -> object:
    # Told here, because pydantic's own text would show what was found, and with it a password.
    if not isinstance(value, str | SecretStr):
        raise ValueError("should be text")
    return value


class RegistryConfig(Section):
    """The model registry; without ``url`` there is none.

    ``url`` names a database: ``sqlite:///FILE``, ``postgresql://USER:PASSWORD@HOST/NAME``, ``mysql://...`` or
    ``mariadb://...``; it is never shown, because it may hold a password. ``artefacts`` is a folder or
    ``s3://BUCKET/PREFIX`` that all servers of the registry share, None for ``artefacts`` beside SQLite's file, wherever
    the server was started, and in the current folder with other databases. ``cache_folder`` is one of this server
    alone, in which versions that serve are kept as files, at most ``cache_bytes`` of them beside those in use.

    Of an upload: the archive has at most ``max_upload_bytes``, what it unpacks to at most ``max_unpacked_bytes`` in
    ``max_files``; what is not finished after ``upload_expiry_secs`` is dropped; ``min_free_bytes`` stay free on the
    disk.
    """

    url: Annotated[SecretStr, BeforeValidator(_read_url)] = SecretStr("")
    artefacts: Annotated[str | None, Field(min_length=1, max_length=1000)] = None
    cache_folder: Path = Path("artefacts-cache")
    cache_bytes: Room = 64 << 30
    max_upload_bytes: Annotated[Room, Field(ge=1024)] = 32 << 30
    max_unpacked_bytes: Annotated[Room, Field(ge=1024)] = 64 << 30
    max_files: Annotated[Whole, Field(ge=1, le=100_000)] = 10_000
    upload_expiry_secs: Annotated[Number, Field(ge=1, le=30 * 24 * 3600)] = 24 * 3600.0
    min_free_bytes: Room = 1 << 30

    @property
    def is_enabled(self) -> bool:
        """Whether there is a registry."""
        return bool(self.url.get_secret_value())

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(self._find_problems())
        return self

    def _find_problems(self) -> Iterator[Problem]:
        scheme, separator, rest = self.url.get_secret_value().partition("://")
        if self.is_enabled and (not separator or not rest or scheme.partition("+")[0] not in DATABASES):
            text = f"should be a URL that begins with one of {', '.join(DATABASES)}, such as sqlite:///aiorch.db"
            yield Problem(("url",), text)
        if self.artefacts is not None and not _STORE.fullmatch(self.artefacts):
            yield Problem(("artefacts",), "should be a folder or s3://BUCKET/PREFIX")
