"""One request to an ensemble with decoupled steps: each answer of such a step runs what is behind it once.

Answers are under way side by side, and leave in the order in which the decoupled step gave them. A decoupled step that
is behind another one begins when all answers before its own have left: so whoever holds a step's place, or a model's
instance, waits for what is behind it and for the client, and for nobody beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Generic

from aiorch_server.errors import AiorchError, DeadlineExpired, StreamStalled
from aiorch_server.execution.response_channel import MAX_WAITING_BYTES
from aiorch_server.execution.submission import count_bytes
from aiorch_server.execution.taker import Taker
from aiorch_server.scheduling.ensemble_graph import Step
from aiorch_server.scheduling.ensemble_run import Held, Run
from aiorch_server.types import FINAL_RESPONSE, InferenceResponse

if TYPE_CHECKING:
    from aiorch_server.scheduling.ensemble import EnsembleScheduler, StepHost

#: Answers of one decoupled step that are under way at a time where ``max_inflight_requests`` says nothing.
DEFAULT_IN_FLIGHT: Final = 16
_LONG_S: Final = 3600.0


class EnsembleStream(Generic[Held]):
    """Runs on a task of its own (``conduct``) beside whoever follows (``follow``), on one event loop."""

    def __init__(self, ensemble: EnsembleScheduler, host: StepHost[Held], taker: Taker, limit: int) -> None:
        self._ensemble = ensemble
        self._host = host
        self._taker = taker
        self._limit = limit or DEFAULT_IN_FLIGHT
        self._outbox = _Outbox()
        self._n_given = 0
        self._began_ns = self._last_ns = time.monotonic_ns()

    async def conduct(self, run: Run[Held]) -> None:
        """Runs everything; raises what ends the stream, after the answers that came before it were taken."""
        await self._run_stage(run, 0, None)
        if not self._outbox.is_over:
            self._ensemble.responses.add_empty(self._n_given, time.monotonic_ns() - self._last_ns)

    def close(self) -> None:
        """Nothing comes any more."""
        self._outbox.close()

    def follow(self) -> AsyncGenerator[InferenceResponse, None]:
        """The answers, until it is closed; the next one is not given before somebody asks for it."""
        return self._outbox.follow()

    async def _run_stage(self, run: Run[Held], depth: int, before: asyncio.Task[None] | None) -> None:
        stages = run.plan.stages
        await self._ensemble.run_steps(run, stages[depth], self._host)
        if before is not None:
            await asyncio.wait((before,))
        if depth + 1 == len(stages):
            answer = self._ensemble.make_answer(run)
            await self._give(replace(answer, parameters={FINAL_RESPONSE: True}) if run.is_last else answer)
            return
        opener = stages[depth + 1].opener
        assert opener is not None
        await self._open(run, opener, depth + 1)

    async def _open(self, run: Run[Held], opener: Step, depth: int) -> None:
        """Runs a decoupled step and, for each of its answers, the stage behind it."""
        room = _Room(self._limit, self._taker)
        error: AiorchError | None = None
        last: asyncio.Task[None] | None = None
        try:
            async with asyncio.TaskGroup() as branches:
                try:
                    async with self._ask(run, opener) as answers:
                        await room.wait()
                        async for answer in answers:
                            is_final = bool(answer.parameters.get(FINAL_RESPONSE))
                            if is_final and not answer.outputs and answer.error is None:
                                continue
                            n_bytes = sum(count_bytes(tensor.data or b"") for tensor in answer.outputs)
                            await room.wait(n_bytes)
                            branch = run.branch(is_last=is_final)
                            last = branches.create_task(self._follow_answer(branch, opener, answer, depth, last))
                            room.enter(last, n_bytes)
                            await room.wait()
                except (DeadlineExpired, StreamStalled):
                    raise
                except AiorchError as failed:  # what came before it is still delivered
                    error = self._ensemble.name_step(failed, str(opener))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        if error is not None:
            raise error

    @contextlib.asynccontextmanager
    async def _ask(self, run: Run[Held], step: Step) -> AsyncIterator[AsyncIterator[InferenceResponse]]:
        request, servable = run.make_request(step), run.leases[step.model]
        async with self._ensemble.placed(run, step):
            answers = self._host.stream_on(
                servable, request, self._taker, deadline_ns=run.deadline_ns, leases=run.leases
            )
            async with contextlib.aclosing(answers):
                yield answers

    async def _follow_answer(
        self, run: Run[Held], opener: Step, answer: InferenceResponse, depth: int, before: asyncio.Task[None] | None
    ) -> None:
        try:
            try:
                if answer.error is not None:
                    raise answer.error
                run.take(opener, answer.outputs)
            except AiorchError as failed:
                raise self._ensemble.name_step(failed, str(opener)) from failed
            await self._run_stage(run, depth, before)
        except (DeadlineExpired, StreamStalled):
            raise
        except AiorchError as error:  # of this one answer: the others go on
            if before is not None:
                await asyncio.wait((before,))
            await self._give(InferenceResponse("", "", (), error=error))

    async def _give(self, answer: InferenceResponse) -> None:
        counts, index, last_ns, started_ns = self._ensemble.responses, self._n_given, self._last_ns, time.monotonic_ns()
        try:
            await self._outbox.give(answer)
        except asyncio.CancelledError:
            counts.add_cancelled(index, time.monotonic_ns() - last_ns)
            raise
        self._last_ns = time.monotonic_ns()
        self._n_given += 1
        if answer.error is not None:
            counts.add_failure(index, self._last_ns - last_ns)
            return
        counts.add_success(index, started_ns - last_ns, self._last_ns - started_ns)
        if index == 0:
            counts.add_first(started_ns - self._began_ns)


class _Room:
    """The answers of one decoupled step that are under way: bounded in number and in bytes, but one always has room."""

    def __init__(self, limit: int, taker: Taker) -> None:
        self._limit = limit
        self._taker = taker
        self._n_inside = self._n_bytes = 0
        self._changed = asyncio.Event()

    def enter(self, branch: asyncio.Task[None], n_bytes: int) -> None:
        """One more, until ``branch`` is done."""
        self._n_inside += 1
        self._n_bytes += n_bytes
        branch.add_done_callback(lambda _: self._leave(n_bytes))

    def _leave(self, n_bytes: int) -> None:
        self._n_inside -= 1
        self._n_bytes -= n_bytes
        self._changed.set()

    async def wait(self, n_bytes: int = 0) -> None:
        """Until there is room for one of that size; StreamStalled if the client lets it wait for too long."""
        since_s = time.monotonic()
        while self._n_inside and (self._n_inside >= self._limit or self._n_bytes + n_bytes > MAX_WAITING_BYTES):
            left_s = self._taker.left_s(since_s, inside_s=math.inf)
            if left_s <= 0:
                raise self._taker.lose()
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, self._taker.patience_s, _LONG_S)):
                    await self._changed.wait()
                    since_s = time.monotonic()


class _Outbox:
    """One answer at a time, from whichever task has the turn to whoever follows."""

    def __init__(self) -> None:
        self._answer: InferenceResponse | None = None
        self._is_closed = False
        self.is_over = False  # the last one was given
        self._given = asyncio.Event()
        self._taken = asyncio.Event()

    async def give(self, answer: InferenceResponse) -> None:
        """Returns once it was taken, and the next one is asked for."""
        self._taken.clear()
        self._answer = answer
        self.is_over = bool(answer.parameters.get(FINAL_RESPONSE))
        self._given.set()
        await self._taken.wait()

    def close(self) -> None:
        """Nothing is given any more."""
        self._is_closed = True
        self._given.set()

    async def follow(self) -> AsyncGenerator[InferenceResponse, None]:
        """What is given, until it is closed."""
        while True:
            await self._given.wait()
            answer, self._answer = self._answer, None
            if answer is not None:
                if not self._is_closed:
                    self._given.clear()
                yield answer
                self._taken.set()
            elif self._is_closed:
                return
