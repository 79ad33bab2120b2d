"""Models that are loaded by the first request for them: many requests share one load, and one that fails is not
tried again in a storm.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from aiorch_server.errors import (
    AiorchError,
    CapacityError,
    DeadlineExpired,
    MemoryBudgetExceeded,
    ModelNotReady,
    QueueFull,
    ServerStopping,
)
from aiorch_server.lifecycle.model import STOPPING_TEXT, ManagedModel

#: After a load that failed, the next one comes so much later at the earliest, then twice that, and so on.
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
#: Where there was no room, it may be there at any time.
ROOM_PAUSE_S: Final = 0.25
#: Where nothing else is said; that of a queue.
DEFAULT_MAX_WAITING: Final = 16_384


@dataclass(frozen=True, slots=True)
class DemandTerms:
    """``is_serial``: one load at a time, so that two never hold a part of the room that each needs.

    ``max_waiting`` requests may wait for one model, each for ``patience_s`` at most.
    """

    is_serial: bool
    max_waiting: int
    patience_s: float


class Demand:
    """``load`` loads a model by name, ``start`` runs a coroutine in a task of the manager's; on the event loop."""

    def __init__(
        self,
        load: Callable[[str], Coroutine[Any, Any, None]],
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        terms: DemandTerms,
    ) -> None:
        self._load = load
        self._start = start
        self._terms = terms
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._line = asyncio.Lock()
        self._lined_up: set[str] = set()

    async def bring(self, model: ManagedModel, deadline_ns: int, *, is_called: bool = False) -> None:
        """Returns when a version of ``model`` is ready, which then stays until the caller awaits something else.

        Raises ModelNotReady or MemoryBudgetExceeded with the reason, at once after a failure of late; QueueFull,
        DeadlineExpired, ServerStopping. Cancelling it leaves the load to others. ``is_called``: another model's code
        wants it, whose own load may be what others wait for.
        """
        loop = asyncio.get_running_loop()
        if model.failure is not None and loop.time() < model.failure.until:
            raise model.failure.describe(model.failure.until - loop.time())
        if model.waiters >= self._terms.max_waiting:
            raise QueueFull("Exceeds maximum queue size")
        task = self._loads.get(model.name)
        if task is None or (is_called and model.name in self._lined_up):
            task = self._loads[model.name] = self._start(self._run(model, is_called))
            task.add_done_callback(lambda task: self._forget(model.name, task))
        left_s = self._terms.patience_s
        if deadline_ns:
            left_s = min(left_s, max(0.0, deadline_ns / 1e9 - loop.time()))
        model.waiters += 1  # keeps what was loaded from being evicted before it was used
        try:
            until = loop.time() + left_s
            while not (task.done() or model.ready()) and (left_s := until - loop.time()) > 0:
                # where it was only paused, its load may stand in line behind the one that it was paused for
                await asyncio.wait((task, model.when_resumed()), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            model.waiters -= 1
        if not task.done() and model.ready():
            return
        if not task.done():
            if deadline_ns and loop.time() * 1e9 >= deadline_ns:
                raise DeadlineExpired("Deadline Exceeded")
            raise ModelNotReady(
                f"model '{model.name}' is loaded on demand, and was not ready within {self._terms.patience_s:g} s; it "
                "goes on loading"
            )
        if task.cancelled() or task.exception() is not None:
            raise ServerStopping(STOPPING_TEXT)
        if not model.ready() and model.failure is not None:
            raise model.failure.describe(max(0.0, model.failure.until - loop.time()))

    def _forget(self, name: str, task: asyncio.Task[None]) -> None:
        if self._loads.get(name) is task:
            del self._loads[name]

    @contextlib.asynccontextmanager
    async def _turn(self, name: str, is_called: bool) -> AsyncIterator[None]:
        if is_called or not self._terms.is_serial:
            self._lined_up.discard(name)
            yield
            return
        self._lined_up.add(name)
        try:
            await self._line.acquire()
        finally:
            self._lined_up.discard(name)
        try:
            yield
        finally:
            self._line.release()

    async def _run(self, model: ManagedModel, is_called: bool) -> None:
        async with self._turn(model.name, is_called):
            if model.ready():
                return
            former = model.failure
            try:
                await self._load(model.name)
            except ServerStopping:
                raise
            except AiorchError as error:
                if model.ready():  # another version
                    return
                is_room = isinstance(error, MemoryBudgetExceeded)
                pause_s = FIRST_PAUSE_S if former is None else min(former.pause_s * 2, LONGEST_PAUSE_S)
                if is_room:
                    pause_s = ROOM_PAUSE_S
                until = asyncio.get_running_loop().time() + pause_s
                model.failure = Failure(model.name, error.public_text, is_room, pause_s, until)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model did not load on demand, and when it may be tried again."""

    model: str
    reason: str
    is_room: bool
    pause_s: float
    until: float

    def describe(self, left_s: float) -> CapacityError:
        """What a request gets."""
        if self.is_room:
            return MemoryBudgetExceeded(self.reason)
        return ModelNotReady(
            f"Request for unknown model: '{self.model}' is not at ready state: it is loaded on demand, which failed: "
            f"{self.reason} (it is tried again in {left_s:.1f} s at the earliest)"
        )
