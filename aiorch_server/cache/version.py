"""What one model version does with a cache: keys, look-ups, one execution for requests that are equal, and counts."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Final

from aiorch_server.cache.answers import hash_request, hash_steps, hash_version, pack_answer, unpack_answer
from aiorch_server.cache.base import ResponseCache
from aiorch_server.errors import DeadlineExpired, QueueFull, QueueTimeout
from aiorch_server.tracing import CacheHit, current_run
from aiorch_server.types import Duration, InferenceRequest, InferenceResponse, ModelStatistics, SequencePlace, Tensor

#: Hashed on the event loop up to here (about 0.2 ms), beyond on a thread.
_LARGEST_INLINE_BYTES: Final = 1 << 18
#: Copied on the event loop up to here (about 0.1 ms), beyond on a thread.
_LARGEST_INLINE_COPY_BYTES: Final = 1 << 20

#: How the request that others wait for ended: with an answer, failed (None), or given up by its caller.
_Outcome = InferenceResponse | None
_Run = Callable[[], Awaitable[InferenceResponse]]


class VersionCache:
    """Answers of one model version, from the cache where they are there; used on one event loop.

    Requests with equal keys that are under way together are run once: the first runs, the others wait for its answer,
    each with its own deadline. Should it be given up, one of them runs instead; should it fail, each runs by itself,
    because a failure is nobody's answer but its own. ``max_waiting`` bounds those that wait, over all keys. What a
    model calls waits for nobody: it may be needed for the very answer that it would wait for. ``cache`` is one that
    ``open_cache`` gives, which raises nothing; ``outputs`` are the names of all outputs that the version has.
    """

    def __init__(
        self,
        cache: ResponseCache,
        name: str,
        version: int,
        *,
        identity: str,
        config: Mapping[str, object],
        outputs: Collection[str] = (),
        max_waiting: int = 16384,
    ) -> None:
        self._cache = cache
        self._name = name
        self._version = str(version)
        self._outputs = tuple(outputs)
        self._own_prefix = self._prefix = hash_version(name, version, identity, config)
        self._max_waiting = max_waiting
        self._running: dict[bytes, asyncio.Future[_Outcome]] = {}
        self._waiting = 0
        self._hits = _Sum()
        self._misses = _Sum()
        self._success = _Sum()
        self._fail = _Sum()
        self._queue = _Sum()
        self._failures = {"REJECTED": 0, "CANCELED": 0}
        self._last_ms = 0

    def follow(self, steps: Iterable[bytes]) -> None:
        """From now on answers depend on ``steps``: what ``hash_version`` gives for each model of an ensemble."""
        self._prefix = hash_steps(self._own_prefix, steps)

    async def infer(
        self,
        request: InferenceRequest,
        sequence: SequencePlace,
        run: _Run,
        *,
        deadline_ns: int = 0,
        is_called: bool = False,
        find_timeout_us: Callable[[], int] = int,
    ) -> InferenceResponse:
        """The answer to a checked request, by ``run`` if there is none yet; raises what ``run`` raises.

        ``is_called`` says that a model sent it, while it answers requests of its own; ``find_timeout_us`` how long it
        may be queued, 0 for any time. Raises DeadlineExpired, QueueTimeout and QueueFull besides, where the request
        waits for another's answer.
        """
        started_ns = time.monotonic_ns()
        key = await self._hash(request, sequence)
        if is_called:
            own: asyncio.Future[_Outcome] = asyncio.get_running_loop().create_future()
            return await self._lead(key, request.id, own, run, started_ns, deadline_ns)
        while (running := self._running.get(key)) is not None:
            await self._wait(running, started_ns, deadline_ns, find_timeout_us())
            if running.cancelled():
                continue
            answer = running.result()
            if answer is None:
                return await run()
            self._count_hit(started_ns, time.monotonic_ns() - started_ns, is_shared=True)
            return dataclasses.replace(answer, id=request.id)
        running = self._running[key] = asyncio.get_running_loop().create_future()
        try:
            return await self._lead(key, request.id, running, run, started_ns, deadline_ns)
        finally:
            running.cancel()  # does nothing once there is an outcome
            del self._running[key]

    async def _lead(
        self,
        key: bytes,
        request_id: str,
        outcome: asyncio.Future[_Outcome],
        run: _Run,
        started_ns: int,
        deadline_ns: int,
    ) -> InferenceResponse:
        answer = await self._get(key, request_id)
        looked_ns = time.monotonic_ns() - started_ns
        if answer is not None:
            outcome.set_result(answer)
            self._count_hit(started_ns, looked_ns)
            return answer
        try:
            answer = await run()
        except Exception:
            # past the caller's own deadline it was given up; otherwise it failed
            if not deadline_ns or asyncio.get_running_loop().time() * 1e9 < deadline_ns:
                outcome.set_result(None)
            raise
        # Several callers share the bytes: none may change them.
        outputs = [
            dataclasses.replace(tensor, data=memoryview(tensor.data).toreadonly() if tensor.data else tensor.data)
            for tensor in answer.outputs
        ]
        answer = dataclasses.replace(answer, outputs=outputs)
        outcome.set_result(answer)
        put_ns = time.monotonic_ns()
        await self._put(key, answer)
        self._misses.add(looked_ns + time.monotonic_ns() - put_ns)
        return answer

    async def _wait(
        self, running: asyncio.Future[_Outcome], started_ns: int, deadline_ns: int, timeout_us: int
    ) -> None:
        """Until the other one has ended; its end is not this one's.

        It is a wait in line like the one in a queue, with the same bounds.
        """
        if self._waiting >= self._max_waiting:
            self._count_failure("REJECTED", started_ns)
            raise QueueFull("Exceeds maximum queue size")
        self._waiting += 1
        now = asyncio.get_running_loop().time()
        ends = [deadline_ns / 1e9 - now] if deadline_ns else []
        if timeout_us:
            ends.append(timeout_us / 1e6 - (time.monotonic_ns() - started_ns) / 1e9)
        timeout_s = max(0.0, min(ends)) if ends else None
        try:
            await asyncio.wait((running,), timeout=timeout_s)
        except asyncio.CancelledError:
            self._count_failure("CANCELED", started_ns)
            raise
        finally:
            self._waiting -= 1
        if not running.done():
            self._count_failure("REJECTED", started_ns)
            if deadline_ns and min(ends) == ends[0]:
                raise DeadlineExpired("Deadline Exceeded")
            raise QueueTimeout("Request timeout expired")

    async def _hash(self, request: InferenceRequest, sequence: SequencePlace) -> bytes:
        if _measure(request.inputs) <= _LARGEST_INLINE_BYTES:
            digest = hash_request(self._prefix, request, sequence, self._outputs)
        else:
            digest = await asyncio.to_thread(hash_request, self._prefix, request, sequence, self._outputs)
        # For people who look into a cache and want all that belongs to a model; the digest alone tells requests apart.
        return f"{self._name}:{self._version}:{digest.hex()}".encode()

    async def _get(self, key: bytes, request_id: str) -> InferenceResponse | None:
        packed = await self._cache.get(key)
        try:
            return None if packed is None else unpack_answer(packed, self._name, self._version, request_id)
        except (ValueError, TypeError):  # whole, but written by a server that packs otherwise
            return None

    async def _put(self, key: bytes, answer: InferenceResponse) -> None:
        try:
            if _measure(answer.outputs) <= _LARGEST_INLINE_COPY_BYTES:
                packed = pack_answer(answer)
            else:
                packed = await asyncio.to_thread(pack_answer, answer)
        except (ValueError, TypeError):  # a model's parameter of some other kind: the door will tell
            return
        await self._cache.put(key, packed)

    def _count_hit(self, started_ns: int, waited_ns: int, *, is_shared: bool = False) -> None:
        run = current_run.get()
        if run is not None:
            run.cached = CacheHit(started_ns, started_ns + waited_ns, is_shared)
        self._hits.add(waited_ns)
        self._queue.add(waited_ns)
        self._success.add(time.monotonic_ns() - started_ns)
        self._last_ms = int(time.time() * 1000)

    def _count_failure(self, reason: str, started_ns: int) -> None:
        self._failures[reason] += 1
        self._fail.add(time.monotonic_ns() - started_ns)

    def add_to(self, counts: ModelStatistics) -> ModelStatistics:
        """The version's statistics with what was answered here: in success, queue and the cache's own counts only."""
        return dataclasses.replace(
            counts,
            last_inference_ms=max(counts.last_inference_ms, self._last_ms),
            success=self._success.add_to(counts.success),
            fail=self._fail.add_to(counts.fail),
            queue=self._queue.add_to(counts.queue),
            failures={
                reason: counts.failures.get(reason, 0) + self._failures.get(reason, 0)
                for reason in {**counts.failures, **self._failures}
            },
            pending=counts.pending + self._waiting,
            has_cache=True,
            cache_hit=self._hits.add_to(Duration()),
            cache_miss=self._misses.add_to(Duration()),
        )


def _measure(tensors: Iterable[Tensor]) -> int:
    return sum(memoryview(tensor.data).nbytes for tensor in tensors if tensor.data)


@dataclasses.dataclass(slots=True)
class _Sum:
    """A count and a sum of nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def add_to(self, other: Duration) -> Duration:
        return Duration(other.count + self.count, other.ns + self.ns)
