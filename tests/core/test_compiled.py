"""Compiled instances: batches that run without the interpreter, and what happens when one of them fails."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from aiorch_backends.identity.echo import Echo
from hand_driven import message, values_of

from aiorch_server._core import Batch, Mailbox, ModelSpec, Scheduler, decode_response, encode_request, serve_compiled
from aiorch_server.types import DataType, ModelSignature, TensorSpec

TIMEOUT_S = 20


class Tensor(ctypes.Structure):
    """AiorchTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("n_dims", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
    ]


RUN = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Tensor), ctypes.POINTER(Tensor), ctypes.c_void_p, ctypes.c_size_t
)
Run = Callable[[Tensor, Tensor], str]


class Instance(ctypes.Structure):
    """AiorchInstance, written in Python: ``run`` gives a reason for failure, or nothing."""

    _fields_ = [("abi", ctypes.c_uint32), ("model", ctypes.c_void_p), ("run", RUN)]

    def __init__(self, run: Run, abi: int = 1) -> None:
        def call(model: int, inputs: object, outputs: object, error: int, error_size: int) -> int:
            reason = run(inputs[0], outputs[0]).encode()[: error_size - 1]  # type: ignore[index]
            ctypes.memmove(error, reason + b"\0", len(reason) + 1)
            return 1 if reason else 0

        super().__init__(abi, None, RUN(call))
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.capsule = make(ctypes.addressof(self), b"aiorch_instance", None)


def echo(given: Tensor, answer: Tensor) -> str:
    answer.data, answer.size, answer.n_dims, answer.dims = given.data, given.size, given.n_dims, given.dims
    return ""


def make_spec(datatype: DataType = DataType.FP32, *, max_batch_size: int = 8, optional: bool = False) -> ModelSpec:
    inputs = (TensorSpec("X", datatype, (-1,)),)
    if optional:
        inputs += (TensorSpec("MORE", datatype, (-1,), optional=True),)
    return ModelSpec("echo", 3, ModelSignature(inputs, (TensorSpec("Y", datatype, (-1,)),), max_batch_size))


class Serving:
    """One thread in ``serve_compiled``; batches that fail there are failed with the reason."""

    def __init__(self, scheduler: Scheduler, capsule: object) -> None:
        self.scheduler, self.capsule = scheduler, capsule
        self.reasons: list[str] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        batch = Batch(self.scheduler)
        while (reason := serve_compiled(batch, self.capsule)) is not None:
            self.reasons.append(reason)
            batch.fail(13, reason)

    def stop(self) -> None:
        self.scheduler.close()
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Callable[[ModelSpec, object], Serving]]:
    started: list[Serving] = []

    def start(spec: ModelSpec, capsule: object) -> Serving:
        started.append(Serving(Scheduler(spec), capsule))
        return started[-1]

    yield start
    for serving in started:
        serving.stop()


Serve = Callable[[ModelSpec, object], Serving]


async def test_each_member_gets_its_own_rows(mailbox: Mailbox, serve: Serve) -> None:
    instance = Echo(1, 0)
    serving = serve(make_spec(), instance.capsule)
    sizes = [1 + index % 5 for index in range(200)]
    futures = [
        mailbox.submit(serving.scheduler, message(*[float(index)] * size, width=1 + index % 3))
        for index, size in enumerate(sizes)
    ]
    answers = await asyncio.wait_for(asyncio.gather(*futures), TIMEOUT_S)
    assert [values_of(answer) for answer in answers] == [[float(i)] * size for i, size in enumerate(sizes)]
    assert serving.scheduler.counters().rows == sum(sizes)


async def test_many_members_make_one_batch(mailbox: Mailbox, serve: Serve) -> None:
    rows: list[int] = []
    held = threading.Event()

    def run(given: Tensor, answer: Tensor) -> str:
        assert given.data % 64 == 0  # type: ignore[operator]
        held.wait(TIMEOUT_S)
        rows.append(given.dims[0])
        return echo(given, answer)

    instance = Instance(run)
    serving = serve(make_spec(), instance.capsule)
    first = mailbox.submit(serving.scheduler, message(0.0))
    while serving.scheduler.pending:  # the instance has it
        await asyncio.sleep(0)
    others = [mailbox.submit(serving.scheduler, message(float(index))) for index in range(1, 8)]
    others[2].cancel()
    while serving.scheduler.pending != 6:
        await asyncio.sleep(0)
    held.set()
    answers = await asyncio.wait_for(asyncio.gather(first, *others, return_exceptions=True), TIMEOUT_S)
    assert [values_of(a) for a in answers if isinstance(a, memoryview)] == [[float(i)] for i in range(8) if i != 3]
    assert isinstance(answers[3], asyncio.CancelledError)
    assert rows == [1, 6]


