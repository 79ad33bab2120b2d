"""Instances on threads: failures of models, of members, of threads, of loads; and what the members get."""

from __future__ import annotations

import asyncio
import logging
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
from instance_rig import Execute, Rig, ScriptedBackend, read, running

from aiorch_server.backend import LoadContext
from aiorch_server.errors import AiorchError, Code, ModelExecutionError, ModelLoadError, UnsupportedRequest
from aiorch_server.execution.failures import FailureLog, describe_error
from aiorch_server.execution.warmup import WarmupSample
from aiorch_server.types import NumpyArray


def double(x: NumpyArray) -> NumpyArray:
    return x * 2


class Recorder:
    """Doubles, raises on poison, and remembers the batches."""

    def __init__(self, poison: Exception | None = None) -> None:
        self.poison = poison or ValueError("poison")
        self.batches: list[list[int]] = []

    def __call__(self, x: NumpyArray) -> NumpyArray:
        self.batches.append([int(value) for value in x[:, 0]])
        if 13 in x:
            raise self.poison
        return x * 2


async def test_a_poisoned_member_harms_only_itself() -> None:
    recorder = Recorder()
    async with running(ScriptedBackend(recorder)) as rig:
        assert await rig.answers(1, 13, 3, 4) == [2, (Code.INTERNAL, "model 'm' failed: ValueError: poison"), 6, 8]
        assert recorder.batches == [[1, 13, 3, 4], [1], [13], [3], [4]]
        assert await rig.answers(5, 6, 7, 8) == [10, 12, 14, 16], "the instance serves on"


async def test_without_isolation_the_batch_fails_as_one() -> None:
    recorder = Recorder()
    async with running(ScriptedBackend(recorder), isolate=False) as rig:
        failure = (Code.INTERNAL, "model 'm' failed: ValueError: poison")
        assert await rig.answers(1, 13, 3, 4) == [failure] * 4
        assert len(recorder.batches) == 1


async def test_a_single_failing_request_is_not_run_twice() -> None:
    recorder = Recorder()
    async with running(ScriptedBackend(recorder)) as rig:
        assert await rig.answers(13) == [(Code.INTERNAL, "model 'm' failed: ValueError: poison")]
        assert recorder.batches == [[13]]


@pytest.mark.parametrize("error", [UnsupportedRequest("not this"), ModelExecutionError("why")])
async def test_our_own_errors_keep_code_and_text(error: AiorchError) -> None:
    async with running(ScriptedBackend(Recorder(error))) as rig:
        assert await rig.answers(1, 13, 3, 4) == [2, (int(error.code), str(error)), 6, 8]


@pytest.mark.parametrize(
    ("execute", "text"),
    [
        (lambda x: x[:-1], "output 'Y'"),
        (lambda x: x.astype(np.float64), "output 'Y'"),
        (lambda x: None, "output 'Y'"),
    ],
)
async def test_wrong_outputs_fail_the_request_and_not_the_instance(execute: Execute, text: str) -> None:
    async with running(ScriptedBackend(execute)) as rig:
        for _ in range(2):
            (answer,) = await rig.answers(1)
            assert isinstance(answer, tuple)
            assert answer[0] == Code.INTERNAL
            assert text in answer[1]


async def test_texts_that_cannot_be_encoded_still_reach_the_client() -> None:
    async with running(ScriptedBackend(Recorder(ValueError("bad \udcff name")))) as rig:
        assert await rig.answers(13) == [(Code.INTERNAL, "model 'm' failed: ValueError: bad ? name")]


async def test_a_member_that_is_cancelled_while_it_runs_disturbs_nobody() -> None:
    entered, leave = threading.Event(), threading.Event()

    def wait(x: NumpyArray) -> NumpyArray:
        entered.set()
        assert leave.wait(10)
        return x * 2

    async with running(ScriptedBackend(wait)) as rig:
        futures = [rig.submit(value) for value in (1, 2, 3, 4)]
        assert await asyncio.to_thread(entered.wait, 10)
        futures[1].cancel()
        leave.set()
        results = await asyncio.wait_for(asyncio.gather(futures[0], *futures[2:]), 10)
        assert [read(result) for result in results] == [2, 6, 8]


