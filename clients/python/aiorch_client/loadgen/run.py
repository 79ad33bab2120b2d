"""Runs a ``LoadPlan`` over grpc.aio with raw bytes both ways."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable
from contextlib import AsyncExitStack

import numpy as np

from aiorch_client.loadgen.arrivals import schedule_arrivals
from aiorch_client.loadgen.link import Link
from aiorch_client.loadgen.plan import LoadPlan
from aiorch_client.loadgen.result import LOST, WRONG_ANSWER, LoadResult
from aiorch_client.loadgen.sequences import Sequence, SequenceIds

#: Called about five times a second with the part of the run that is over (0..1) and the number of answers so far.
Progress = Callable[[float, int], None]

_NS_PER_S = 1_000_000_000
# The event loop's timers have milliseconds; the last stretch before a due time is spent yielding instead.
_COARSE_NS = 2_000_000
_PROGRESS_S = 0.2


class TargetUnreachable(ConnectionError):
    """No connection to the target within ``connect_timeout_s``."""


def run_load(plan: LoadPlan, on_progress: Progress | None = None) -> LoadResult:
    """Runs ``plan`` in an event loop of its own and gives the raw times; see ``drive_load``."""
    return asyncio.run(drive_load(plan, on_progress))


async def drive_load(plan: LoadPlan, on_progress: Progress | None = None) -> LoadResult:
    """Runs ``plan`` in the current event loop; cancelling it cancels every request under way.

    Latency of an open loop counts from the time a request was due, not from when it left, so a stalled server (or a
    generator that is too slow: see ``send_lag_us``) shows in the figures of all requests that it held up. Raises
    TargetUnreachable before the first request; failures of requests are counted, not raised.
    """
    async with AsyncExitStack() as stack:
        links = [await stack.enter_async_context(Link(plan)) for _ in range(plan.channels)]
        await _connect_all(plan, links)
        run = _Run(plan, links)
        async with asyncio.TaskGroup() as group:
            ticker = group.create_task(run.report(on_progress)) if on_progress else None
            await run.offer()
            if ticker is not None:
                ticker.cancel()
        return run.finish()


async def _connect_all(plan: LoadPlan, links: list[Link]) -> None:
    try:
        async with asyncio.timeout(plan.connect_timeout_s):
            await asyncio.gather(*(link.connect() for link in links))
    except TimeoutError:
        raise TargetUnreachable(
            f"no connection to '{plan.target}' within {plan.connect_timeout_s:g} s; is a server listening there?"
        ) from None


class _Run:
    """Times and codes of one run; a request's slot is its place in the order of due times."""

    def __init__(self, plan: LoadPlan, links: list[Link]) -> None:
        self._plan = plan
        self._links = links
        self._gone: set[Link] = set()
        self._ids = SequenceIds()
        self._scheduled_ns, self._sent_ns, self._answered_ns = array("q"), array("q"), array("q")
        self._codes = array("h")
        self._answers = 0
        self._is_cut_short = False
        self._end_ns = int(plan.total_s * _NS_PER_S)
        self._start_ns = time.perf_counter_ns()

    async def offer(self) -> None:
        """Sends the plan's requests and returns when the last is answered."""
        plan = self._plan
        if plan.due_ns is not None:
            await self._send_when_due([due for due in plan.due_ns if due < self._end_ns])
        elif plan.rate is None:
            async with asyncio.TaskGroup() as group:
                for link in self._links * plan.streams:
                    group.create_task(self._send_in_turn(link))
        else:
            due_ns = schedule_arrivals(
                plan.arrival,
                plan.rate,
                plan.total_s,
                burst_on_s=plan.burst_on_s,
                burst_off_s=plan.burst_off_s,
                seed=plan.seed,
            )
            await self._send_when_due(due_ns.tolist())

    async def report(self, on_progress: Progress) -> None:
        """Tells how far the run is, until cancelled."""
        while True:
            on_progress(min(1.0, self._now_ns() / self._end_ns), self._answers)
            await asyncio.sleep(_PROGRESS_S)

    def finish(self) -> LoadResult:
        """The result; the arrays are views on this run's memory."""
        return LoadResult(
            plan=self._plan.to_dict(),
            scheduled_ns=np.frombuffer(self._scheduled_ns, dtype=np.int64),
            sent_ns=np.frombuffer(self._sent_ns, dtype=np.int64),
            answered_ns=np.frombuffer(self._answered_ns, dtype=np.int64),
            codes=np.frombuffer(self._codes, dtype=np.int16),
            window_start_ns=int(self._plan.warm_up_s * _NS_PER_S),
            window_end_ns=self._end_ns,
            is_cut_short=self._is_cut_short,
            is_target_gone=len(self._gone) == len(self._links),
        )

    def _now_ns(self) -> int:
        return time.perf_counter_ns() - self._start_ns

    async def _send_in_turn(self, link: Link) -> None:
        sequence = self._begin_sequence()
        while (now_ns := self._now_ns()) < self._end_ns and link not in self._gone:
            if len(self._codes) >= self._plan.max_requests:
                self._is_cut_short = True
                break
            slot = self._open_slot(now_ns)
            await self._send(link, slot, sequence=sequence)
            if sequence is not None and (sequence.is_over or self._codes[slot]):
                sequence = self._begin_sequence()
        if sequence is not None and sequence.is_open and link not in self._gone:
            await link.send(sequence.take(self._plan.requests[0], is_last=True))  # or it would keep its place for long

    def _begin_sequence(self) -> Sequence | None:
        length = self._plan.sequence_length
        return Sequence(self._ids.take(), length) if length else None

    async def _send_when_due(self, due_ns: list[int]) -> None:
        places = asyncio.Semaphore(self._plan.max_in_flight)
        async with asyncio.TaskGroup() as group:
            for number, due in enumerate(due_ns):
                await self._sleep_until(due)
                await places.acquire()
                if len(self._gone) == len(self._links):
                    return
                link = self._links[number % len(self._links)]
                group.create_task(self._send(link, self._open_slot(due), places))

    async def _sleep_until(self, due_ns: int) -> None:
        # Yields at least once: a generator that has fallen behind must still read answers.
        await asyncio.sleep(max(0, due_ns - self._now_ns() - _COARSE_NS) / _NS_PER_S)
        while self._now_ns() < due_ns:  # noqa: ASYNC110 - time is what is waited for
            await asyncio.sleep(0)

    def _open_slot(self, due_ns: int) -> int:
        self._scheduled_ns.append(due_ns)
        self._sent_ns.append(0)
        self._answered_ns.append(0)
        self._codes.append(0)
        return len(self._codes) - 1

    async def _send(
        self, link: Link, slot: int, places: asyncio.Semaphore | None = None, sequence: Sequence | None = None
    ) -> None:
        plan = self._plan
        index = slot % len(plan.requests)
        request = plan.requests[index] if sequence is None else sequence.take(plan.requests[index])
        self._sent_ns[slot] = self._now_ns()
        try:
            code, response = await link.send(request)
            self._answered_ns[slot] = self._now_ns()
            if code == 0 and plan.check is not None and not plan.check(index, response):
                code = WRONG_ANSWER
            self._codes[slot] = code
            if code == LOST and not await link.returns():
                self._gone.add(link)
        finally:
            if places is not None:
                places.release()
        self._answers += 1
