"""The response cache: keys, the bounded memory against a plain model of it, and equal requests under way together."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.cache import (
    EntryUnusable,
    GuardedCache,
    LocalCache,
    ResponseCache,
    VersionCache,
    open_cache,
    version,
)
from aiorch_server.cache.answers import hash_request, hash_version, pack_answer, seal, unpack_answer, unseal
from aiorch_server.cache.guard import MOST_PENDING, MOST_PENDING_BYTES
from aiorch_server.cache.local import ENTRY_BYTES
from aiorch_server.config.batching import DynamicBatching
from aiorch_server.config.server import CacheConfig
from aiorch_server.errors import DeadlineExpired, InvalidSettings, ModelExecutionError, QueueFull, QueueTimeout
from aiorch_server.scheduling import find_queue_timeout_us
from aiorch_server.types import (
    InferenceRequest,
    InferenceResponse,
    ModelStatistics,
    RequestedOutput,
    SequencePlace,
    Tensor,
)

NO_SEQUENCE = SequencePlace()


def ask(data: bytes = b"\0\0\0\0", id: str = "", **options: Any) -> InferenceRequest:
    return InferenceRequest("m", "", [Tensor("X", "FP32", (1, len(data) // 4), data)], id=id, **options)


def answer(data: bytes = b"\1\2\3\4", id: str = "") -> InferenceResponse:
    return InferenceResponse("m", "1", [Tensor("Y", "FP32", (1, 1), data)], id, {"p": 1})


def make(cache: ResponseCache | None = None, **options: Any) -> VersionCache:
    return VersionCache(cache or LocalCache(size_bytes=1 << 16), "m", 1, identity="f", config={}, **options)


KEY = hash_version("m", 1, "f", {})


@pytest.mark.parametrize(
    "other",
    [
        ask(b"\0\0\0\1"),
        ask(b"\0" * 8),
        dataclasses.replace(ask(), inputs=[Tensor("X", "INT32", (1, 1), b"\0" * 4)]),
        dataclasses.replace(ask(), inputs=[Tensor("Z", "FP32", (1, 1), b"\0" * 4)]),
        dataclasses.replace(ask(), inputs=[Tensor("X", "FP32", (1, 1, 1), b"\0" * 4)]),
        dataclasses.replace(ask(), inputs=[*ask().inputs, Tensor("Z", "FP32", (0,), b"")]),
        ask(parameters={"a": 1}),
        ask(parameters={"a": True}),
        ask(parameters={"a": "1"}),
        ask(parameters={"\udc80": "1"}),
        ask(outputs=[RequestedOutput("Y")]),
    ],
)
def test_what_differs_has_another_key(other: InferenceRequest) -> None:
    assert hash_request(KEY, ask(), NO_SEQUENCE) != hash_request(KEY, other, NO_SEQUENCE)


def test_versions_and_sequences_have_other_keys() -> None:
    keys = {
        hash_version(*each) for each in [("m", 1, "f", {}), ("m", 2, "f", {}), ("n", 1, "f", {}), ("m", 1, "g", {})]
    }
    assert len({*keys, hash_version("m", 1, "f", {"max_batch_size": 1})}) == 5
    assert hash_request(KEY, ask(), SequencePlace(7)) != hash_request(KEY, ask(), NO_SEQUENCE)


def test_what_is_asked_alike_has_one_key() -> None:
    two = [Tensor("A", "BYTES", (1,), b"\1\0\0\0a"), Tensor("B", "UINT8", (1,), memoryview(b"b"))]
    one, other = (dataclasses.replace(ask(), inputs=each) for each in (two, two[::-1]))
    assert hash_request(KEY, one, NO_SEQUENCE) == hash_request(KEY, other, NO_SEQUENCE)
    other = ask(id="q", parameters={"priority": 2, "timeout": 3})
    assert hash_request(KEY, ask(), NO_SEQUENCE) == hash_request(KEY, other, NO_SEQUENCE)


def test_all_outputs_by_name_are_those_of_no_name() -> None:
    def key(*names: str) -> bytes:
        request = ask(outputs=[RequestedOutput(name) for name in names])
        return hash_request(KEY, request, NO_SEQUENCE, ("Y", "Z"))

    assert key() == key("Y", "Z") == key("Z", "Y") == key("Z", "Y", "Z")
    assert len({key(), key("Y"), key("Z")}) == 3


def test_an_entry_is_opened_with_its_own_key_only() -> None:
    sealed = seal(b"key", b"value")
    assert unseal(b"key", sealed) == b"value"
    wrong = [b"", sealed[:-1], sealed + b"x", sealed[1:], b"x" + sealed, sealed[:10], sealed.replace(b"val", b"lav")]
    for key, entry in [(b"kez", sealed), *((b"key", each) for each in wrong)]:
        with pytest.raises(EntryUnusable):
            unseal(key, entry)


def test_bytes_do_not_slide_from_one_tensor_into_the_next() -> None:
    def split(at: int) -> InferenceRequest:
        data = b"abcdef"
        inputs = [Tensor("A", "BYTES", (1,), data[:at]), Tensor("B", "BYTES", (1,), data[at:])]
        return dataclasses.replace(ask(), inputs=inputs)

    assert len({hash_request(KEY, split(at), NO_SEQUENCE) for at in range(7)}) == 7


def test_answers_come_back_as_they_were() -> None:
    whole = InferenceResponse(
        "m",
        "1",
        [*answer().outputs, Tensor("E", "BYTES", (0, 3), b""), Tensor("B", "UINT8", (2,), b"xy")],
        "i",
        {"p": 1.5},
    )
    found = unpack_answer(pack_answer(whole), "m", "1", "other")
    assert (found.id, found.parameters) == ("other", {"p": 1.5})
    for one, same in zip(whole.outputs, found.outputs, strict=True):
        assert (one.name, one.datatype, one.shape, bytes(one.data or b"")) == (
            same.name, same.datatype, same.shape, bytes(same.data or b""),
        )  # fmt: skip
    with pytest.raises(ValueError):
        unpack_answer(pack_answer(whole)[:-1], "m", "1", "")


@given(
    st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 900)), st.integers(0, 3)), max_size=60)
)
async def test_the_memory_is_a_plain_bounded_table(steps: list[tuple[int, int | None, int]]) -> None:
    """Against a list in order of use: (key, size to put or None to get, seconds that pass)."""
    now, limit, ttl_s = [0.0], 4 * ENTRY_BYTES, 5.0
    cache = LocalCache(size_bytes=limit, ttl_s=ttl_s, clock=lambda: now[0])
    model: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()

    def used() -> int:
        return sum(len(key) + len(value) + ENTRY_BYTES for key, (value, _) in model.items())

    for number, size, passed in steps:
        now[0] += passed
        key = bytes([number])
        if size is None:
            if key in model and now[0] >= model[key][1]:
                del model[key]
            assert await cache.get(key) == model.get(key, (None,))[0]
            if key in model:
                model.move_to_end(key)
        else:
            value = bytes(size)
            await cache.put(key, value)
            model.pop(key, None)
            if 1 + size + ENTRY_BYTES <= limit:
                model[key] = (value, now[0] + ttl_s)
                while used() > limit:
                    model.popitem(last=False)
        assert (cache.read_use().entries, cache.read_use().used_bytes) == (len(model), used())
        assert cache.read_use().used_bytes <= limit


class Runs:
    """Executions that the test ends one by one."""

    def __init__(self) -> None:
        self.open: list[asyncio.Future[InferenceResponse]] = []

    def __call__(self) -> Awaitable[InferenceResponse]:
        self.open.append(asyncio.get_running_loop().create_future())
        return self.open[-1]


async def reach(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


def start(
    cache: VersionCache, run: Runs, id: str, deadline_ns: int = 0, *, is_called: bool = False
) -> asyncio.Task[InferenceResponse]:
    async def run_this() -> InferenceResponse:
        return dataclasses.replace(await run(), id=id)

    return asyncio.ensure_future(
        cache.infer(ask(id=id), NO_SEQUENCE, run_this, deadline_ns=deadline_ns, is_called=is_called)
    )


async def start_many(cache: VersionCache, run: Runs, count: int) -> list[asyncio.Task[InferenceResponse]]:
    first = start(cache, run, "0")
    await reach(lambda: len(run.open) == 1)
    others = [start(cache, run, str(index)) for index in range(1, count)]
    await reach(lambda: cache._waiting == count - 1)
    return [first, *others]


async def test_equal_requests_run_once() -> None:
    cache, run = make(), Runs()
    tasks = await start_many(cache, run, 5)
    run.open[0].set_result(answer(id="0"))
    found = await asyncio.gather(*tasks, start(cache, run, "later"))
    assert [each.id for each in found] == ["0", "1", "2", "3", "4", "later"]
    assert {bytes(each.outputs[0].data or b"") for each in found} == {b"\1\2\3\4"}
    assert all(memoryview(each.outputs[0].data or b"").readonly for each in found)
    counts = cache.add_to(ModelStatistics("m", "1"))
    assert (len(run.open), counts.cache_hit.count, counts.cache_miss.count) == (1, 5, 1)
    assert (counts.success.count, counts.queue.count, counts.inference_count, counts.execution_count) == (5, 5, 0, 0)


async def test_the_first_one_given_up_harms_no_other() -> None:
    cache, run = make(), Runs()
    first, *others = await start_many(cache, run, 4)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await reach(lambda: len(run.open) == 2)
    assert cache._waiting == 2  # one of them runs now
    run.open[1].set_result(answer())
    assert [each.id for each in await asyncio.gather(*others)] == ["1", "2", "3"]
    assert not cache._running
    assert len(run.open) == 2


async def test_a_waiting_one_given_up_harms_no_other() -> None:
    cache, run = make(), Runs()
    first, second, third = await start_many(cache, run, 3)
    second.cancel()
    await reach(second.done)
    run.open[0].set_result(answer())
    assert [each.id for each in await asyncio.gather(first, third)] == ["0", "2"]
    assert cache.add_to(ModelStatistics("m", "1")).failures["CANCELED"] == 1


async def test_failures_are_nobody_elses_and_are_not_kept() -> None:
    cache, run = make(), Runs()
    tasks = await start_many(cache, run, 3)
    run.open[0].set_exception(ModelExecutionError("first"))
    await reach(lambda: len(run.open) == 3)
    run.open[1].set_result(answer())
    run.open[2].set_exception(ModelExecutionError("third"))
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(each) if isinstance(each, Exception) else "ok" for each in found] == ["first", "ok", "third"]
    again = start(cache, run, "again")
    await reach(lambda: len(run.open) == 4)
    run.open[3].set_result(answer())
    assert (await again).id == "again"


async def test_who_is_called_by_a_model_waits_for_no_other() -> None:
    """The other one may be the request that its own caller answers."""
    cache, run = make(), Runs()
    first = start(cache, run, "0")
    await reach(lambda: len(run.open) == 1)
    called = start(cache, run, "1", is_called=True)
    await reach(lambda: len(run.open) == 2)
    run.open[1].set_result(answer())
    assert (await called).id == "1"
    assert not first.done()
    run.open[0].set_result(answer())
    assert (await first).id == "0"


async def test_each_waits_to_its_own_deadline() -> None:
    cache, run = make(), Runs()
    now_ns = int(asyncio.get_running_loop().time() * 1e9)
    tasks = await start_many(cache, run, 2)
    with pytest.raises(DeadlineExpired):
        await start(cache, run, "late", now_ns + 1_000_000)
    assert not any(task.done() for task in tasks)
    run.open[0].set_result(answer())
    await asyncio.gather(*tasks)
    assert cache.add_to(ModelStatistics("m", "1")).failures["REJECTED"] == 1


async def test_each_waits_as_long_as_it_may_be_queued() -> None:
    cache, run = make(), Runs()
    tasks = await start_many(cache, run, 2)
    with pytest.raises(QueueTimeout, match="Request timeout expired"):
        await cache.infer(ask(id="late"), NO_SEQUENCE, run, find_timeout_us=lambda: 1000)
    now_ns = int(asyncio.get_running_loop().time() * 1e9)
    with pytest.raises(DeadlineExpired):  # whichever is first
        await cache.infer(
            ask(id="late"), NO_SEQUENCE, run, deadline_ns=now_ns + 1000, find_timeout_us=lambda: 60_000_000
        )
    assert not any(task.done() for task in tasks)
    run.open[0].set_result(answer())
    await asyncio.gather(*tasks)
    assert cache.add_to(ModelStatistics("m", "1")).failures["REJECTED"] == 2


@pytest.mark.parametrize(
    ("batching", "priority", "timeout_us", "found"),
    [
        (None, 0, 5, 0),
        ({}, 0, 5, 0),
        ({"default_queue_policy": {"allow_timeout_override": True}}, 0, 5, 5),
        ({"default_queue_policy": {"default_timeout_microseconds": 7}}, 0, 5, 7),
        ({"default_queue_policy": {"default_timeout_microseconds": 7, "allow_timeout_override": True}}, 0, 9, 7),
        ({"default_queue_policy": {"default_timeout_microseconds": 7, "timeout_action": "DELAY"}}, 0, 0, 0),
        (
            {
                "priority_levels": 2,
                "default_priority_level": 2,
                "default_queue_policy": {"default_timeout_microseconds": 7},
                "priority_queue_policy": {2: {"default_timeout_microseconds": 3}},
            },
            0,
            0,
            3,
        ),
    ],
)
def test_how_long_a_request_may_be_queued(batching: Any, priority: int, timeout_us: int, found: int) -> None:
    section = None if batching is None else DynamicBatching.model_validate(batching)
    assert find_queue_timeout_us(section, priority, timeout_us) == found


async def test_a_first_one_out_of_time_is_given_up() -> None:
    """Its deadline is not that of the one that waits, which runs then."""
    cache, run = make(), Runs()
    now_ns = int(asyncio.get_running_loop().time() * 1e9)
    first = start(cache, run, "0", now_ns + 1)
    await reach(lambda: len(run.open) == 1)
    second = start(cache, run, "1")
    third = start(cache, run, "2")
    await reach(lambda: cache._waiting == 2)
    run.open[0].set_exception(DeadlineExpired("Deadline Exceeded"))
    await reach(lambda: len(run.open) == 2)
    assert cache._waiting == 1
    run.open[1].set_result(answer())
    assert [each.id for each in await asyncio.gather(second, third)] == ["1", "2"]
    with pytest.raises(DeadlineExpired):
        await first


async def test_those_that_wait_are_bounded() -> None:
    cache, run = make(max_waiting=1), Runs()
    tasks = await start_many(cache, run, 2)
    with pytest.raises(QueueFull, match="Exceeds maximum queue size"):
        await start(cache, run, "more")
    run.open[0].set_result(answer())
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("size", [4, 1 << 21])
async def test_large_answers_are_packed_beside_the_event_loop(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def pack(response: InferenceResponse) -> bytes:
        threads.append(threading.get_ident())
        return pack_answer(response)

    monkeypatch.setattr(version, "pack_answer", pack)
    cache, run = make(LocalCache(size_bytes=1 << 22)), Runs()
    first = start(cache, run, "0")
    await reach(lambda: len(run.open) == 1)
    run.open[0].set_result(answer(bytes(size)))
    assert (await first).id == "0"
    assert (await start(cache, run, "1")).outputs[0].data == bytes(size)
    assert len(run.open) == 1
    assert [thread == threading.get_ident() for thread in threads] == [size == 4]


class BrokenCache(ResponseCache):
    def __init__(self, *, size_bytes: int, ttl_s: float) -> None:
        self.calls = 0

    async def get(self, key: bytes) -> bytes | None:
        self.calls += 1
        raise ConnectionError("gone")

    async def put(self, key: bytes, value: bytes) -> None:
        self.calls += 1
        raise ConnectionError("gone")


class GarbledCache(BrokenCache):
    async def get(self, key: bytes) -> bytes | None:
        return b"\xff" * 20


@pytest.mark.parametrize("kind", [BrokenCache, GarbledCache])
async def test_a_broken_cache_fails_no_request(kind: type[BrokenCache], caplog: pytest.LogCaptureFixture) -> None:
    guarded = GuardedCache(kind(size_bytes=1, ttl_s=0), "broken", timeout_s=1)
    cache, run = make(guarded), Runs()
    for index in range(3):
        task = start(cache, run, "i")
        await reach(lambda index=index: len(run.open) == index + 1)  # type: ignore[misc]
        run.open[-1].set_result(answer(id="i"))
        assert (await task).id == "i"
    assert len(caplog.records) == 1
    use = guarded.read_use()
    assert use.failures and use.entries is None


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("nowhere", "there is no cache 'nowhere'; known here: off, local, redis"),
        ("no_such_module:Cache", "cache 'no_such_module:Cache' cannot be used: ModuleNotFoundError"),
        ("builtins:dict", "it gives a dict, no ResponseCache"),
        ("builtins:object", "cache 'builtins:object' cannot be used: TypeError"),
    ],
)
def test_a_cache_that_cannot_be_had(kind: str, text: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        open_cache(CacheConfig(kind=kind))
    assert text in str(caught.value)


def test_caches_by_name() -> None:
    assert open_cache(CacheConfig()) is None
    assert isinstance(open_cache(CacheConfig(kind="local")), LocalCache)


class SlowCache(BrokenCache):
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.calls, self.checks, self.is_well = 0, 0, False

    async def get(self, key: bytes) -> bytes | None:
        self.calls += 1
        await asyncio.get_running_loop().create_future()
        return None

    async def check(self) -> None:
        self.checks += 1
        if not self.is_well:
            raise ConnectionError("not yet")


async def test_after_a_failure_no_request_waits_until_the_cache_is_well() -> None:
    cache = SlowCache()
    guarded = GuardedCache(cache, "slow", timeout_s=0.01, pause_s=0.01)
    assert await guarded.get(b"key") is None
    assert cache.calls == 1
    async with asyncio.timeout(10):
        while cache.checks < 2:
            assert await guarded.get(b"key") is None
            await asyncio.sleep(0.001)
    assert cache.calls == 1
    cache.is_well = True
    async with asyncio.timeout(10):
        while cache.calls == 1:
            assert await guarded.get(b"key") is None
            await asyncio.sleep(0.001)
    await guarded.close()


class FullCache(SlowCache):
    """Never done with an insertion."""

    async def put(self, key: bytes, value: bytes) -> None:
        self.calls += 1
        await asyncio.get_running_loop().create_future()


async def test_insertions_under_way_are_bounded_and_end_with_the_cache() -> None:
    cache = FullCache()
    guarded = GuardedCache(cache, "full", timeout_s=60)
    for number in range(3 * MOST_PENDING):
        await guarded.put(f"{number}".encode(), b"value")
        await guarded.put(f"{number}".encode(), b"value")
    await reach(lambda: cache.calls >= MOST_PENDING)
    assert len(guarded._pending) == cache.calls == MOST_PENDING
    assert await guarded.get(b"0") == b"value"
    guarded._timeout_s = 0.01
    await guarded.close()
    assert not guarded._pending and not guarded._tasks and not guarded._pending_bytes
    large = GuardedCache(FullCache(), "large", timeout_s=0.01)
    for number in range(3):
        await large.put(f"{number}".encode(), bytes(MOST_PENDING_BYTES // 2))
    assert len(large._pending) == 2
    await large.close()


class SealedRubbish(BrokenCache):
    """Whole entries of something else."""

    async def get(self, key: bytes) -> bytes | None:
        return seal(key, b"\x02\0\0\0\0\0\0\0[]")

    async def put(self, key: bytes, value: bytes) -> None:
        self.calls += 1


@pytest.mark.parametrize("parameter", [1, object()])
async def test_what_cannot_be_unpacked_or_packed_fails_no_request(parameter: Any) -> None:
    broken = SealedRubbish(size_bytes=1, ttl_s=0)
    cache, run = make(GuardedCache(broken, "other", timeout_s=1)), Runs()
    task = start(cache, run, "0")
    await reach(lambda: len(run.open) == 1)
    run.open[0].set_result(dataclasses.replace(answer(), parameters={"p": parameter}))
    assert (await task).id == "0"
    await reach(lambda: not cache._cache._pending)  # type: ignore[attr-defined]
    assert broken.calls == (parameter == 1)
