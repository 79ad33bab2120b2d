"""Instances that come and go while others serve: loads that fail or hang, deaths on the way, and nothing lost."""

from __future__ import annotations

import asyncio
import threading

import pytest
from instance_rig import Rig, ScriptedBackend, running

from aiorch_server.backend import LoadContext
from aiorch_server.errors import ModelLoadError, ModelNotReady
from aiorch_server.types import NumpyArray


def double(x: NumpyArray) -> NumpyArray:
    return x * 2


async def wait_until_alive(rig: Rig, count: int) -> None:
    async with asyncio.timeout(10):
        while rig.group.alive != count:
            await asyncio.sleep(0.002)


async def test_an_instance_more_and_one_less_under_load() -> None:
    async with running(ScriptedBackend(double)) as rig:
        is_over = asyncio.Event()

        async def call() -> int:
            calls = 0
            while not is_over.is_set():
                assert await rig.answers(calls) == [2 * calls]
                calls += 1
            return calls

        callers = [asyncio.create_task(call()) for _ in range(8)]
        for _ in range(5):
            await asyncio.to_thread(rig.group.grow, None, 10)
            assert (rig.group.alive, rig.group.serving, rig.scheduler.policy().instances) == (2, 2, 2)
            assert rig.group.shrink()
            await wait_until_alive(rig, 1)
        is_over.set()
        assert min(await asyncio.gather(*callers)) > 0
        assert rig.scheduler.policy().instances == 1


async def test_the_last_instance_stays() -> None:
    async with running(ScriptedBackend(double)) as rig:
        assert not rig.group.shrink()
        await asyncio.to_thread(rig.group.grow)
        assert rig.group.shrink()
        assert not rig.group.shrink()
        assert await rig.answers(3) == [6]


async def test_a_load_that_fails_harms_nobody() -> None:
    def load(context: LoadContext) -> None:
        if context.instance_index:
            raise MemoryError("no room")

    async with running(ScriptedBackend(double, load)) as rig:
        with pytest.raises(ModelLoadError, match="instance 1 of 'm:1' failed to load: MemoryError: no room"):
            await asyncio.to_thread(rig.group.grow)
        await wait_until_alive(rig, 1)
        assert await rig.answers(1, 2, 3) == [2, 4, 6]


async def test_a_load_that_takes_too_long_ends_unserved() -> None:
    goes_on = threading.Event()

    def load(context: LoadContext) -> None:
        if context.instance_index:
            goes_on.wait(10)

    backend = ScriptedBackend(double, load)
    async with running(backend) as rig:
        with pytest.raises(ModelLoadError, match=r"did not finish loading within 0\.05 s"):
            await asyncio.to_thread(rig.group.grow, None, 0.05)
        assert await rig.answers(1) == [2]
        goes_on.set()
        await wait_until_alive(rig, 1)
        assert len(backend.instances[1].closed) == 1
        assert await rig.answers(4) == [8]


async def test_who_was_told_to_go_stays_if_the_other_one_dies() -> None:
    both, may_die, may_go_on = threading.Barrier(3), threading.Event(), threading.Event()

    def execute(x: NumpyArray) -> NumpyArray:
        if x[0, 0] >= 100:
            both.wait(10)
            (may_die if x[0, 0] == 101 else may_go_on).wait(10)
            if x[0, 0] == 101:
                raise SystemExit("a model's own end")
        return x

    async with running(ScriptedBackend(execute)) as rig:
        await asyncio.to_thread(rig.group.grow)
        first = asyncio.create_task(rig.answers(100))
        async with asyncio.timeout(10):
            while both.n_waiting < 1:
                await asyncio.sleep(0.002)
        second = asyncio.create_task(rig.answers(101))
        await asyncio.to_thread(both.wait, 10)
        assert rig.group.shrink()
        may_die.set()
        assert isinstance((await second)[0], tuple)
        await wait_until_alive(rig, 1)
        may_go_on.set()
        assert await first == [100]
        assert await rig.answers(7) == [7]


async def test_threads_and_places_of_a_later_instance() -> None:
    seen: list[LoadContext] = []
    async with running(ScriptedBackend(double, seen.append), instances=2) as rig:
        await asyncio.to_thread(rig.group.grow, 3)
        assert (seen[2].instance_index, seen[2].threads, seen[2].device) == (2, 3, "cpu")


async def test_nothing_grows_where_all_is_over() -> None:
    async with running(ScriptedBackend(double)) as rig:
        rig.scheduler.close()
        await asyncio.wait_for(asyncio.wrap_future(rig.group.ended), 10)
        with pytest.raises(ModelNotReady, match="'m:1' takes no further instance"):
            rig.group.grow()


async def test_closing_ends_those_that_came_later() -> None:
    backend = ScriptedBackend(double)
    async with running(backend) as rig:
        await asyncio.to_thread(rig.group.grow)
        rig.scheduler.close()
        assert await asyncio.wait_for(asyncio.wrap_future(rig.group.ended), 10) == ""
        assert [len(instance.closed) for instance in backend.instances] == [1, 1]


async def test_of_two_only_one_goes_while_the_other_takes_long_to_close() -> None:
    may_close = threading.Event()
    backend = ScriptedBackend(double)
    async with running(backend) as rig:
        await asyncio.to_thread(rig.group.grow)
        for instance in backend.instances:
            instance.close = lambda: may_close.wait(10)  # type: ignore[method-assign]
        assert rig.group.shrink()
        async with asyncio.timeout(10):
            while rig.group.serving != 1:
                await asyncio.sleep(0.002)
        assert not rig.group.shrink()
        assert await rig.answers(5) == [10]
        may_close.set()
        await wait_until_alive(rig, 1)


async def test_a_dead_instance_is_not_counted_on() -> None:
    """Its batch is kept by what its model calls others with: a run that never ends would make all requests late."""

    def execute(x: NumpyArray) -> NumpyArray:
        if x[0, 0] == 13:
            raise SystemExit("a model's own end")
        return x

    async with running(ScriptedBackend(execute), instances=2) as rig:
        kept = []
        rig.scheduler.set_policy(target_us=50_000, is_shedding=True, curve=[(1, 1_000_000), (8, 1_000_000)])
        kept.append(await rig.answers(13))
        await wait_until_alive(rig, 1)
        await asyncio.sleep(0.1)  # longer than the target: what would be overdue is overdue now
        assert await rig.answers(7) == [7]
        assert rig.scheduler.observe().busy_instances == 0
