"""What one model version does with a cache: keys, look-ups, one execution for requests that are equal, and counts."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

from aiorch_server.cache.answers import hash_request, hash_steps, hash_version, pack_answer, unpack_answer
from aiorch_server.cache.base import ResponseCache
from aiorch_server.errors import DeadlineExpired, QueueFull
from aiorch_server.tracing import CacheHit, current_run
from aiorch_server.types import Duration, InferenceRequest, InferenceResponse, ModelStatistics, SequencePlace, Tensor

logger = logging.getLogger(__name__)

#: Hashed on the event loop up to here (about 0.2 ms), beyond on a thread.
_LARGEST_INLINE_BYTES: Final = 1 << 18
#: Copied on the event loop up to here (about 0.1 ms), beyond on a thread.
_LARGEST_INLINE_COPY_BYTES: Final = 1 << 20
#: How long a cache may take for one call.
_PATIENCE_S: Final = 1.0
_LOG_INTERVAL_S: Final = 10.0

#: How the request that others wait for ended: with an answer, failed (None), or given up by its caller.
_Outcome = InferenceResponse | None
_Run = Callable[[], Awaitable[InferenceResponse]]


class VersionCache:
    """Answers of one model version, from the cache where they are there; used on one event loop.

    Requests with equal keys that are under way together are run once: the first runs, the others wait for its answer,
    each with its own deadline. Should it be given up, one of them runs instead; should it fail, each runs by itself,
    because a failure is nobody's answer but its own. ``max_waiting`` bounds those that wait, over all keys. What a
    model calls waits for nobody: it may be needed for the very answer that it would wait for.
    """

    def __init__(
        self,
        cache: ResponseCache,
        name: str,
        version: int,
        *,
        fingerprint: str,
        config: Mapping[str, object],
        max_waiting: int = 16384,
    ) -> None:
        self._cache = cache
        self._name = name
        self._version = str(version)
        self._own_prefix = self._prefix = hash_version(name, version, fingerprint, config)
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
        self._logged_at = -_LOG_INTERVAL_S

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
    ) -> InferenceResponse:
        """The answer to a checked request, by ``run`` if there is none yet; raises what ``run`` raises.

        ``is_called`` says that a model sent it, while it answers requests of its own.
        Raises DeadlineExpired and QueueFull besides, where the request waits for another's answer.
        """
        started_ns = time.monotonic_ns()
        key = await self._hash(request, sequence)
        if is_called:
            own: asyncio.Future[_Outcome] = asyncio.get_running_loop().create_future()
            return await self._lead(key, request.id, own, run, started_ns, deadline_ns)
        while (running := self._running.get(key)) is not None:
            await self._wait(running, started_ns, deadline_ns)
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

    async def _wait(self, running: asyncio.Future[_Outcome], started_ns: int, deadline_ns: int) -> None:
        """Until the other one has ended; its end is not this one's."""
        if self._waiting >= self._max_waiting:
            self._count_failure("REJECTED", started_ns)
            raise QueueFull("Exceeds maximum queue size")
        self._waiting += 1
        timeout_s = max(0.0, deadline_ns / 1e9 - asyncio.get_running_loop().time()) if deadline_ns else None
        try:
            await asyncio.wait((running,), timeout=timeout_s)
        except asyncio.CancelledError:
            self._count_failure("CANCELED", started_ns)
            raise
        finally:
            self._waiting -= 1
        if not running.done():
            self._count_failure("REJECTED", started_ns)
            raise DeadlineExpired("Deadline Exceeded")

    async def _hash(self, request: InferenceRequest, sequence: SequencePlace) -> bytes:
        if _measure(request.inputs) <= _LARGEST_INLINE_BYTES:
            return hash_request(self._prefix, request, sequence)
        return await asyncio.to_thread(hash_request, self._prefix, request, sequence)

    async def _get(self, key: bytes, request_id: str) -> InferenceResponse | None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                packed = await self._cache.get(key)
            return None if packed is None else unpack_answer(packed, self._name, self._version, request_id)
        except Exception as error:
            self._tell("look-up", error)
            return None

    async def _put(self, key: bytes, answer: InferenceResponse) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                if _measure(answer.outputs) <= _LARGEST_INLINE_COPY_BYTES:
                    packed = pack_answer(answer)
                else:
                    packed = await asyncio.to_thread(pack_answer, answer)
                await self._cache.put(key, packed)
        except Exception as error:
            self._tell("insertion", error)

    def _tell(self, what: str, error: Exception) -> None:
        now = time.monotonic()
        if now - self._logged_at >= _LOG_INTERVAL_S:
            self._logged_at = now
            logger.warning("cache of '%s': a %s failed, the model runs instead", self._name, what, exc_info=error)

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
