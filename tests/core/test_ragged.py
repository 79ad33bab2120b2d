"""Requests whose sizes differ in a ragged input share a batch; what else differs keeps them apart."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from aiorch_server._core import Batch, Mailbox, ModelSpec, Scheduler, detach, encode_request
from aiorch_server.errors import InternalError
from aiorch_server.types import DataType, ModelSignature, TensorSpec

TIMEOUT_S = 20
SIGNATURE = ModelSignature(
    (
        TensorSpec("R", DataType.FP32, (-1, -1), is_ragged=True),
        TensorSpec("P", DataType.FP32, (-1,)),
        TensorSpec("O", DataType.FP32, (-1,), optional=True, is_ragged=True),
        TensorSpec("S", DataType.FP32, (), optional=True),
    ),
    (TensorSpec("Y", DataType.FP32, (1,)),),
    max_batch_size=8,
)


def encode(**shapes: tuple[int, ...]) -> bytes:
    tensors = [(name, "FP32", shape, np.zeros(shape, np.float32).tobytes()) for name, shape in shapes.items()]
    return encode_request("m", "", "", tensors, [])


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(ModelSpec("m", 1, SIGNATURE))


async def form(scheduler: Scheduler, mailbox: Mailbox, *messages: bytes) -> list[list[dict[str, Any]]]:
    """The shapes of every member of every batch."""
    futures = [mailbox.submit(scheduler, message) for message in messages]
    batch, formed = Batch(scheduler), []
    while scheduler.pending:
        assert await asyncio.to_thread(scheduler.take, batch)
        members = detach(batch)
        formed.append([{name: array.shape for name, array in each.gather().items()} for each in members])
        for each in members:
            each.settle({"Y": np.zeros((each.rows, 1), np.float32)})
    await asyncio.wait_for(asyncio.gather(*futures), TIMEOUT_S)
    return formed


async def test_each_member_keeps_its_own_shape(scheduler: Scheduler, mailbox: Mailbox) -> None:
    shapes: list[dict[str, tuple[int, ...]]] = [
        {"R": (1, 2, 3), "P": (1, 4)},
        {"R": (2, 3, 2), "P": (2, 4)},
        {"R": (1, 0, 9), "P": (1, 4)},
    ]
    assert await form(scheduler, mailbox, *(encode(**each) for each in shapes)) == [shapes]


async def test_other_inputs_and_what_is_left_out_keep_requests_apart(scheduler: Scheduler, mailbox: Mailbox) -> None:
    shapes: list[dict[str, tuple[int, ...]]] = [
        {"R": (1, 1, 1), "P": (1, 4)},
        {"R": (1, 1, 1), "P": (1, 5)},
        {"R": (1, 1, 1), "P": (1, 4), "O": (1, 3)},
        {"R": (1, 1, 1), "P": (1, 4), "S": (1,)},
        {"R": (1, 2, 1), "P": (1, 4), "O": (1, 7)},
    ]
    formed = await form(scheduler, mailbox, *(encode(**each) for each in shapes))
    assert formed == [[shapes[0]], [shapes[1]], [shapes[2], shapes[4]], [shapes[3]]]


async def test_shapes_are_checked_as_ever(scheduler: Scheduler, mailbox: Mailbox) -> None:
    for wrong in (encode(R=(1, 2), P=(1, 4)), encode(R=(2, 1, 1), P=(1, 4)), encode(P=(1, 4))):
        with pytest.raises(InternalError, match="does not fit model"):
            mailbox.submit(scheduler, wrong)


async def test_a_ragged_batch_is_not_gathered_as_one(scheduler: Scheduler, mailbox: Mailbox) -> None:
    # as many elements in both: the bytes would fit, and be the wrong ones
    messages = [encode(R=(1, 2, 3), P=(1, 4)), encode(R=(1, 3, 2), P=(1, 4))]
    futures = [mailbox.submit(scheduler, message) for message in messages]
    batch = Batch(scheduler)
    assert await asyncio.to_thread(scheduler.take, batch)
    with pytest.raises(RuntimeError, match="input 'R' is ragged"):
        batch.gather()
    for index, shape in enumerate([(1, 2, 3), (1, 3, 2)]):
        batch.select(index)
        assert batch.gather()["R"].shape == shape
        batch.settle({"Y": np.zeros((1, 1), np.float32)})
    await asyncio.wait_for(asyncio.gather(*futures), TIMEOUT_S)
