"""The audit log's chain: unbroken under concurrent writers, and told where somebody touched it."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import delete, select, update

from aiorch_server.errors import RequestError
from aiorch_server.registry import audit_check
from aiorch_server.registry.audit import GENESIS, append_audit, query_audit, read_head
from aiorch_server.registry.audit_check import verify_audit
from aiorch_server.registry.database import Database
from aiorch_server.registry.schema import audit, audit_head

METHOD = "/aiorch.admin.v1.Deployments/Deploy"


def write(database: Database, count: int, **given: str) -> None:
    for number in range(count):
        fields = {"principal": "al", "method": METHOD, "outcome": "OK", "detail": f'{{"n":{number}}}', **given}
        database.run_blocking(lambda session, fields=fields: append_audit(session, **fields))


async def test_an_empty_log(database: Database) -> None:
    check = await verify_audit(database)
    assert check.is_intact and (check.entries, check.head_hash) == (0, GENESIS)


async def test_eight_writers_make_one_chain(database: Database) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write(database, 5, principal=f"al{number}", model="δ"), range(8)))
    check = await verify_audit(database)
    assert check.is_intact and check.is_finished and check.entries == 40
    assert (check.entries, check.head_hash) == database.read_blocking(read_head)
    again = await verify_audit(database, known_number=40, known_hash=check.head_hash.upper())
    assert again.is_intact


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("principal", "bo"),
        ("method", "/other"),
        ("model", "digits"),
        ("outcome", "NOT_FOUND"),
        ("detail", "{}"),
        ("server", "s"),
        ("hash", "0" * 64),
        ("time", None),
    ],
)
async def test_an_entry_that_was_changed(database: Database, field: str, value: str | None) -> None:
    write(database, 5)

    def change(session: object) -> None:
        now = value or session.execute(select(audit.c.time).where(audit.c.number == 3)).scalar() + timedelta(
            microseconds=1
        )
        session.execute(update(audit).where(audit.c.number == 3).values({field: now}))

    database.run_blocking(change)
    check = await verify_audit(database)
    assert not check.is_intact and check.broken_at == 3 and "was changed" in check.reason and check.entries == 2


async def test_an_entry_that_was_taken_out(database: Database) -> None:
    write(database, 5)
    database.run_blocking(lambda session: session.execute(delete(audit).where(audit.c.number == 2)))
    check = await verify_audit(database)
    assert (check.broken_at, check.reason) == (2, "entry 2 is missing")
    for number in (3, 4, 5):
        there = update(audit).where(audit.c.number == number).values(number=number - 1)
        database.run_blocking(lambda session, there=there: session.execute(there))
    check = await verify_audit(database)
    assert check.broken_at == 2 and "was changed, or is not the one" in check.reason


async def test_entries_that_were_exchanged(database: Database) -> None:
    write(database, 5)
    for old, new in ((2, 99), (3, 2), (99, 3)):
        there = update(audit).where(audit.c.number == old).values(number=new)
        database.run_blocking(lambda session, there=there: session.execute(there))
    assert (await verify_audit(database)).broken_at == 2


async def test_an_end_that_was_cut_off(database: Database) -> None:
    write(database, 5)
    number, known = database.read_blocking(read_head)
    database.run_blocking(lambda session: session.execute(delete(audit).where(audit.c.number > 3)))
    check = await verify_audit(database)
    assert (check.broken_at, check.reason) == (4, "the log ended with entry 5, not 3")
    # Whoever also sets the head back is found by what is known outside.
    third = check.head_hash
    database.run_blocking(lambda session: session.execute(update(audit_head).values(number=3, hash=third)))
    assert (await verify_audit(database)).is_intact
    check = await verify_audit(database, known_number=number, known_hash=known)
    assert check.broken_at == 4 and "entries from 4 on are missing" in check.reason
    write(database, 2)
    check = await verify_audit(database, known_number=number, known_hash=known)
    assert check.broken_at == 5 and "another hash than the one that is known" in check.reason


async def test_a_long_log_is_read_in_steps(database: Database) -> None:
    write(database, 7)
    check = audit_check.AuditCheck()
    steps = 0
    while not check.is_finished:
        check = database.read_blocking(lambda s, begin=check: audit_check.step_audit_check(s, begin, step=3))
        steps += 1
    assert check.is_intact and check.entries == 7 and steps == 3


def test_the_hash_is_what_the_documentation_says(database: Database) -> None:
    """SHA-256 over a JSON list: the hash before, then all fields by name. Others may compute it."""
    fields = {"principal": "al", "method": "/m", "outcome": "OK", "model": "m", "detail": "{}", "server": "s"}
    entry = database.run_blocking(lambda session: append_audit(session, **fields))
    time = entry.time.isoformat(timespec="microseconds")
    text = f'["{GENESIS}","{{}}","/m","m",1,"OK","al","s","{time}"]'
    assert entry.hash == hashlib.sha256(text.encode()).hexdigest()


def test_queries(database: Database) -> None:
    write(database, 3, model="digits")
    write(database, 2, principal="bo", outcome="NOT_FOUND", model="\0 \ud800 '; --")
    everything = database.read_blocking(query_audit).items
    assert [each.number for each in everything] == [5, 4, 3, 2, 1]
    assert everything[0].model == "\\0 \\ud800 '; --"
    for given, numbers in (
        ({"principal": "bo"}, [5, 4]),
        ({"model": "digits"}, [3, 2, 1]),
        ({"method": "/other"}, []),
        ({"since": everything[1].time}, [5, 4]),
        ({"until": everything[1].time}, [3, 2, 1]),
        ({"principal": "' OR 1=1 --"}, []),
    ):
        found = database.read_blocking(lambda session, given=given: query_audit(session, **given))
        assert [each.number for each in found.items] == numbers
    first = database.read_blocking(lambda session: query_audit(session, size=2))
    write(database, 1)  # what comes meanwhile does not move what follows
    second = database.read_blocking(lambda session: query_audit(session, size=2, token=first.token))
    assert [each.number for each in second.items] == [3, 2]
    with pytest.raises(RequestError, match="detail has 70000 characters"):
        write(database, 1, detail="x" * 70_000)
