"""A database that goes away: told within seconds, never a hang, and all is well again when it is back."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from databases import DatabaseServer, MariaServer, PostgresServer
from patience import PATIENCE
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from aiorch_server.errors import AiorchError, OutcomeUnknown, RegistryUnavailable
from aiorch_server.registry import events, idempotency, models
from aiorch_server.registry.database import Database
from aiorch_server.registry.upgrade import check_schema, upgrade_schema

TIMEOUT_S = 1.0
#: What a call takes at most, beside what this machine adds.
LIMIT_S = (TIMEOUT_S + 1.0 + 1.0) * PATIENCE


@pytest.fixture(scope="module", params=[PostgresServer, MariaServer], ids=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    made = request.param()
    yield made
    made.close()


@pytest.fixture
def database(server: DatabaseServer) -> Iterator[Database]:
    url = server.create()
    upgrade_schema(url)
    opened = Database(url, timeout_s=TIMEOUT_S)
    yield opened
    opened.close()


def register(name: str) -> Callable[[Session], Any]:
    return lambda session: models.register(session, name, actor="al")


def take_time(do: Callable[[], Any]) -> AiorchError:
    begin = time.monotonic()
    with pytest.raises(RegistryUnavailable) as caught:
        do()
    assert time.monotonic() - begin < LIMIT_S
    return caught.value


def wait_until_it_works(database: Database, name: str) -> None:
    until = time.monotonic() + 30 * PATIENCE
    while True:
        try:
            database.run_blocking(register(name))
            return
        except RegistryUnavailable:
            assert time.monotonic() < until


def test_a_server_that_ends(server: DatabaseServer, database: Database) -> None:
    database.run_blocking(register("before"))
    server.stop(signal.SIGINT if isinstance(server, PostgresServer) else signal.SIGTERM)
    try:
        for run in (database.run_blocking, database.read_blocking):
            error = take_time(lambda run=run: run(lambda session: models.get(session, "before")))
            assert "cannot be used" in str(error) and not isinstance(error, OutcomeUnknown)
    finally:
        server.start()
    # The connections of the pool are all dead, and nobody has to know.
    assert database.read_blocking(lambda session: models.get(session, "before")).name == "before"
    database.run_blocking(register("after"))


def test_a_connection_that_breaks_between_two_calls(server: DatabaseServer, database: Database) -> None:
    for number in range(4):
        database.run_blocking(register(f"before-{number}"))
    server.stop(signal.SIGKILL)
    server.start()
    database.run_blocking(register("after"))


async def test_a_server_that_is_silent(server: DatabaseServer, database: Database) -> None:
    await database.run(register("before"))
    server.send(signal.SIGSTOP)
    try:
        begin = time.monotonic()
        calls = [database.run(register(f"call-{number}")) for number in range(12)]  # more than there are threads
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert time.monotonic() - begin < LIMIT_S
        assert {type(each) for each in found} <= {RegistryUnavailable}, found
        assert all(
            re.search("did not answer within 2 s; nothing was|cannot be used, and nothing was", str(each))
            for each in found
        )
    finally:
        server.send(signal.SIGCONT)
    await asyncio.to_thread(wait_until_it_works, database, "after")
    names = {each.name for each in (await database.read(models.list_models)).items}
    assert names == {"before", "after"}  # what was given up was not done later


def test_a_server_that_is_silent_from_the_start(server: DatabaseServer) -> None:
    url = server.create()
    upgrade_schema(url)
    server.send(signal.SIGSTOP)
    try:
        database = Database(url, timeout_s=TIMEOUT_S)
        take_time(lambda: database.read_blocking(models.list_models))
    finally:
        server.send(signal.SIGCONT)
    wait_until_it_works(database, "after")
    database.close()


def test_a_change_of_which_nobody_knows_whether_it_was_made(server: DatabaseServer, database: Database) -> None:
    """The server falls silent between the last statement and the answer to COMMIT."""

    def once(session: Session) -> bytes:
        def do() -> bytes:
            models.register(session, "digits", actor="al")
            return b"made"

        return idempotency.do_once(session, "al", "key", b"register digits", do)

    database.run_blocking(register("before"))

    def stop(connection: object) -> None:
        server.send(signal.SIGSTOP)

    event.listen(database._engine, "commit", stop)
    try:
        error = take_time(lambda: database.run_blocking(once))
    finally:
        event.remove(database._engine, "commit", stop)
        server.send(signal.SIGCONT)
    assert isinstance(error, OutcomeUnknown) and not error.retryable
    assert "it is not known whether it was made: look, or repeat the call with the same idempotency key" in str(error)
    wait_until_it_works(database, "after")
    assert database.run_blocking(once) == b"made"
    assert database.run_blocking(once) == b"made"
    assert len(database.read_blocking(lambda session: models.list_models(session, name_prefix="digits")).items) == 1


def test_a_connection_that_is_lost_at_the_commit(server: DatabaseServer, database: Database) -> None:
    def stop(connection: object) -> None:
        server.stop(signal.SIGKILL)

    event.listen(database._engine, "commit", stop)
    try:
        error = take_time(lambda: database.run_blocking(register("digits")))
    finally:
        event.remove(database._engine, "commit", stop)
        server.start()
    assert isinstance(error, OutcomeUnknown)
    assert database.read_blocking(models.list_models).items == ()


def test_a_connection_that_is_lost_in_the_middle_is_no_failure(server: DatabaseServer, database: Database) -> None:
    attempts = []

    def work(session: Session) -> None:
        models.register(session, "digits", actor="al")
        attempts.append(1)
        if len(attempts) == 1:
            if isinstance(server, PostgresServer):
                others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                server.execute(others + " AND usename = 'aiorch'")
            else:
                (own,) = session.execute(text("SELECT CONNECTION_ID()")).one()
                server.execute(f"KILL {own}")
        events.append_event(session, "model.registered", "text", actor="al")

    database.run_blocking(work)
    assert len(attempts) == 2
    assert [each.number for each in database.read_blocking(events.read_events)] == [1]


def test_another_writer_that_stands_still(server: DatabaseServer, database: Database) -> None:
    """It holds the writers' turn; others are told, readers go on."""
    release, taken = threading.Event(), threading.Event()

    def stand_still(session: Session) -> None:
        taken.set()
        release.wait(30)

    other = Database(database.url, timeout_s=20.0)
    thread = threading.Thread(target=other.run_blocking, args=(stand_still,))
    thread.start()
    try:
        assert taken.wait(30)
        error = take_time(lambda: database.run_blocking(register("digits")))
        assert "is busy; nothing was changed, try again" in str(error)
        assert database.read_blocking(models.list_models).items == ()
    finally:
        release.set()
        thread.join()
        other.close()
    database.run_blocking(register("digits"))


