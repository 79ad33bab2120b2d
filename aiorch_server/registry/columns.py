"""Types of columns that mean the same in SQLite, PostgreSQL and MySQL or MariaDB."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import DateTime, String, Text
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

from aiorch_server.errors import RequestError

#: A document that is larger is refused: what is kept here is read as a whole.
LARGEST_DOCUMENT_BYTES: Final = 4 << 20
# Of fixed length, so that text is ordered as time is.
_SQLITE_FORMAT = "%(year)04d-%(month)02d-%(day)02dT%(hour)02d:%(minute)02d:%(second)02d.%(microsecond)06dZ"
_SQLITE_PATTERN = r"(\d+)-(\d+)-(\d+)T(\d+):(\d+):(\d+)\.(\d+)Z"


class Moment(TypeDecorator[datetime]):
    """An aware datetime in UTC, to the microsecond; ValueError for a naive one."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """timestamptz, DATETIME(6), or ISO 8601 as text."""
        if dialect.name == "postgresql":
            return dialect.type_descriptor(DateTime(timezone=True))
        if dialect.name == "mysql":
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        as_text = sqlite.DATETIME(storage_format=_SQLITE_FORMAT, regexp=_SQLITE_PATTERN)  # type: ignore[no-untyped-call]
        return dialect.type_descriptor(as_text)

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """In UTC, without saying so where the column cannot."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time must say its zone")
        value = value.astimezone(UTC)
        return value if dialect.name == "postgresql" else value.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Aware again."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Document(TypeDecorator[Any]):
    """JSON as text; RequestError for what JSON cannot say, or what is too large."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Text without a bound of its own."""
        return dialect.type_descriptor(mysql.LONGTEXT() if dialect.name == "mysql" else Text())

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """As text."""
        return None if value is None else write_document(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """As values."""
        return None if value is None else json.loads(value)


def write_document(value: Any) -> str:
    """The one way to write a value as JSON: keys in order, no spaces; RequestError as for Document."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"this cannot be written as JSON: {error}") from None
    if size > LARGEST_DOCUMENT_BYTES:
        raise RequestError(f"a document of {size} bytes is too large; at most {LARGEST_DOCUMENT_BYTES} are kept")
    return text


def name_type(length: int = 255) -> String:
    """Text that is compared byte by byte, everywhere; MySQL's tables say so for all their columns."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


#: Text of any length; MySQL's own ends at 64 KiB.
LONG_TEXT: Final = Text().with_variant(mysql.LONGTEXT(), "mysql")
