"""Real databases for tests: SQLite files, and PostgreSQL and MariaDB servers of the test process's own, on loopback.

There is one server of each kind, started when first asked for and gone with the process; each test has a database of
its own in it. A test that stops a server has one to itself: ``PostgresServer()``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import psutil
import psycopg
import pymysql
import pytest
from patience import PATIENCE

from aiorch_server.registry.upgrade import upgrade_schema

START_LIMIT_S = 60.0 * PATIENCE
KINDS = ("sqlite", "postgresql", "mariadb")
#: For tests whose fixtures take the ``kind`` of their database from here.
on_every_database = pytest.mark.parametrize("kind", KINDS, indirect=True)
#: With characters that mean something in URLs, to SQL and to shells.
PASSWORD = "pass/w:ord@#%'1"
_names = itertools.count(1)


class DatabaseServer:
    """A server as a user that is not root, with its data in a scratch folder."""

    account: ClassVar[str]

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"aiorch-{self.account}-"))
        self._user = self.account if os.geteuid() == 0 else None
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        self._log = self.folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as door:
            self.port = door.getsockname()[1]
        atexit.register(self.close)
        self._prepare()
        self.start()

    def url(self, name: str) -> str:
        raise NotImplementedError

    def execute(self, statement: str, database: str = "") -> list[tuple[Any, ...]]:
        """Runs a statement, beside whatever is under test."""
        raise NotImplementedError

    def create(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{next(_names)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def start(self) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", *self._command()]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, **self._as_user(), stdout=log, stderr=log, cwd=self.folder)
        until = time.monotonic() + START_LIMIT_S
        while True:
            try:
                self.execute("SELECT 1")
                return
            except (psycopg.OperationalError, pymysql.err.OperationalError):
                assert time.monotonic() < until and self._process.poll() is None, self._log.read_text()
                time.sleep(0.02)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends it, and waits until all of its processes are gone; killed ones would hold on to their memory."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._process.pid).children(recursive=True)
            for each in children if number == signal.SIGKILL else ():
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            self._process.send_signal(number)
            psutil.wait_procs(children, START_LIMIT_S)
        self._process.wait(START_LIMIT_S)
        self._process = None

    def send(self, number: signal.Signals) -> None:
        """A signal such as SIGSTOP, which it has obeyed on return, to all of its processes."""
        assert self._process is not None
        main = psutil.Process(self._process.pid)
        for each in (main, *main.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):  # it ends meanwhile
                each.send_signal(number)
                while number == signal.SIGSTOP and not _has_stopped(each.pid):
                    time.sleep(0.001)

    def close(self) -> None:
        self.stop(signal.SIGKILL)  # ends what stands still, too
        shutil.rmtree(self.folder, ignore_errors=True)

    def _as_user(self) -> dict[str, Any]:
        return {} if self._user is None else {"user": self._user, "group": self._user, "extra_groups": []}

    def _run(self, command: Sequence[str | Path]) -> None:
        done = subprocess.run(command, **self._as_user(), capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr

    def _prepare(self) -> None:
        raise NotImplementedError

    def _command(self) -> list[str]:
        raise NotImplementedError


def _has_stopped(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all((task / "stat").read_text().rpartition(") ")[2][0] in "TZX" for task in tasks)


class PostgresServer(DatabaseServer):
    """Debian's package postgresql."""

    account = "postgres"

    def url(self, name: str) -> str:
        return f"postgresql://aiorch:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/{name}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        login = {"host": "127.0.0.1", "port": self.port, "user": "aiorch", "password": PASSWORD}
        with psycopg.connect(**login, dbname=database, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def _prepare(self) -> None:
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        options = ["--username=aiorch", "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync", "--encoding=UTF8"]
        self._run([self._find("initdb"), "--pgdata", self.folder / "data", *options])

    def _command(self) -> list[str]:
        # Killed processes are what is tested, not power cuts: without fsync it is quick.
        options = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.folder,
            "fsync": "off",
            "shared_buffers": "16MB",
        }
        return [str(self._find("postgres")), "-D", "data", *(f"--{name}={value}" for name, value in options.items())]

    @staticmethod
    def _find(program: str) -> Path:
        found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
        assert found, f"{program} is missing; install Debian's package postgresql"
        return found[-1]


