"""Awkward guests of the core: models, clients and settings that do what nobody should."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hand_driven import HandDriven, make_spec, message, values_of

from aiorch_server._core import Batch, Mailbox, ModelSpec, Scheduler, decode_response, encode_request, walk_elements
from aiorch_server.errors import AiorchError, Code, ModelExecutionError, error_from_code
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec


async def test_a_status_that_grpc_does_not_know_harms_nobody_else(mailbox: Mailbox, scheduler: Scheduler) -> None:
    futures = [mailbox.submit(scheduler, message(index)) for index in range(3)]
    batch = Batch(scheduler)
    assert scheduler.take(batch)
    batch.select(0)
    batch.fail(404, "not a gRPC code")
    batch.select(1)
    batch.settle({"Y": batch.gather()["X"] * 2})
    batch.select(2)
    batch.settle({"Y": batch.gather()["X"] * 2})
    results = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 10)
    assert isinstance(results[0], AiorchError)
    assert (results[0].code, str(results[0])) == (Code.INTERNAL, "not a gRPC code")
    assert [values_of(result) for result in results[1:] if isinstance(result, memoryview)] == [[2.0], [4.0]]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: setattr(x, "shape", (x.size,)),
        lambda x: setattr(x, "dtype", np.int32),
        lambda x: x.setflags(write=False),
    ],
)
async def test_what_a_model_does_to_its_inputs_does_not_outlive_the_batch(
    mailbox: Mailbox, scheduler: Scheduler, spoil: Callable[[NumpyArray], None]
) -> None:
    batch = Batch(scheduler)
    for value in (1.0, 2.0):
        future = mailbox.submit(scheduler, message(value, value))
        assert scheduler.take(batch)
        given = batch.gather()["X"]
        assert given.shape == (2, 4)
        assert given.dtype == np.float32
        assert given.flags.writeable
        batch.settle({"Y": given * 2})
        spoil(given)
        assert values_of(await asyncio.wait_for(future, 10)) == [2 * value] * 2


@pytest.mark.parametrize("default_timeout_us", [0, 60_000_000])
async def test_the_longest_timeout_is_not_the_shortest(mailbox: Mailbox, default_timeout_us: int) -> None:
    scheduler = Scheduler(make_spec(), default_timeout_us=default_timeout_us, allow_timeout_override=True)
    future = mailbox.submit(scheduler, message(1), timeout_us=2**63 // 1000 - 1)
    instance = HandDriven(scheduler)
    instance.go()
    assert values_of(await asyncio.wait_for(future, 10)) == [2.0]
    instance.stop()


@pytest.mark.parametrize("name", ["max_queue_delay_us", "default_timeout_us"])
def test_a_setting_that_is_longer_than_the_clock_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at most"):
        Scheduler(make_spec(), **{name: 2**62})  # type: ignore[arg-type]


async def test_waiting_for_ever_is_not_waiting_not_at_all(mailbox: Mailbox, scheduler: Scheduler) -> None:
    future = mailbox.submit(scheduler, message(1))
    waiter = threading.Thread(target=scheduler.wait_idle, args=(math.inf,), daemon=True)
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive(), "it gave up at once"
    future.cancel()
    await asyncio.sleep(0)
    await asyncio.to_thread(waiter.join, 10)
    assert not waiter.is_alive()


@pytest.mark.parametrize("given", [bytearray(b"ab"), memoryview(b"ab"), np.bytes_(b"ab"), "ab", b"ab"])
async def test_every_kind_of_bytes_is_bytes(mailbox: Mailbox, given: object) -> None:
    spec = ModelSpec(
        "m", 1, ModelSignature((TensorSpec("X", DataType.FP32, (-1,)),), (TensorSpec("T", DataType.BYTES, (1,)),), 4)
    )
    scheduler = Scheduler(spec)
    future = mailbox.submit(scheduler, message(1))
    batch = Batch(scheduler)
    assert scheduler.take(batch)
    column = np.empty((1, 1), object)
    column[0, 0] = given
    batch.settle({"T": column})
    assert bytes(decode_response(await asyncio.wait_for(future, 10))[3][0][3]) == b"\2\0\0\0ab"


async def test_numbers_are_no_text(mailbox: Mailbox) -> None:
    spec = ModelSpec(
        "m", 1, ModelSignature((TensorSpec("X", DataType.FP32, (-1,)),), (TensorSpec("T", DataType.BYTES, (1,)),), 4)
    )
    scheduler = Scheduler(spec)
    future = mailbox.submit(scheduler, message(1))
    batch = Batch(scheduler)
    assert scheduler.take(batch)
    with pytest.raises(ModelExecutionError, match=r"output 'T' has numpy type float32; BYTES needs object"):
        batch.settle({"T": np.zeros((1, 1), np.float32)})
    future.cancel()


class Awkward(dict[object, object]):
    """A mapping that raises something else than KeyError."""

    def __getitem__(self, key: object) -> object:
        raise OSError("the device is gone")


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [
        (Awkward(), OSError),
        ({1: None, "a": None}, ModelExecutionError),
        ({"Y": np.broadcast_to(np.float32(1), (1, 2**60))}, ModelExecutionError),
        ({"Y": np.zeros((1, 4), ">f4")}, ModelExecutionError),
        ({"Y": np.zeros((1, 4), object)}, ModelExecutionError),
        ({"Y": [[1.0], [1.0, 2.0]]}, Exception),
        ({"Y": np.zeros((0, 4), np.float32)}, ModelExecutionError),
    ],
)
async def test_nonsense_settles_nobody(
    mailbox: Mailbox, scheduler: Scheduler, outputs: dict[str, NumpyArray], kind: type[BaseException]
) -> None:
    future = mailbox.submit(scheduler, message(3))
    batch = Batch(scheduler)
    assert scheduler.take(batch)
    given = batch.gather()["X"]
    with pytest.raises(kind):
        batch.settle(outputs)
    batch.settle({"Y": given * 2})
    assert values_of(await asyncio.wait_for(future, 10)) == [6.0]


async def test_outputs_may_be_empty_strided_or_the_inputs_themselves(mailbox: Mailbox, scheduler: Scheduler) -> None:
    async def run(answer: Callable[[NumpyArray], NumpyArray], *values: float) -> list[tuple[tuple[int, ...], bytes]]:
        futures = [mailbox.submit(scheduler, message(value)) for value in values]
        batch = Batch(scheduler)
        assert scheduler.take(batch)
        batch.settle({"Y": answer(batch.gather()["X"])})
        answers = [decode_response(await asyncio.wait_for(future, 10))[3][0] for future in futures]
        return [(shape, bytes(data)) for _, _, shape, data in answers]

    assert await run(lambda x: x[:, :0], 1, 2) == [((1, 0), b"")] * 2
    assert await run(lambda x: x, 1, 2) == [((1, 4), np.full(4, value, np.float32).tobytes()) for value in (1, 2)]
    rows = await run(lambda x: np.broadcast_to(x[:, ::2][::-1], x[:, ::2].shape), 1, 2)
    assert rows == [((1, 2), np.full(2, value, np.float32).tobytes()) for value in (2, 1)]


def test_a_member_that_is_not_there(scheduler: Scheduler) -> None:
    batch = Batch(scheduler)
    for index in (-1, 0, 10**6):
        with pytest.raises(IndexError):
            batch.select(index)


async def test_an_empty_tensor_of_astronomic_size_is_no_fit(mailbox: Mailbox) -> None:
    spec = ModelSpec("m", 1, ModelSignature((TensorSpec("X", DataType.FP32, (-1, -1)),), (), 4))

    def ask(shape: Sequence[int]) -> None:
        mailbox.submit(Scheduler(spec), encode_request("m", "", "", [("X", "FP32", shape, b"")])).cancel()

    ask((1, 0, 1000))
    with pytest.raises(AiorchError, match="does not fit"):
        ask((1, 0, 2**62))


def test_a_code_from_anywhere_makes_an_error() -> None:
    for code in (-1, 0, 17, 404):
        assert error_from_code(code, "why").code is Code.UNKNOWN


def test_whole_elements_are_counted_to_the_first_that_is_cut_off() -> None:
    data = b"\1\0\0\0a" + bytes(4) + b"\2\0\0\0bc"
    assert walk_elements(data, 10) == (3, len(data))
    assert walk_elements(data, 2) == (2, 9)
    assert walk_elements(data, 0) == walk_elements(b"", 5) == (0, 0)
    assert walk_elements(data[:-1], 10) == walk_elements(data[:-3], 10) == (2, 9)
    assert walk_elements(b"\xff\xff\xff\xff", 1) == (0, 0)


async def test_words_that_cannot_be_encoded_are_words_all_the_same(mailbox: Mailbox, scheduler: Scheduler) -> None:
    futures = [mailbox.submit(scheduler, message(1, width=width)) for width in (1, 2)]
    batch = Batch(scheduler)
    assert scheduler.take(batch)
    batch.fail(Code.INTERNAL, "bad \udcff name")
    scheduler.abandon(Code.UNAVAILABLE, "gone with \udcff")
    results = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 10)
    assert [str(result) for result in results] == ["bad ? name", "[request id: <id_unknown>] gone with ?"]


async def test_a_bool_is_0_or_1_whatever_byte_was_sent(mailbox: Mailbox) -> None:
    scheduler = Scheduler(ModelSpec("m", 1, ModelSignature((TensorSpec("F", DataType.BOOL, (4,)),), (), 4)))
    future = mailbox.submit(scheduler, encode_request("m", "", "", [("F", "BOOL", (1, 4), b"\0\1\2\xff")]))
    batch = Batch(scheduler)
    assert scheduler.take(batch)
    assert batch.gather()["F"].tobytes() == b"\0\1\1\1"
    batch.settle({})
    await asyncio.wait_for(future, 10)