async def test_when_the_last_instance_dies_nobody_is_left_waiting() -> None:
    entered, leave = threading.Event(), threading.Event()

    def die(x: NumpyArray) -> NumpyArray:
        entered.set()
        assert leave.wait(10)
        raise SystemExit("the model called exit")

    async with running(ScriptedBackend(die)) as rig:
        running_now = [rig.submit(value) for value in (1, 2, 3, 4)]
        assert await asyncio.to_thread(entered.wait, 10)
        queued = [rig.submit(value) for value in (5, 6)]
        leave.set()
        results = await asyncio.wait_for(asyncio.gather(*running_now, *queued, return_exceptions=True), 10)
        codes = [result.code if isinstance(result, AiorchError) else None for result in results]
        assert codes == [Code.INTERNAL] * 4 + [Code.UNAVAILABLE] * 2
        assert all("SystemExit: the model called exit" in str(result) for result in results[:4])
        assert "instance 0 of 'm:1' died" in str(results[4])
        reason = await asyncio.to_thread(rig.group.ended.result, 10)
        assert "SystemExit" in reason
        with pytest.raises(AiorchError):
            await rig.submit(7)


async def test_when_one_of_two_instances_dies_the_other_serves_on() -> None:
    guard = threading.Lock()
    deaths: list[int] = []

    def die_once(x: NumpyArray) -> NumpyArray:
        with guard:
            if not deaths:
                deaths.append(1)
                raise SystemExit
        return x * 2

    async with running(ScriptedBackend(die_once), instances=2) as rig:
        (answer,) = await rig.answers(1)
        assert isinstance(answer, tuple)
        assert answer[0] == Code.INTERNAL
        assert await rig.answers(2, 3, 4, 5) == [4, 6, 8, 10]
        assert not rig.group.ended.done()


async def test_closing_answers_what_is_queued_and_closes_each_instance_once_in_its_own_thread() -> None:
    backend = ScriptedBackend(double)
    async with running(backend, instances=2) as rig:
        futures = [rig.submit(value) for value in range(20)]
        rig.scheduler.close()
        assert [read(result) for result in await asyncio.wait_for(asyncio.gather(*futures), 10)] == [
            2 * value for value in range(20)
        ]
        assert await asyncio.to_thread(rig.group.ended.result, 10) == ""
        assert rig.group.alive == 0
        for instance in backend.instances:
            assert instance.closed == [instance.thread]
            assert instance.thread.name.startswith("m:1#")


async def test_a_load_that_raises_fails_the_start_and_ends_the_others() -> None:
    def load_one(context: LoadContext) -> None:
        if context.instance_index == 1:
            raise MemoryError("no room")

    backend = ScriptedBackend(double, load_one)
    rig = Rig(backend, 3, [], True)
    with pytest.raises(ModelLoadError, match="instance 1 of 'm:1' failed to load: MemoryError: no room"):
        await asyncio.to_thread(rig.group.start, 10)
    await asyncio.to_thread(rig.group.ended.result, 10)
    assert [len(instance.closed) for instance in backend.instances] == [1]
    rig.mailbox.close()


async def test_a_load_that_hangs_is_given_up_and_closes_itself_when_it_returns() -> None:
    gate = threading.Event()
    backend = ScriptedBackend(double, lambda context: (gate.wait(10), None)[1])
    rig = Rig(backend, 1, [], True)
    with pytest.raises(ModelLoadError, match=r"did not finish loading within 0\.05 s"):
        await asyncio.to_thread(rig.group.start, 0.05)
    assert not rig.group.ended.done()
    gate.set()
    await asyncio.to_thread(rig.group.ended.result, 10)
    assert len(backend.instances[0].closed) == 1
    rig.mailbox.close()


async def test_a_failing_warm_up_fails_the_load_and_closes_the_instance() -> None:
    backend = ScriptedBackend(Recorder())
    sample = WarmupSample("unlucky", {"X": np.array([[13]], np.int32)}, rows=1)
    rig = Rig(backend, 1, [sample], True)
    with pytest.raises(ModelLoadError, match="warm-up 'unlucky' failed: ValueError: poison"):
        await asyncio.to_thread(rig.group.start, 10)
    await asyncio.to_thread(rig.group.ended.result, 10)
    assert len(backend.instances[0].closed) == 1
    rig.mailbox.close()