class MariaServer(DatabaseServer):
    """Debian's package mariadb-server."""

    account = "mysql"

    def url(self, name: str) -> str:
        return f"mariadb://aiorch:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/{name}"

    def execute(self, statement: str, database: str = "mysql") -> list[tuple[Any, ...]]:
        login: dict[str, Any] = {"host": "127.0.0.1", "port": self.port, "user": "root"}
        login["client_flag"] = pymysql.constants.CLIENT.MULTI_STATEMENTS
        with pymysql.connect(**login, database=database, autocommit=True) as connection:
            cursor = connection.cursor()
            cursor.execute(statement)
            found = list(cursor.fetchall())
            while cursor.nextset():
                pass
            return found

    def _prepare(self) -> None:
        program = shutil.which("mariadb-install-db")
        assert program is not None, "mariadb-install-db is missing; install Debian's package mariadb-server"
        options = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        self._run([program, "--no-defaults", f"--datadir={self.folder / 'data'}", *options])

    def start(self) -> None:
        super().start()
        quoted = PASSWORD.replace("'", "''")
        self.execute(f"CREATE USER IF NOT EXISTS 'aiorch'@'127.0.0.1' IDENTIFIED BY '{quoted}'")
        self.execute("GRANT ALL ON *.* TO 'aiorch'@'127.0.0.1'")

    def _command(self) -> list[str]:
        options = {
            "datadir": self.folder / "data",
            "socket": self.folder / "socket",
            "pid-file": self.folder / "pid",
            "port": self.port,
            "bind-address": "127.0.0.1",
            "innodb-flush-log-at-trx-commit": 2,
            "innodb-flush-method": "nosync",
            "innodb-buffer-pool-size": "16M",
        }
        named = [f"--{name}={value}" for name, value in options.items()]
        return ["/usr/sbin/mariadbd", "--no-defaults", *named, "--skip-name-resolve"]


@functools.cache
def shared_server(kind: str) -> DatabaseServer:
    """The server that the tests of this process share."""
    return {"postgresql": PostgresServer, "mariadb": MariaServer}[kind]()


def new_database(kind: str, folder: Path) -> str:
    """The URL of a new, empty database; a SQLite file is in ``folder``."""
    if kind == "sqlite":
        return f"sqlite:///{folder / f'registry-{next(_names)}.db'}"
    return shared_server(kind).create()


def migrated_database(kind: str, folder: Path) -> str:
    """The URL of a new database with the registry's tables, copied from one that was migrated."""
    template = _make_template(kind)
    if kind == "sqlite":
        url = new_database(kind, folder)
        shutil.copyfile(template[0], url.removeprefix("sqlite:///"))
        return url
    server = shared_server(kind)
    name = f"test_{next(_names)}"
    if kind == "postgresql":
        server.execute(f"CREATE DATABASE {name} TEMPLATE {template[0]}")
    else:
        statements = (f"CREATE DATABASE {name}", f"USE {name}", "SET FOREIGN_KEY_CHECKS=0", *template)
        server.execute("; ".join(statements))
    return server.url(name)


@functools.cache
def _make_template(kind: str) -> tuple[str, ...]:
    """SQLite: a file; PostgreSQL: a database; MariaDB, which can copy neither: the statements that make the tables."""
    folder = Path(tempfile.mkdtemp(prefix="aiorch-sqlite-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    url = new_database(kind, folder)
    upgrade_schema(url)
    name = url.rpartition("/")[2]
    if kind != "mariadb":
        return (url.removeprefix("sqlite:///") if kind == "sqlite" else name,)
    server = shared_server(kind)
    tables = [row[0] for row in server.execute("SHOW TABLES", name)]
    copies = [f"INSERT INTO {table} SELECT * FROM {name}.{table}" for table in ("alembic_version", "counters")]
    return (*(server.execute(f"SHOW CREATE TABLE {table}", name)[0][1] for table in tables), *copies)
