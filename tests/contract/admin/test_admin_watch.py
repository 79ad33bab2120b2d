"""WatchEvents: what happened, what happens, for whom, how fast, and its end."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from admin_site import TIMEOUT_S, Site, refused, speaking_as, status_of
from aiorch_proto.admin.v1 import deployments_pb2, registry_pb2
from aiorch_proto.admin.v1.service import AdminStub
from databases import on_every_database

from aiorch_server.frontends.admin import feed
from aiorch_server.registry.events import append_event, forget_events
from aiorch_server.registry.session import Session
from aiorch_server.security.roles import Role


def watch(site: Site, **fields: Any) -> Any:
    return site.stub.Deployments.WatchEvents(deployments_pb2.WatchEventsRequest(**fields))


async def take(call: Any, count: int) -> list[deployments_pb2.Event]:
    async with asyncio.timeout(TIMEOUT_S):
        return [await call.read() for _ in range(count)]


async def wait_for_watchers(site: Site, count: int) -> None:
    """The headers of a call come before it is counted, and its end before it is counted no more."""
    async with asyncio.timeout(TIMEOUT_S):
        while site.services.watchers != count:
            await asyncio.sleep(0.01)


async def collect(call: Any) -> list[Any]:
    return [event async for event in call]


async def write(site: Site, count: int, model: str = "m", begin: int = 0) -> None:
    """As another server would: this one hears of it when it looks. In parts: a transaction has four seconds."""
    for part in range(begin, begin + count, 100):

        def work(session: Session, part: int = part) -> None:
            for number in range(part, min(part + 100, begin + count)):
                append_event(session, "test", f"event {number}", actor="elsewhere", model=model)

        await site.database.run(work)


@on_every_database
async def test_what_happened_and_what_happens(site: Site) -> None:
    await site.upload("digits", create_model=True, aliases=["prod"])
    call = watch(site)
    events = await take(call, 3)
    assert [(event.kind, event.model, event.version) for event in events] == [
        ("model.registered", "digits", 0),
        ("version.uploaded", "digits", 1),
        ("alias.set", "digits", 1),
    ]
    assert {event.actor for event in events} == {"anybody"}
    assert events[2].text == "digits@prod is version 1"
    await site.registry.SetAlias(registry_pb2.SetAliasRequest(model="digits", alias="prod"))
    await site.registry.DeleteVersion(registry_pb2.DeleteVersionRequest(model="digits", version=1))
    await site.registry.DeleteModel(registry_pb2.DeleteModelRequest(name="digits"))
    more = await take(call, 3)
    assert [event.kind for event in more] == ["alias.deleted", "version.deleted", "model.deleted"]
    numbers = [event.number for event in (*events, *more)]
    assert numbers == sorted(set(numbers))
    assert all(event.time.seconds for event in events)
    call.cancel()
    again = watch(site, after=events[1].number)
    assert [event.number for event in await take(again, 4)] == numbers[2:]
    again.cancel()


async def test_where_a_watch_begins_is_told_at_once(site: Site) -> None:
    await write(site, 3)
    calls = [watch(site, after=after) for after in (-1, 1, 0)]
    async with asyncio.timeout(TIMEOUT_S):
        told = [dict(await call.initial_metadata())["aiorch-events-after"] for call in calls]
    assert told == ["3", "1", "0"]
    for call in calls:
        call.cancel()


async def test_only_what_comes(site: Site) -> None:
    await write(site, 5)
    call = watch(site, after=-1)
    await asyncio.wait_for(call.initial_metadata(), TIMEOUT_S)  # from then on nothing is missed
    await write(site, 1, begin=5)
    assert [event.text for event in await take(call, 1)] == ["event 5"]
    call.cancel()


async def test_one_model(site: Site) -> None:
    await site.register("a")
    await site.register("b")
    call = watch(site, model="b")
    await write(site, 1, "a")
    await write(site, 1, "b")
    assert [(event.kind, event.model) for event in await take(call, 2)] == [("model.registered", "b"), ("test", "b")]
    call.cancel()


async def test_local_changes_are_told_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.services._feed, "_interval_s", 3600.0)
    call = watch(site, after=-1)
    await call.initial_metadata()
    for number in range(5):
        await site.register(f"m{number}")
        (event,) = await take(call, 1)
        assert event.model == f"m{number}"
    call.cancel()


async def test_only_what_the_caller_may_see(site: Site) -> None:
    await site.register("team-a-x")
    await site.register("team-b-x")
    await write(site, 1, "")
    with speaking_as("alice", (Role.VIEWER, "team-a-*")):
        call = watch(site)
        await call.initial_metadata()
        for name in ("team-b-x", "team-b-z"):
            error, _ = await refused(collect(watch(site, model=name)))
            assert (error.code().name, error.details()) == ("NOT_FOUND", f"model '{name}' is not registered")
    await write(site, 1, "team-b-x")
    await write(site, 1, "team-a-x")
    assert [event.model for event in await take(call, 2)] == ["team-a-x", "team-a-x"]
    call.cancel()


@pytest.mark.parametrize("after", [-2, 7, 2**62, -(2**63)])
async def test_numbers_that_no_event_has(site: Site, after: int) -> None:
    await write(site, 5)
    error, details = await refused(collect(watch(site, after=after)))
    assert (error.code().name, details["BadRequest"].field_violations[0].field) == ("INVALID_ARGUMENT", "after")


async def test_events_that_are_not_kept_any_more(site: Site) -> None:
    await write(site, 100)
    await site.database.run(lambda session: forget_events(session, kept=10))
    assert (await status_of(collect(watch(site, after=50))))[0] == "FAILED_PRECONDITION"
    for after, count in ((0, 10), (90, 10), (95, 5)):
        call = watch(site, after=after)
        assert len(await take(call, count)) == count
        call.cancel()


@pytest.mark.parametrize("model", ["../x", "x" * 10_000, "a\0b"])
async def test_names_that_nothing_has(site: Site, model: str) -> None:
    assert (await status_of(collect(watch(site, model=model))))[0] == "INVALID_ARGUMENT"


async def test_thousands_of_events_and_slow_readers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody misses one, also where what is kept for all is shorter than how far the slow ones are behind."""
    monkeypatch.setattr(feed, "_MAX_KEPT", 200)
    count, watchers = 3000, [watch(site) for _ in range(4)]
    for call in watchers:
        await call.initial_metadata()

    async def produce() -> None:
        for begin in range(0, count, 500):
            await write(site, 500, begin=begin)
            site.services._feed.wake()

    async def read(call: Any, pause: bool) -> list[str]:
        texts = []
        for number in range(count):
            texts.append((await call.read()).text)
            if pause and number % 500 == 0:
                await asyncio.sleep(0.02)
        return texts

    async with asyncio.timeout(60):
        _, *found = await asyncio.gather(
            produce(), *(read(call, index % 2 == 0) for index, call in enumerate(watchers))
        )
    expected = [f"event {number}" for number in range(count)]
    assert all(texts == expected for texts in found)
    assert len(site.services._feed._recent) <= 200 + 1000
    for call in watchers:
        call.cancel()