async def test_a_close_that_raises_does_not_keep_the_group_alive() -> None:
    backend = ScriptedBackend(double)
    async with running(backend) as rig:
        backend.instances[0].close = lambda: 1 / 0  # type: ignore[method-assign, assignment]
        rig.scheduler.close()
        assert await asyncio.to_thread(rig.group.ended.result, 10) == ""


class Mute(Exception):
    """An error that cannot even say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Astray(AiorchError):
    code = 404  # type: ignore[assignment]


class Lost(AiorchError):
    code = "lost"  # type: ignore[assignment]


class Verbose(AiorchError):
    code = Code.NOT_FOUND

    def __str__(self) -> str:
        return "x" * 100_000


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (Mute(), Code.INTERNAL, "model 'm' failed: Mute"),
        (Astray("away"), Code.INTERNAL, "away"),
        (Lost("away"), Code.INTERNAL, "away"),
        (Verbose(), Code.NOT_FOUND, "x" * 1000 + "..."),
    ],
)
async def test_no_error_is_so_odd_that_it_ends_an_instance(error: Exception, code: Code, text: str) -> None:
    async with running(ScriptedBackend(Recorder(error))) as rig:
        for _ in range(2):
            assert await rig.answers(1, 13, 3, 4) == [2, (code, text), 6, 8]
        assert rig.group.alive == 1


async def test_a_thread_that_does_not_start_fails_the_start_and_ends_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = ScriptedBackend(double)
    rig = Rig(backend, 2, [], True)
    start = threading.Thread.start

    def refuse_second(thread: threading.Thread) -> None:
        if thread.name == "m:1#1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_second)
    with pytest.raises(ModelLoadError, match=r"instance 1 of 'm:1' failed to load: .*can't start new thread"):
        await asyncio.to_thread(rig.group.start, 10)
    await asyncio.to_thread(rig.group.ended.result, 10)
    assert rig.group.alive == 0
    assert len(backend.instances[0].closed) == 1
    rig.mailbox.close()


async def test_a_close_that_exits_does_not_keep_the_group_alive() -> None:
    def leave() -> None:
        raise SystemExit("gone")

    backend = ScriptedBackend(double)
    async with running(backend) as rig:
        backend.instances[0].close = leave  # type: ignore[method-assign]
        rig.scheduler.close()
        assert await asyncio.to_thread(rig.group.ended.result, 10) == ""


async def test_a_thread_that_dies_between_the_members_answers_all_even_if_its_traceback_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[BaseException] = []

    def die(log: FailureLog, error: BaseException) -> None:
        kept.append(error)
        raise MemoryError("no room for a report")

    monkeypatch.setattr(FailureLog, "write", die)
    async with running(ScriptedBackend(Recorder())) as rig:
        answers = await rig.answers(1, 13, 3, 4)
        assert [answer[0] for answer in answers if isinstance(answer, tuple)] == [Code.INTERNAL] * 4
        reason = await asyncio.to_thread(rig.group.ended.result, 10)
        assert "MemoryError" in reason
    assert kept


def test_failures_are_logged_once_per_type_and_interval(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog("m:1", interval_s=3600)
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            log.write(ValueError("a"))
        log.write(KeyError("b"))
    assert len(caplog.records) == 2
    assert all(record.exc_info for record in caplog.records)
    log = FailureLog("m:1", interval_s=0)
    caplog.clear()
    log.write(ValueError("a"))
    log.write(ValueError("a"))
    assert len(caplog.records) == 2


def test_descriptions_are_bounded() -> None:
    assert describe_error(ValueError()) == "ValueError"
    assert len(describe_error(ValueError("x" * 10_000))) < 1100


async def test_loading_leaves_no_scratch_memory_behind() -> None:
    size, count = 100_000, 600  # blocks that glibc takes from its heap

    def load_one(context: LoadContext) -> None:
        blocks = [bytearray(b"x" * size) for _ in range(count)]
        kept.append(blocks[-1])  # without trimming it keeps what lies below it in the process
        del blocks

    kept: list[bytearray] = []
    before = resident_bytes()
    async with running(ScriptedBackend(double, load_one)) as rig:
        assert resident_bytes() - before < size * count / 3
        assert await rig.answers(1) == [2]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
