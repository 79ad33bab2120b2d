"""How connections to each kind of database are made, so that none waits without end."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import NoSuchModuleError

from aiorch_server.errors import InvalidSettings
from aiorch_server.pauses import pause
from aiorch_server.registry.urls import DatabaseUrl

#: How long a transaction may stand still between two statements before the server ends it: its process may be halted.
_IDLE_S: Final = 10
_GRACE_S: Final = 0.5
_LOOK_AGAIN_S: Final = 0.01
_SOCKET = "aiorch_socket"


def open_engine(url: DatabaseUrl, *, connections: int, connect_s: float, timeout_s: float) -> Engine:
    """An engine of at most ``connections``, each made within ``connect_s``.

    A statement and its wait for locks take at most ``timeout_s``, as far as the database sees to that. Connects
    nowhere. Raises InvalidSettings where the driver is not installed.
    """
    options: dict[str, Any] = {} if url.kind == "sqlite" else {"isolation_level": "READ COMMITTED"}
    try:
        engine = create_engine(
            url.full,
            connect_args=_choose_arguments(url, connect_s, timeout_s),
            hide_parameters=True,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=timeout_s,
            **options,
        )
    except (ImportError, NoSuchModuleError):
        text = f"the registry's driver is missing: pip install 'aiorchestrator[admin,{url.extra}]'"
        raise InvalidSettings(text) from None
    if url.kind == "sqlite":
        event.listen(engine, "connect", lambda connection, record: _prepare_sqlite(connection, timeout_s))
        event.listen(engine, "begin", _begin_sqlite)
        # Other databases are waited for at each statement. Making a statement costs about as much as reading its rows.
        event.listen(engine, "before_cursor_execute", _pause)
        event.listen(engine, "after_cursor_execute", _pause)
    elif url.kind == "postgresql":
        event.listen(engine, "connect", _keep_socket, insert=True)  # before the first questions to the server
        event.listen(engine, "checkout", _claim_socket)
        event.listen(engine, "close", _drop_socket)
    return engine


def _choose_arguments(url: DatabaseUrl, connect_s: float, timeout_s: float) -> dict[str, Any]:
    given = url.full.query
    if url.kind == "sqlite":
        return {"timeout": timeout_s}
    if url.kind == "postgresql":
        wanted = {"connect_timeout": max(2, round(connect_s)), "application_name": "aiorch"}
        milliseconds = round(timeout_s * 1000)
        options = {
            "lock_timeout": milliseconds,
            "statement_timeout": milliseconds,
            "idle_in_transaction_session_timeout": _IDLE_S * 1000,
            "TimeZone": "UTC",
        }
        wanted["options"] = " ".join(f"-c {name}={value}" for name, value in options.items())
        return {name: value for name, value in wanted.items() if name not in given}
    seconds = max(1, round(timeout_s))
    # What follows the M is read by MariaDB alone; MySQL has no such setting.
    session = (
        f"SET SESSION innodb_lock_wait_timeout={seconds}, time_zone='+00:00', sql_mode='TRADITIONAL' "
        f"/*M!, idle_transaction_timeout={_IDLE_S} */"
    )
    # The server's own limit comes first: it leaves the connection as it is, and says what was in the way.
    silence_s = timeout_s + _GRACE_S
    limits = {"connect_timeout": max(1, round(connect_s)), "read_timeout": silence_s, "write_timeout": silence_s}
    return {"charset": "utf8mb4", "init_command": session, **limits}


def _prepare_sqlite(connection: sqlite3.Connection, timeout_s: float) -> None:
    # The driver's own way of beginning transactions is off: _begin_sqlite does it.
    connection.isolation_level = None
    until = time.monotonic() + timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            break
        except sqlite3.OperationalError:
            # Of two that make a new file so at once, one is told that it is locked without any wait.
            # https://www.sqlite.org/c3ref/busy_handler.html
            if time.monotonic() >= until:
                raise
            time.sleep(_LOOK_AGAIN_S)
    for setting in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}").close()


def _begin_sqlite(connection: Any) -> None:
    # A writer that began as a reader could not go on after another writer's commit.
    is_read = connection.get_execution_options().get("is_read", False)
    connection.exec_driver_sql("BEGIN" if is_read else "BEGIN IMMEDIATE")


def _pause(*_: object) -> None:
    pause()


class Line:
    """What a thread waits on while it talks to the database; another thread may cut it.

    Only for drivers that would wait without end (psycopg's has no time limit of its own).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.is_cut = False

    def cut(self) -> None:
        """Lets the wait that is under way, and each further one, end with an error at once; for any thread."""
        with self._lock:
            self.is_cut = True
            if self._socket is not None:
                _end_wait(self._socket)

    def hold(self, held: socket.socket | None) -> None:
        """The thread's connection is this one now, None: none."""
        with self._lock:
            self._socket = held
            if self.is_cut and held is not None:
                _end_wait(held)


class _Lines(threading.local):
    current: Line | None = None


_lines = _Lines()


@contextlib.contextmanager
def using_line(line: Line) -> Iterator[None]:
    """Connections that this thread takes in here are held by ``line``, until they are given back."""
    _lines.current = line
    try:
        yield
    finally:
        _lines.current = None
        line.hold(None)


def _end_wait(held: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed
        held.shutdown(socket.SHUT_RDWR)


def _keep_socket(connection: Any, record: Any) -> None:
    # A second descriptor, because the driver may close its own at any time and the number then be another's.
    record.info[_SOCKET] = socket.socket(fileno=os.dup(connection.fileno()))
    _claim_socket(connection, record)


def _claim_socket(connection: Any, record: Any, fairy: Any = None) -> None:
    if _lines.current is not None:
        _lines.current.hold(record.info.get(_SOCKET))


def _drop_socket(connection: Any, record: Any) -> None:
    held = record.info.pop(_SOCKET, None)
    if held is not None:
        if _lines.current is not None:
            _lines.current.hold(None)
        held.close()
