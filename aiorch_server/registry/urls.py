"""Where the registry's database is; passwords stay in here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from aiorch_server.errors import InvalidSettings

#: The dialect and driver for what a URL may begin with, and the extra that brings the driver.
_DRIVERS: Final = {
    "sqlite": ("sqlite+pysqlite", "admin"),
    "postgresql": ("postgresql+psycopg", "postgresql"),
    "mysql": ("mysql+pymysql", "mysql"),
    "mariadb": ("mysql+pymysql", "mysql"),
}
_HOST = re.compile(r"[A-Za-z0-9_.:%-]*", re.ASCII)
_NAME = re.compile(r"[^@:/?#]+")
_WRONG = (
    "the registry's URL cannot be read; it should be such as sqlite:///aiorch.db or "
    "postgresql://USER:PASSWORD@HOST:PORT/NAME, with characters of the password that have a meaning in URLs as %XX"
)


class DatabaseUrl:
    """A checked URL; its text and repr never hold the password."""

    def __init__(self, text: str) -> None:
        """Raises InvalidSettings for what is no URL of a database that is known here."""
        try:
            found = make_url(text)
        except (ArgumentError, ValueError):
            # Not chained: the reasons show parts of the URL.
            raise InvalidSettings(_WRONG) from None
        kind, _, driver = found.drivername.partition("+")
        known = _DRIVERS.get(kind)
        if known is None or (driver and f"{_DRIVERS[kind][0].partition('+')[0]}+{driver}" != known[0]):
            expected = ", ".join(_DRIVERS)
            raise InvalidSettings(f"the registry's URL should begin with one of {expected}, then ://")
        if not found.database or found.database == ":memory:" or "mode=memory" in found.database:
            raise InvalidSettings("the registry's URL must name a database, for SQLite a file: sqlite:///aiorch.db")
        if kind != "sqlite" and not (_HOST.fullmatch(found.host or "") and _NAME.fullmatch(found.database)):
            # A password with / or @ in it that was not written as %XX ends up in these, which are shown.
            raise InvalidSettings(_WRONG)
        self.kind, self.extra = ("mysql" if kind == "mariadb" else kind), known[1]
        self.full: URL = found.set(drivername=known[0])

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must never be shown."""
        password = self.full.password
        hidden = [value for key, value in self.full.query.items() if "pass" in key.lower()]
        texts = [str(password)] if password else []
        return tuple(filter(None, texts + [each for value in hidden for each in _as_texts(value)]))

    @property
    def file(self) -> Path | None:
        """SQLite's file, None for other databases."""
        return Path(self.full.database) if self.kind == "sqlite" and self.full.database else None

    @property
    def place(self) -> str:
        """For the log: SQLite's file from the root on, other databases as their text."""
        return str(self) if self.file is None else str(self.file.absolute())

    def hide(self, text: str) -> str:
        """``text`` without what must never be shown, on one line."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return " ".join(text.split())

    def prepare_folder(self) -> None:
        """Makes the folder that SQLite's file shall be in; InvalidSettings where that cannot be."""
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidSettings(f"the folder of {self} cannot be made: {error.strerror}") from error

    def __str__(self) -> str:
        shown = self.full.set(drivername=self.kind, query={}, password=None)
        return shown.render_as_string(hide_password=True)

    def __repr__(self) -> str:
        return f"DatabaseUrl({str(self)!r})"


def _as_texts(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
