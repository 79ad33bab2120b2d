"""Brings a database's tables to what this version of the server knows (schema.py), by numbered migrations.

Backwards is not supported: a backup is.
"""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from aiorch_server.errors import PreconditionFailed, RegistryUnavailable
from aiorch_server.registry.connections import Line, open_engine, using_line
from aiorch_server.registry.database import TIMEOUT_S
from aiorch_server.registry.failures import explain, explain_silence
from aiorch_server.registry.urls import DatabaseUrl

#: The last migration, and all in their order.
REVISIONS: Final = ("0001",)
HEAD: Final = REVISIONS[-1]
#: Longest time for all of it, another server's upgrade included.
LIMIT_S: Final = 120.0
_LOCK: Final = 0x61696F726368  # "aiorch"


class SchemaState(enum.StrEnum):
    """How a database's tables stand to this version."""

    EMPTY = "empty"
    OLDER = "older"
    CURRENT = "current"
    NEWER = "newer"


@dataclass(frozen=True, slots=True)
class SchemaCheck:
    """What was found: ``revision`` is "" in an empty database; ``head`` is what this version needs."""

    state: SchemaState
    revision: str
    head: str = HEAD


def check_schema(url: str | DatabaseUrl) -> SchemaCheck:
    """Looks, changes nothing; RegistryUnavailable, InvalidSettings."""
    with _connect(url, LIMIT_S) as connection:
        return _look(connection)


def upgrade_schema(url: str | DatabaseUrl, *, limit_s: float = LIMIT_S) -> SchemaCheck:
    """Brings the tables to HEAD and gives how they were; two at a time follow each other. Blocks its thread.

    Raises RegistryUnavailable, InvalidSettings, and PreconditionFailed where a newer version has been here.
    """
    with _connect(url, limit_s) as connection:
        found = _look(connection)
        if found.state is SchemaState.CURRENT:
            return found
    with _connect(url, limit_s, is_writer=True) as connection:
        _lock(connection, limit_s)
        found = _look(connection)
        if found.state is SchemaState.NEWER:
            raise PreconditionFailed(
                f"the registry's tables are at {found.revision}, this version knows {HEAD}: run a newer version, or "
                "restore the backup that was made before the upgrade"
            )
        if found.state is not SchemaState.CURRENT:
            _migrate(connection)
            connection.commit()
        return found


@contextlib.contextmanager
def _connect(url: str | DatabaseUrl, limit_s: float, *, is_writer: bool = False) -> Iterator[Connection]:
    known = url if isinstance(url, DatabaseUrl) else DatabaseUrl(url)
    known.prepare_folder()
    engine = open_engine(known, connections=1, connect_s=TIMEOUT_S, timeout_s=limit_s)
    line = Line()
    clock = threading.Timer(limit_s, line.cut)
    clock.daemon = True
    clock.start()
    try:
        with using_line(line), engine.execution_options(is_read=not is_writer).connect() as connection:
            yield connection
    except SQLAlchemyError as error:
        # Not chained: what drivers say may hold a password.
        found = explain_silence(known, limit_s) if line.is_cut else explain(error, known, is_committing=False)
        raise found from None
    finally:
        clock.cancel()
        engine.dispose()


def _look(connection: Connection) -> SchemaCheck:
    if not inspect(connection).has_table("alembic_version"):
        return SchemaCheck(SchemaState.EMPTY, "")
    revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() or ""
    if not revision:
        return SchemaCheck(SchemaState.EMPTY, "")
    if revision == HEAD:
        return SchemaCheck(SchemaState.CURRENT, revision)
    return SchemaCheck(SchemaState.OLDER if revision in REVISIONS else SchemaState.NEWER, revision)


def _lock(connection: Connection, limit_s: float) -> None:
    """Waits until no other server upgrades; ends with the connection. SQLite has its own lock by now."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    elif connection.dialect.name == "mysql":
        query = text("SELECT GET_LOCK(CONCAT('aiorch ', SHA1(DATABASE())), :wait)")
        if connection.execute(query, {"wait": int(limit_s)}).scalar() != 1:
            raise RegistryUnavailable("another server upgrades the registry's tables, and does not come to an end")


def _migrate(connection: Connection) -> None:
    # Imported here: a server whose tables are as they should be does without.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(files("aiorch_server.registry") / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
