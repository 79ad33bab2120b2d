"""Tensors that a request leaves outside of its message: wrong ones and cancelled ones first, then without a copy."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from aiorch_backends.identity.echo import Echo
from hand_driven import TIMEOUT_S, HandDriven, make_spec, message, values_of

from aiorch_server._core import (
    Batch,
    Mailbox,
    ModelSpec,
    Scheduler,
    decode_response,
    encode_request,
    read_copied_bytes,
    serve_compiled,
)
from aiorch_server.errors import InternalError, QueueFull
from aiorch_server.types import DataType, ModelSignature, TensorSpec

WIDTH = 25_000
BIG_BYTES = WIDTH * 4


def head(width: int = WIDTH, *, text: int | None = None) -> bytes:
    """A request whose tensors are elsewhere."""
    inputs: list[tuple[str, str, tuple[int, ...], bytes]] = [("X", "FP32", (1, width), b"")]
    if text is not None:
        inputs.append(("TEXT", "BYTES", (1, text), b""))
    return encode_request("echo", "", "", inputs)


def filled(value: float, width: int = WIDTH) -> bytes:
    return np.full(width, value, np.float32).tobytes()


@pytest.mark.parametrize(
    ("contents", "text"),
    [
        ([b"1234"], "does not fit model 'echo'"),
        ([], "0 contents for 1 inputs"),
        ([filled(1), filled(1)], "2 contents for 1 inputs"),
        ([b""], "does not fit"),
    ],
)
async def test_contents_that_do_not_fit_are_refused(
    mailbox: Mailbox, scheduler: Scheduler, contents: list[bytes], text: str
) -> None:
    with pytest.raises(InternalError, match=text):
        mailbox.submit(scheduler, head(), contents)
    assert scheduler.pending == 0


async def test_what_is_no_buffer_or_not_in_one_piece_is_refused(mailbox: Mailbox, scheduler: Scheduler) -> None:
    with pytest.raises(TypeError):
        mailbox.submit(scheduler, head(), [3])  # type: ignore[list-item]
    with pytest.raises(BufferError):
        mailbox.submit(scheduler, head(), [np.zeros(2 * WIDTH, np.float32)[::2]])


async def test_a_refused_or_cancelled_request_gives_its_memory_back(mailbox: Mailbox) -> None:
    scheduler = Scheduler(make_spec(), max_queue_size=1)
    first, second = bytearray(filled(1)), bytearray(filled(2))
    future = mailbox.submit(scheduler, head(), [first])
    with pytest.raises(QueueFull):
        mailbox.submit(scheduler, head(), [second])
    del second[:]  # held memory cannot be resized
    with pytest.raises(BufferError):
        del first[:]
    future.cancel()
    await asyncio.sleep(0)
    del first[:]


async def test_memory_is_held_while_a_cancelled_request_runs(
    mailbox: Mailbox, scheduler: Scheduler, instance: HandDriven
) -> None:
    memory = bytearray(filled(3))
    future = mailbox.submit(scheduler, head(), [memoryview(memory)])
    await instance.until_taken()
    future.cancel()
    await asyncio.sleep(0)
    with pytest.raises(BufferError):
        del memory[:]
    instance.go()
    after = mailbox.submit(scheduler, message(1))
    await instance.until_taken()
    instance.go()
    await asyncio.wait_for(after, TIMEOUT_S)
    del memory[:]


async def test_bytes_elements_that_change_after_the_check_do_no_harm(
    mailbox: Mailbox, scheduler: Scheduler, instance: HandDriven
) -> None:
    elements = bytearray(struct.pack("<I", 8) + b"12345678")
    seen: list[Any] = []

    def look(batch: Batch) -> None:
        seen.append(batch.gather()["TEXT"].tolist())
        HandDriven.echo(batch)

    instance.execute = look
    future = mailbox.submit(scheduler, head(1, text=1), [filled(1, 1), elements])
    await instance.until_taken()
    elements[:4] = struct.pack("<I", 1 << 30)
    instance.go()
    assert values_of(await asyncio.wait_for(future, TIMEOUT_S)) == [2.0]
    assert seen == [[[b"12345678"]]]


async def test_a_batch_takes_tensors_from_everywhere(
    mailbox: Mailbox, scheduler: Scheduler, instance: HandDriven
) -> None:
    blocker = mailbox.submit(scheduler, message(9))
    await instance.until_taken()
    array = np.full((1, WIDTH), 3, np.float32)
    futures = [
        mailbox.submit(scheduler, head(), [filled(1)]),
        mailbox.submit(scheduler, message(2, width=WIDTH)),
        mailbox.submit(scheduler, head(), [array]),
    ]
    instance.go(2)
    assert [values_of(await asyncio.wait_for(each, TIMEOUT_S)) for each in (blocker, *futures)] == [
        [18.0],
        [2.0],
        [4.0],
        [6.0],
    ]
    assert instance.sizes == [1, 3]


class Chain:
    """Two models in a row, each on a thread of its own."""

    def __init__(self, execute: Callable[[Any], Any] | None) -> None:
        spec = (TensorSpec("X", DataType.FP32, (-1,)),)
        signature = ModelSignature(spec, (TensorSpec("Y", DataType.FP32, (-1,)),), 8)
        self.schedulers = [Scheduler(ModelSpec(name, 1, signature)) for name in ("one", "two")]
        self.threads = [threading.Thread(target=self.serve, args=(each, execute)) for each in self.schedulers]
        for thread in self.threads:
            thread.start()

    @staticmethod
    def serve(scheduler: Scheduler, execute: Callable[[Any], Any] | None) -> None:
        if execute is None:
            instance = Echo(1, 0)
            serve_compiled(Batch(scheduler), instance.capsule)
        else:
            Batch(scheduler).serve(execute)

    def stop(self) -> None:
        for scheduler, thread in zip(self.schedulers, self.threads, strict=True):
            scheduler.close()
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


@pytest.fixture(params=["compiled", "python"])
def chain(request: pytest.FixtureRequest) -> Iterator[Chain]:
    chain = Chain(None if request.param == "compiled" else lambda inputs: {"Y": inputs["X"] + 0})
    yield chain
    chain.stop()


async def test_an_answer_is_the_next_models_input_as_it_lies(mailbox: Mailbox, chain: Chain) -> None:
    one, two = chain.schedulers
    _, _, _, ((_, _, shape, answer),) = decode_response(
        await asyncio.wait_for(mailbox.submit(one, head(), [filled(5)]), TIMEOUT_S)
    )
    assert np.frombuffer(answer, np.float32).ctypes.data % 64 == 0
    before = read_copied_bytes()
    following = await asyncio.wait_for(mailbox.submit(two, head(), [answer]), TIMEOUT_S)
    copied = {place: after - before[place] for place, after in read_copied_bytes().items()}
    # the answer is written once; nothing is copied on the way in
    assert copied == {"received": 0, "gathered": 0, "encoded": BIG_BYTES, "sent": 0}
    assert values_of(following) == [5.0] and shape == (1, WIDTH)


async def test_a_model_that_writes_into_its_input_spoils_no_shared_tensor(
    mailbox: Mailbox, scheduler: Scheduler
) -> None:
    def double(inputs: Any) -> Any:
        inputs["X"] *= 2
        return {"Y": inputs["X"]}

    thread = threading.Thread(target=lambda: Batch(scheduler).serve(double))
    thread.start()
    try:
        answer = await asyncio.wait_for(mailbox.submit(scheduler, head(), [filled(5)]), TIMEOUT_S)
        shared = decode_response(answer)[3][0][3].toreadonly()
        for _ in range(2):
            following = await asyncio.wait_for(mailbox.submit(scheduler, head(), [shared]), TIMEOUT_S)
            assert values_of(following) == [20.0]
        assert values_of(answer) == [10.0]
    finally:
        scheduler.close()
        thread.join(TIMEOUT_S)