def fold(answer: Tensor) -> None:
    """Two negative dimensions, whose product is right."""
    answer.n_dims, answer.dims[1], answer.dims[2] = 3, -2, -2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (fold, "output 'Y' has a negative dimension, -2"),
        (lambda answer: setattr(answer, "data", None), "output 'Y' is missing"),
        (lambda answer: setattr(answer, "n_dims", 9), "output 'Y' is missing, or has more than 8 dimensions"),
        (lambda answer: setattr(answer, "n_dims", -1), "output 'Y' is missing, or has more than 8 dimensions"),
        (lambda answer: setattr(answer, "n_dims", 0), "output 'Y' has 0 rows for a batch of 2"),
        (lambda answer: answer.dims.__setitem__(0, 3), "output 'Y' has 3 rows for a batch of 2"),
        (lambda answer: answer.dims.__setitem__(1, 5), "output 'Y' has 32 bytes, its shape says 40"),
        (lambda answer: answer.dims.__setitem__(1, -4), "output 'Y' has a negative dimension, -4"),
    ],
)
async def test_outputs_that_cannot_be_are_refused(
    mailbox: Mailbox, serve: Serve, spoil: Callable[[Tensor], None], reason: str
) -> None:
    def run(given: Tensor, answer: Tensor) -> str:
        echo(given, answer)
        spoil(answer)
        return ""

    instance = Instance(run)
    serving = serve(make_spec(), instance.capsule)
    with pytest.raises(Exception, match=reason):
        await asyncio.wait_for(mailbox.submit(serving.scheduler, message(1.0, 2.0)), TIMEOUT_S)
    assert len(serving.reasons) == 1


async def test_an_output_without_elements_may_lie_nowhere(mailbox: Mailbox, serve: Serve) -> None:
    def run(given: Tensor, answer: Tensor) -> str:
        answer.data, answer.size, answer.n_dims = None, 0, 2
        answer.dims[0], answer.dims[1] = given.dims[0], 0
        return ""

    instance = Instance(run)
    serving = serve(make_spec(), instance.capsule)
    answers = await asyncio.wait_for(
        asyncio.gather(*(mailbox.submit(serving.scheduler, message(*[1.0] * rows)) for rows in (1, 2))), TIMEOUT_S
    )
    outputs = [decode_response(answer)[3][0] for answer in answers]
    assert [(list(shape), bytes(data)) for _, _, shape, data in outputs] == [([1, 0], b""), ([2, 0], b"")]


async def test_serving_goes_on_after_a_failure(mailbox: Mailbox, serve: Serve) -> None:
    reasons = iter(["the weights are lost" * 100, ""])
    instance = Instance(lambda given, answer: next(reasons) or echo(given, answer))
    serving = serve(make_spec(), instance.capsule)
    with pytest.raises(Exception, match="the weights are lost"):
        await asyncio.wait_for(mailbox.submit(serving.scheduler, message(1.0)), TIMEOUT_S)
    assert values_of(await asyncio.wait_for(mailbox.submit(serving.scheduler, message(2.0)), TIMEOUT_S)) == [2.0]
    assert len(serving.reasons[0]) == 1023  # bounded


async def test_any_true_byte_is_one(mailbox: Mailbox, serve: Serve) -> None:
    instance = Echo(1, 0)
    serving = serve(make_spec(DataType.BOOL), instance.capsule)
    request = encode_request("echo", "", "", [("X", "BOOL", (1, 4), bytes([0, 1, 2, 255]))])
    answer = await asyncio.wait_for(mailbox.submit(serving.scheduler, request), TIMEOUT_S)
    assert bytes(decode_response(answer)[3][0][3]) == bytes([0, 1, 1, 1])


