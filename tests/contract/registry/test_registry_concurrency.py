"""Several writers at a time: one wins, the others are told; readers miss nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from registry_values import add_version, make_deployment, make_rollout
from sqlalchemy.orm import Session

from aiorch_server.errors import (
    AlreadyExists,
    Conflict,
    IdempotencyKeyReused,
    NotFoundError,
    PreconditionFailed,
    RequestError,
)
from aiorch_server.registry import deployments, events, idempotency, models, rollouts
from aiorch_server.registry.database import Database

N = 8


@pytest.fixture
def servers(url: str) -> Any:
    """Eight servers of one registry, each with its own connections; patient, as any of them may come last."""
    opened = [Database(url, threads=1, timeout_s=30.0) for _ in range(N)]
    yield opened
    for each in opened:
        each.close()


def at_once(servers: list[Database], work: Callable[[Session, int], Any]) -> list[Any]:
    """What ``work`` gave or raised in each server, all begun at the same time."""
    begin = threading.Barrier(len(servers))

    def run(number: int) -> Any:
        begin.wait(30)
        try:
            return servers[number].run_blocking(lambda session: work(session, number))
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(run, range(len(servers))))


def test_one_registers_a_name(servers: list[Database]) -> None:
    found = at_once(servers, lambda session, number: models.register(session, "digits", actor=f"al{number}"))
    made = [each for each in found if isinstance(each, models.Model)]
    assert len(made) == 1 and sum(type(each) is AlreadyExists for each in found) == N - 1
    assert servers[0].read_blocking(lambda session: models.get(session, "digits")) == made[0]


def test_one_deploys_upon_a_generation(servers: list[Database]) -> None:
    add_version(servers[0], "digits")
    wanted = make_deployment("digits", 1)
    first = servers[0].run_blocking(lambda s: deployments.put_deployment(s, wanted, actor="al"))
    assert first.generation == 1

    def deploy(session: Session, number: int) -> Any:
        return deployments.put_deployment(session, wanted, actor=f"al{number}", expected_generation=1)

    found = at_once(servers, deploy)
    (winner,) = [each for each in found if isinstance(each, deployments.Deployment)]
    assert winner.generation == 2
    losers = [each for each in found if each is not winner]
    assert {type(each) for each in losers} == {Conflict}
    assert all(f"is at generation 2 by now, not 1: {winner.updated_by} changed it at" in str(each) for each in losers)


def test_generations_and_versions_are_never_given_twice(servers: list[Database]) -> None:
    add_version(servers[0], "digits")
    wanted = make_deployment("digits", 1)
    found = at_once(servers, lambda session, number: deployments.put_deployment(session, wanted, actor="al"))
    assert sorted(each.generation for each in found) == list(range(1, N + 1))
    servers[0].run_blocking(lambda session: deployments.withdraw(session, "digits"))
    with pytest.raises(Conflict, match="has no deployment by now, where generation 8 was expected"):
        servers[0].run_blocking(
            lambda session: deployments.put_deployment(session, wanted, actor="al", expected_generation=8)
        )
    again = servers[0].run_blocking(lambda session: deployments.put_deployment(session, wanted, actor="al"))
    assert again.generation == N + 2
    with ThreadPoolExecutor(N) as pool:
        made = list(pool.map(lambda database: add_version(database, "digits").version, servers))
    assert sorted(made) == list(range(2, N + 2))


def test_one_rollout_of_a_model_is_under_way(servers: list[Database]) -> None:
    for _ in range(2):
        add_version(servers[0], "digits")
    found = at_once(servers, lambda session, number: rollouts.begin_rollout(session, make_rollout("digits")))
    (winner,) = [each for each in found if isinstance(each, rollouts.Rollout)]
    assert all(type(each) is PreconditionFailed and winner.id in str(each) for each in found if each is not winner)


def test_a_reader_of_events_misses_none(servers: list[Database]) -> None:
    """Numbers are given while others' transactions are open, and are seen in their order all the same."""
    each_writes, is_over = 25, threading.Event()
    seen: list[int] = []

    def read() -> None:
        while True:
            was_over = is_over.is_set()
            after = seen[-1] if seen else 0
            found = reader.read_blocking(lambda session, after=after: events.read_events(session, after=after))
            seen.extend(event.number for event in found)
            if was_over and not found:
                return

    def write(database: Database) -> None:
        for n in range(each_writes):
            database.run_blocking(
                lambda session, n=n: events.append_event(session, "model.registered", str(n), actor="al")
            )

    reader, *writers = servers
    with ThreadPoolExecutor(N) as pool:
        reading = pool.submit(read)
        try:
            list(pool.map(write, writers))
        finally:
            is_over.set()
        reading.result(60)
    assert seen == sorted(set(seen)) and len(seen) == each_writes * len(writers)
    last = reader.read_blocking(events.last_event_number)
    assert last == seen[-1] and reader.read_blocking(events.first_event_number) == seen[0]
    assert reader.run_blocking(lambda session: events.forget_events(session, kept=10)) == len(seen) - 10
    assert [each.number for each in reader.read_blocking(events.read_events)] == seen[-10:]


def test_the_same_key_is_done_once(servers: list[Database]) -> None:
    def register(session: Session, number: int) -> bytes:
        def do() -> bytes:
            models.register(session, "digits", actor="al")
            return f"made by {number}".encode()

        return idempotency.do_once(session, "al", "key-1", b"register digits", do)

    answers = at_once(servers, register)
    assert len(set(answers)) == 1 and answers[0].startswith(b"made by ")
    again = servers[0].run_blocking(lambda session: register(session, -1))
    assert again == answers[0]


def test_what_an_idempotency_key_stands_for(servers: list[Database]) -> None:
    run = servers[0].run_blocking

    def do(caller: str, key: str, request: bytes, answer: bytes) -> bytes:
        return run(lambda session: idempotency.do_once(session, caller, key, request, lambda: answer))

    assert do("al", "k", b"a", b"\x00\xff") == b"\x00\xff"
    with pytest.raises(IdempotencyKeyReused, match="idempotency key 'k' was used for another request"):
        do("al", "k", b"b", b"2")
    assert do("bo", "k", b"b", b"2") == b"2"  # another caller's keys are other keys
    assert [do("al", key, b"b", b"3") for key in ("K", "k ", "")] == [b"3"] * 3
    assert do("al", "", b"c", b"4") == b"4"
    for key in ("\n", "\0", "x" * 129, "\ud800"):
        with pytest.raises(RequestError, match="as idempotency_key; it should be at most 128 printable characters"):
            do("al", key, b"b", b"3")
    with pytest.raises(NotFoundError):  # what fails is not kept
        run(lambda s: idempotency.do_once(s, "al", "n", b"", lambda: models.get(s, "none").name.encode()))
    assert do("al", "n", b"other", b"5") == b"5"
    run(lambda session: idempotency.keep_answer(session, "al", "old", b"a", b"1", kept_s=-1))
    assert run(idempotency.forget_answers) == 1
    assert do("al", "old", b"b", b"2") == b"2"


def test_work_that_fails_leaves_nothing(servers: list[Database]) -> None:
    def fail(session: Session) -> None:
        models.register(session, "digits", actor="al")
        events.append_event(session, "model.registered", "text", actor="al")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        servers[0].run_blocking(fail)
    assert servers[1].read_blocking(models.list_models).items == ()
    assert servers[1].read_blocking(events.last_event_number) == 0
