"""Models that answer request by request and get it wrong: every caller hears, and the instance can still end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiorch_server import _core
from aiorch_server._core import Batch, Mailbox, ModelSpec, Scheduler, decode_response, encode_request
from aiorch_server.backend import Backend, DeclaredSignature, LoadContext, ModelInstance, ModelRequest, RequestInstance
from aiorch_server.errors import AiorchError, Code, ModelExecutionError
from aiorch_server.execution import request_loop
from aiorch_server.execution.thread_executor import InstanceGroup
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec

SIGNATURE = ModelSignature(
    (TensorSpec("X", DataType.INT32, (1,)),), (TensorSpec("Y", DataType.INT32, (1,)),), max_batch_size=8
)
LIMIT_S = 10
Act = Callable[[Sequence[ModelRequest]], None]


class Instance(RequestInstance):
    def __init__(self, act: Act) -> None:
        self.act = act

    def execute_requests(self, requests: Sequence[ModelRequest]) -> None:
        self.act(requests)


class ActingBackend(Backend):
    name = "acting"

    def __init__(self, act: Act) -> None:
        self.act = act

    def inspect(self, context: LoadContext) -> ModelSignature:
        return SIGNATURE

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        return Instance(self.act)


class Rig:
    def __init__(self, act: Act) -> None:
        self.scheduler = Scheduler(ModelSpec("m", 1, SIGNATURE), max_queue_delay_us=50_000, preferred_batch_sizes=[2])
        context = LoadContext("m", 1, Path("m"), Path("m/1"), DeclaredSignature(), instance_index=0)
        self.group = InstanceGroup("m:1", self.scheduler, ActingBackend(act), SIGNATURE, [context])
        self.mailbox = Mailbox(asyncio.get_running_loop())

    def submit(self, value: int) -> asyncio.Future[memoryview]:
        data = np.array([[value]], np.int32).tobytes()
        return self.mailbox.submit(self.scheduler, encode_request("m", "", "", [("X", "INT32", (1, 1), data)], []))

    async def ask(self, *values: int) -> list[int | tuple[int, str]]:
        futures = [self.submit(value) for value in values]
        return [
            read(each) for each in await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), LIMIT_S)
        ]


def read(result: memoryview | BaseException) -> int | tuple[int, str]:
    if isinstance(result, memoryview):
        return int(np.frombuffer(decode_response(result)[3][0][3], np.int32)[0])
    assert isinstance(result, AiorchError)
    return int(result.code), str(result)


@contextlib.asynccontextmanager
async def running(act: Act) -> AsyncIterator[Rig]:
    """Whatever the model does: once the scheduler is closed, the instance ends."""
    rig = Rig(act)
    await asyncio.to_thread(rig.group.start, LIMIT_S)
    try:
        yield rig
        rig.scheduler.close()
        await asyncio.to_thread(rig.group.ended.result, LIMIT_S)
    finally:
        rig.group.abandon(int(Code.UNAVAILABLE), "the test is over")
        rig.mailbox.close()


def double(requests: Sequence[ModelRequest]) -> None:
    for request in requests:
        request.send({"Y": request.inputs["X"] * 2})


class NoArray:
    """What a tensor that needs a gradient says when it is asked for its numbers."""

    def __array__(self, *_: Any, **__: Any) -> NumpyArray:
        raise RuntimeError("Can't call numpy() on a tensor that requires grad")


class BadError(ModelExecutionError):
    def __str__(self) -> str:
        raise ValueError("no words")


WRONG: list[Callable[[ModelRequest], None]] = [
    lambda request: request.send({"Y": NoArray()}),  # type: ignore[dict-item]
    lambda request: request.send({"Y": request.inputs["X"]}, {"p": object()}),  # type: ignore[dict-item]
    lambda request: request.fail(BadError()),
]
NAMES = ["runtime error of an output", "parameter of a wrong type", "error without words"]


@pytest.mark.parametrize("act", WRONG, ids=NAMES)
async def test_what_could_not_be_sent_is_told_and_can_be_answered_anew(act: Callable[[ModelRequest], None]) -> None:
    told: list[BaseException] = []

    def try_twice(requests: Sequence[ModelRequest]) -> None:
        for request in requests:
            try:
                act(request)
            except Exception as error:
                told.append(error)
                assert not request.is_ended
                double([request])

    async with running(try_twice) as rig:
        assert await rig.ask(1, 2) == [2, 4]
        assert len(told) == 2


@pytest.mark.parametrize("act", WRONG, ids=NAMES)
async def test_what_could_not_be_sent_fails_when_it_is_dropped_on_another_thread(
    act: Callable[[ModelRequest], None],
) -> None:
    def drop(kept: list[ModelRequest]) -> None:
        with contextlib.suppress(Exception):
            act(kept[0])
        kept.clear()

    def leave(requests: Sequence[ModelRequest]) -> None:
        for request in requests:
            threading.Thread(target=drop, args=([request],)).start()

    async with running(leave) as rig:
        for code, text in await rig.ask(1, 2):  # type: ignore[misc]
            assert code == Code.INTERNAL
            assert "dropped this request without a final answer" in text


async def test_a_batch_that_was_taken_before_the_model_is_given_up_is_given_up_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken, given_up = threading.Event(), threading.Event()
    held: list[ModelRequest] = []
    detach = _core.detach

    def detach_late(batch: Batch) -> Any:
        taken.set()
        assert given_up.wait(LIMIT_S)
        return detach(batch)

    monkeypatch.setattr(request_loop, "detach", detach_late)
    async with running(held.extend) as rig:
        future = rig.submit(1)
        assert await asyncio.to_thread(taken.wait, LIMIT_S)
        rig.group.abandon(int(Code.UNAVAILABLE), "unloaded")
        given_up.set()
        with pytest.raises(AiorchError, match="unloaded"):
            await asyncio.wait_for(future, LIMIT_S)
    assert not held


async def test_a_request_that_is_given_up_while_its_answer_turns_out_wrong_ends() -> None:
    encoding, given_up = threading.Event(), threading.Event()
    kept: list[ModelRequest] = []

    class Late:
        def __array__(self, *_: Any, **__: Any) -> NumpyArray:
            encoding.set()
            assert given_up.wait(LIMIT_S)
            raise ValueError("after all, no numbers")

    def answer(request: ModelRequest) -> None:
        with contextlib.suppress(ValueError):
            request.send({"Y": Late()})  # type: ignore[dict-item]

    def leave(requests: Sequence[ModelRequest]) -> None:
        kept.extend(requests)
        threading.Thread(target=answer, args=(requests[0],)).start()

    async with running(leave) as rig:
        future = rig.submit(1)
        assert await asyncio.to_thread(encoding.wait, LIMIT_S)
        rig.group.abandon(int(Code.UNAVAILABLE), "unloaded")
        given_up.set()
        with pytest.raises(AiorchError, match="unloaded"):
            await asyncio.wait_for(future, LIMIT_S)


async def test_when_members_cannot_be_taken_out_all_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def detach(batch: Batch) -> Any:
        raise MemoryError("no member")

    monkeypatch.setattr(request_loop, "detach", detach)
    rig = Rig(double)
    await asyncio.to_thread(rig.group.start, LIMIT_S)
    for code, text in await rig.ask(1, 2):  # type: ignore[misc]
        assert (code, "no member" in text) == (Code.INTERNAL, True)
    rig.mailbox.close()


async def test_requests_are_handed_over_as_they_came_wherever_their_tensors_lie() -> None:
    seen: list[int] = []

    def note(requests: Sequence[ModelRequest]) -> None:
        seen.extend(int(request.inputs["X"][0, 0]) for request in requests)
        double(requests)

    async with running(note) as rig:
        memory = np.arange(8, dtype=np.int32)
        head = encode_request("m", "", "", [("X", "INT32", (1, 1), b"")], [])
        futures = [rig.mailbox.submit(rig.scheduler, head, [memory[number : number + 1].data]) for number in (5, 3)]
        assert [read(each) for each in await asyncio.wait_for(asyncio.gather(*futures), LIMIT_S)] == [10, 6]
    assert seen == [5, 3]