@pytest.mark.parametrize("max_batch_size", [0, 4])
async def test_empty_tensors_are_there_and_absent_ones_are_not(
    mailbox: Mailbox, serve: Serve, max_batch_size: int
) -> None:
    seen: list[tuple[bool, bool]] = []

    def run(given: Tensor, answer: Tensor) -> str:
        both = ctypes.cast(ctypes.pointer(given), ctypes.POINTER(Tensor))
        seen.append((both[0].data is not None, both[1].data is not None))
        return echo(given, answer)

    instance = Instance(run)
    serving = serve(make_spec(max_batch_size=max_batch_size, optional=True), instance.capsule)
    shape = (1, 0) if max_batch_size else (0,)
    for more in ([], [("MORE", "FP32", shape, b"")]):
        request = encode_request("echo", "", "", [("X", "FP32", shape, b""), *more])
        answer = await asyncio.wait_for(mailbox.submit(serving.scheduler, request), TIMEOUT_S)
        assert tuple(decode_response(answer)[3][0][2]) == shape
    assert seen == [(True, False), (True, True)]


async def test_a_busy_interpreter_holds_nothing_up(mailbox: Mailbox, serve: Serve) -> None:
    """The thread serves while another holds the interpreter lock and never gives it up."""
    instance = Echo(1, 0)
    serving = serve(make_spec(), instance.capsule)
    await asyncio.wait_for(mailbox.submit(serving.scheduler, message(0.0)), TIMEOUT_S)
    future = mailbox.submit(serving.scheduler, message(1.0))
    hold = ctypes.PyDLL(None).usleep  # PyDLL calls keep the lock
    hold(200_000)
    assert serving.scheduler.in_flight == 0
    assert values_of(await asyncio.wait_for(future, TIMEOUT_S)) == [1.0]


def test_what_is_no_compiled_instance_is_refused() -> None:
    scheduler, instance = Scheduler(make_spec()), Instance(echo, abi=7)
    with pytest.raises(ValueError, match="PyCapsule"):
        serve_compiled(Batch(scheduler), object())
    with pytest.raises(ValueError, match="a compiled instance of ABI 7"):
        serve_compiled(Batch(scheduler), instance.capsule)


def test_a_closed_scheduler_ends_the_loop() -> None:
    scheduler = Scheduler(make_spec())
    scheduler.close()
    instance = Echo(1, 0)
    assert serve_compiled(Batch(scheduler), instance.capsule) is None


async def test_answers_equal_those_of_the_python_way(mailbox: Mailbox, serve: Serve) -> None:
    rng = np.random.default_rng(7)
    instance = Echo(1, 0)
    serving = serve(make_spec(DataType.FP64), instance.capsule)
    given = [rng.standard_normal((1 + k % 3, k % 4)) for k in range(50)]
    futures = [
        mailbox.submit(serving.scheduler, encode_request("echo", "", "", [("X", "FP64", a.shape, a.tobytes())]))
        for a in given
    ]
    for array, answer in zip(given, await asyncio.wait_for(asyncio.gather(*futures), TIMEOUT_S), strict=True):
        name, datatype, shape, data = decode_response(answer)[3][0]
        assert (name, datatype, tuple(shape)) == ("Y", "FP64", array.shape)
        np.testing.assert_array_equal(np.frombuffer(data, np.float64).reshape(array.shape), array)


@pytest.mark.parametrize("max_batch_size", [0, 4])
async def test_an_empty_output_needs_no_memory(mailbox: Mailbox, serve: Serve, max_batch_size: int) -> None:
    """A detector that finds nothing: ONNX Runtime gives no address then."""

    def run(given: Tensor, answer: Tensor) -> str:
        echo(given, answer)
        answer.data, answer.size = None, 0
        answer.dims[answer.n_dims - 1] = 0
        return ""

    instance = Instance(run)
    serving = serve(make_spec(max_batch_size=max_batch_size), instance.capsule)
    shape = (2, 3) if max_batch_size else (3,)
    request = encode_request("echo", "", "", [("X", "FP32", shape, bytes(4 * int(np.prod(shape))))])
    answer = await asyncio.wait_for(mailbox.submit(serving.scheduler, request), TIMEOUT_S)
    name, _, given_shape, data = decode_response(answer)[3][0]
    assert (name, tuple(given_shape), len(data)) == ("Y", (*shape[:-1], 0), 0)