async def test_clients_that_leave(site: Site) -> None:
    """Nothing is left of them, whether they were reading, waiting, or not even that."""
    await write(site, 2000)
    calls = [watch(site) for _ in range(10)]
    for call in calls:
        await take(call, 2)
    idle = [watch(site, after=2000) for _ in range(10)]
    for call in idle:
        await call.initial_metadata()
    await wait_for_watchers(site, 20)
    for call in (*calls, *idle):
        call.cancel()
    await wait_for_watchers(site, 0)


async def test_the_end_of_the_server(site: Site) -> None:
    call = watch(site)
    await call.initial_metadata()
    site.services.announce_stop()
    assert await status_of(collect(call)) == ("UNAVAILABLE", "SERVER_STOPPING")
    assert (await status_of(collect(watch(site))))[0] == "UNAVAILABLE"


async def test_a_stop_does_not_wait_for_who_watches(site: Site) -> None:
    call = watch(site)
    await call.initial_metadata()
    site.services.announce_stop()
    async with asyncio.timeout(5.0):
        await site.server.stop(60.0)
    assert (await status_of(collect(call)))[0] == "UNAVAILABLE"


async def test_too_many_who_watch(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MAX_WATCHERS", 2)
    calls = [watch(site) for _ in range(2)]
    await wait_for_watchers(site, 2)
    assert await status_of(collect(watch(site))) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    for call in calls:
        call.cancel()


async def test_a_database_that_is_away_for_a_while(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from aiorch_server.errors import RegistryUnavailable

    monkeypatch.setattr(site.services._feed, "_interval_s", 0.05)
    call = watch(site, after=-1)
    await call.initial_metadata()
    read, failed = site.database.read, asyncio.Event()

    async def fail(work: Any) -> Any:
        failed.set()
        raise RegistryUnavailable("the database is away")

    monkeypatch.setattr(site.database, "read", fail)
    await asyncio.wait_for(failed.wait(), TIMEOUT_S)
    monkeypatch.setattr(site.database, "read", read)
    await write(site, 3)
    assert [event.text for event in await take(call, 3)] == ["event 0", "event 1", "event 2"]
    call.cancel()


async def test_synchronous_stubs(site: Site) -> None:
    await write(site, 3)

    def work() -> list[str]:
        with grpc.insecure_channel(site.target) as channel:
            call = AdminStub(channel).Deployments.WatchEvents(
                deployments_pb2.WatchEventsRequest(), timeout=TIMEOUT_S
            )  # fmt: skip
            texts = [next(call).text for _ in range(3)]
            call.cancel()
            return texts

    assert await asyncio.to_thread(work) == ["event 0", "event 1", "event 2"]


async def test_one_caller_shuts_nobody_out(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MAX_WATCHERS_OF_ONE", 1)
    with speaking_as("alice", (Role.VIEWER, "*")):
        first = watch(site)
        await asyncio.wait_for(first.initial_metadata(), TIMEOUT_S)
        error, _ = await refused(watch(site).read())
        assert error.code().name == "RESOURCE_EXHAUSTED"
        assert error.details() == "'alice' watches events of this server 1 times already"
    with speaking_as("bob", (Role.VIEWER, "*")):
        second = watch(site)
        await asyncio.wait_for(second.initial_metadata(), TIMEOUT_S)
    for call in (first, second):
        call.cancel()
    async with asyncio.timeout(TIMEOUT_S):
        while site.services._feed._by_caller:
            await asyncio.sleep(0.01)


async def test_a_fault_ends_no_feed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong with one look: the next one comes, and who watches is told."""
    watched = watch(site, after=-1)
    await asyncio.wait_for(watched.initial_metadata(), TIMEOUT_S)
    faults = 0

    def fail(session: object, **options: object) -> None:
        nonlocal faults
        faults += 1
        raise ValueError("nobody thought of this")

    with monkeypatch.context() as patch:
        patch.setattr(feed, "read_events", fail)
        await site.register("m")
        while not faults:
            await asyncio.sleep(0.01)
    event = await asyncio.wait_for(watched.read(), TIMEOUT_S)
    assert event.model == "m"
    watched.cancel()