def test_upgrading_a_database_that_is_away(server: DatabaseServer) -> None:
    url = server.create()
    server.send(signal.SIGSTOP)
    try:
        begin = time.monotonic()
        with pytest.raises(RegistryUnavailable):
            upgrade_schema(url, limit_s=1.0)
        assert time.monotonic() - begin < 6 * PATIENCE
    finally:
        server.send(signal.SIGCONT)
    upgrade_schema(url)
    assert check_schema(url).revision


async def test_a_caller_that_leaves(server: DatabaseServer, database: Database) -> None:
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def work(session: Session) -> None:
        loop.call_soon_threadsafe(begun.set)
        models.register(session, "digits", actor="al")

    task = asyncio.create_task(database.run(work))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await database.run(register("after"))


def test_sqlite_that_another_process_holds(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    upgrade_schema(url)
    one, two = Database(url, timeout_s=20.0), Database(url, timeout_s=TIMEOUT_S)
    release, taken = threading.Event(), threading.Event()

    def hold(session: Session) -> None:
        taken.set()
        release.wait(30)

    thread = threading.Thread(target=one.run_blocking, args=(register("digits"),))
    holder = threading.Thread(target=one.run_blocking, args=(hold,))
    holder.start()
    assert taken.wait(30)
    thread.start()
    error = take_time(lambda: two.run_blocking(register("other")))
    assert "is busy" in str(error) and two.read_blocking(models.list_models).items == ()
    release.set()
    holder.join()
    thread.join()
    two.run_blocking(register("other"))
    one.close()
    two.close()


@pytest.mark.parametrize("content", [b"this is no database" * 100, None])
def test_sqlite_files_that_are_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "registry.db"
    path.mkdir() if content is None else path.write_bytes(content)
    url = f"sqlite:///{path}"
    with pytest.raises(
        RegistryUnavailable, match=r"cannot be used, and nothing was changed: (file is not a database|unable to open)"
    ):
        upgrade_schema(url)
    database = Database(url)
    with pytest.raises(RegistryUnavailable, match="cannot be used"):
        database.run_blocking(register("digits"))
    database.close()
