"""The answers of one decoupled request on their way from a model's threads to the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import Final

from aiorch_server.errors import DeadlineExpired, StreamStalled
from aiorch_server.execution.taker import Taker
from aiorch_server.types import FINAL_RESPONSE, InferenceResponse

#: What waits for one caller; beyond it ``put`` blocks. One answer always has room, however large.
MAX_WAITING: Final = 1024
MAX_WAITING_BYTES: Final = 16 << 20
#: What waits for all callers together; above it, a second answer waits for nobody.
MAX_TOTAL_BYTES: Final = 512 << 20
_LONG_S: Final = 3600.0


class _Ledger:
    """Bytes that all channels hold."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.size_bytes = 0

    def add(self, size_bytes: int) -> None:
        with self._lock:
            self.size_bytes += size_bytes


_ledger: Final = _Ledger()


class ResponseChannel:
    """A bounded queue: any thread of the model puts, one coroutine on ``loop`` follows; ``taker`` says for how long.

    The end of the request does not go through here: it is the request's own settlement in the scheduler, so that
    whatever can happen to a request ends its stream as well, exactly once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, taker: Taker | None = None) -> None:
        self._loop = loop
        self._taker = taker or Taker()
        self._taken_s = 0.0
        self._stall: StreamStalled | None = None
        self._end: asyncio.Future[memoryview] | None = None
        self._room = threading.Condition()
        self._waiting: deque[tuple[InferenceResponse, int]] = deque()
        self._waiting_bytes = 0
        self._is_closed = False
        self._changed = asyncio.Event()

    @property
    def is_closed(self) -> bool:
        """Whether nobody follows any more."""
        return self._is_closed

    def put(self, response: InferenceResponse, size_bytes: int) -> bool:
        """Adds an answer; blocks while there is no room. False: nobody follows any more, the answer is dropped."""
        with self._room:
            since_s = time.monotonic()
            while not self._is_closed and self._is_full(size_bytes):
                left_s = self._taker.left_s(max(since_s, self._taken_s))
                if left_s > 0:
                    self._room.wait(min(left_s, _LONG_S))
                else:
                    self._give_up()
            if self._is_closed:
                return False
            self._waiting.append((response, size_bytes))
            self._waiting_bytes += size_bytes
            _ledger.add(size_bytes)
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:  # the loop is closed: the server has ended
            return False
        return True

    def close(self) -> None:
        """Nobody follows any more: drops what waits, and whoever waits for room goes on."""
        with self._room:
            self._close()

    def _close(self) -> None:
        self._is_closed = True
        self._waiting.clear()
        _ledger.add(-self._waiting_bytes)
        self._waiting_bytes = 0
        self._room.notify_all()

    def _give_up(self) -> None:
        self._stall = self._taker.lose()
        self._close()
        try:
            self._loop.call_soon_threadsafe(self._on_stall)
        except RuntimeError:  # the loop is closed: the server has ended
            return

    def _on_stall(self) -> None:
        # Whoever follows may be held up for ever, and the model asks whether it is still wanted.
        if self._end is not None:
            self._end.cancel()
        self._changed.set()

    async def follow(
        self, end: asyncio.Future[memoryview], deadline_ns: int = 0
    ) -> AsyncGenerator[InferenceResponse, None]:
        """Yields the answers as they come until the final one or ``end``; raises what ``end`` raises, or StreamStalled.

        ``deadline_ns`` is absolute on the loop's clock, 0 for none: DeadlineExpired. However it is left, ``end`` is
        cancelled unless it is done, and the channel closed.
        """
        self._end = end
        end.add_done_callback(lambda _: self._changed.set())
        try:
            while True:
                # In this order: what was put before the end is seen when the end is seen.
                is_ended = end.done()
                self._changed.clear()
                while self._waiting:
                    response = self._take()
                    yield response
                    if response.parameters.get(FINAL_RESPONSE):
                        await asyncio.wait((end,))  # it is being settled; leaving now would cancel it
                        return
                if self._stall is not None:
                    raise self._stall
                if is_ended:
                    break
                await self._await_change(deadline_ns)
            end.result()
        finally:
            end.cancel()
            self.close()

    async def _await_change(self, deadline_ns: int) -> None:
        if not deadline_ns:
            await self._changed.wait()
            return
        try:
            async with asyncio.timeout_at(deadline_ns / 1e9):
                await self._changed.wait()
        except TimeoutError:
            raise DeadlineExpired("Deadline Exceeded") from None

    def _is_full(self, size_bytes: int) -> bool:
        if not self._waiting:  # so each caller gets on, and makes room by that
            return False
        return (
            len(self._waiting) >= MAX_WAITING
            or self._waiting_bytes + size_bytes > MAX_WAITING_BYTES
            or _ledger.size_bytes + size_bytes > MAX_TOTAL_BYTES
        )

    def _take(self) -> InferenceResponse:
        with self._room:
            response, size_bytes = self._waiting.popleft()
            self._waiting_bytes -= size_bytes
            self._taken_s = time.monotonic()
            _ledger.add(-size_bytes)
            self._room.notify_all()
        return response
