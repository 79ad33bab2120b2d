"""Refused changes in the audit log: some lines for each caller, and for what is beyond them one line that counts.

Whoever may change nothing could fill the disk otherwise. A caller has a few lines to begin with and one more each
minute. What was refused beyond that is told when a window ends, and each further one is twice as long, up to an hour.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, NamedTuple, TypeVar

from aiorch_server.errors import AiorchError

logger = logging.getLogger(__name__)

WINDOW_S: Final = 60.0
LONGEST_S: Final = 3600.0
#: Lines of its own that a caller has at most; one comes back with each window.
BURST: Final = 10
#: Callers that are told apart at a time; all others are told as one, OTHERS.
MAX_CALLERS: Final = 1000
OTHERS: Final = "(others)"
#: In place of a method or an outcome where a line tells of several.
SEVERAL: Final = "(several)"
#: Calls, and models, that one line names.
_MAX_NAMED: Final = 10
_MAX_NAME: Final = 255
_Name = TypeVar("_Name", str, tuple[str, str])


class Refused(NamedTuple):
    """Who was refused what, and how."""

    principal: str
    method: str
    outcome: str


#: (refused, model, detail) -> writes a line; AiorchError where it cannot be written
Write = Callable[[Refused, str, str], Awaitable[None]]


class _Caller:
    """What is known of one caller: the lines it has left, and what was counted since the window began."""

    def __init__(self, lines: int, length_s: float) -> None:
        self.lines = lines
        self.length_s = length_s
        self.timer: asyncio.TimerHandle | None = None
        self.began_s = 0.0  # of the window, by the loop's clock
        self.clear()

    def clear(self) -> None:
        self.count = 0
        self.counted_s = 0.0  # how long what came back took, of which no line could be written
        self.calls: Counter[tuple[str, str]] = Counter()
        self.models: Counter[str] = Counter()

    def add(self, refused: Refused, model: str) -> None:
        self.count += 1
        _add(self.calls, (refused.method, refused.outcome), 1)
        _add(self.models, model[:_MAX_NAME], 1)

    def take_back(self, told: _Caller) -> None:
        """What could not be written is told with what comes."""
        self.count += told.count
        self.counted_s += told.counted_s
        for call, count in told.calls.items():
            _add(self.calls, call, count)
        for model, count in told.models.items():
            _add(self.models, model, count)


class Refusals:
    """Decides which refusals get lines of their own, and tells of the others by ``write``; on one event loop."""

    def __init__(self, write: Write, *, window_s: float = WINDOW_S, longest_s: float = LONGEST_S) -> None:
        self._write = write
        self._window_s, self._longest_s = window_s, longest_s
        self._callers: dict[str, _Caller] = {}
        self._writing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def has_line(self, refused: Refused, model: str) -> bool:
        """Whether whoever asks is to write a line; else the refusal is counted here, and told later."""
        name = refused.principal
        if name not in self._callers and len(self._callers) >= MAX_CALLERS:
            name = OTHERS
        caller = self._find(name)
        if caller.lines:
            caller.lines -= 1
            return True
        caller.add(refused, model)
        return False

    async def write(self, refused: Refused, model: str, detail: str) -> None:
        """Writes a line of its own, which goes on where whoever asks leaves; ``write`` tells where it cannot be."""
        await asyncio.shield(self._start(self._write_line(refused, model, detail)))

    async def close(self, limit_s: float) -> None:
        """Tells what was counted, as far as that goes within ``limit_s``; the log of the server tells what is left."""
        self._is_closed = True
        for caller in self._callers.values():
            if caller.timer is not None:
                caller.timer.cancel()
        until = asyncio.get_running_loop().time() + limit_s
        await self._settle(until)  # what is being written may come back
        for name, caller in self._callers.items():
            self._tell(name, caller)
        await self._settle(until)
        for task in (late := set(self._writing)):
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        if left := sum(caller.count for caller in self._callers.values()):
            logger.warning("%d refused changes are in no line of the audit log: it was not written in time", left)

    async def _settle(self, until: float) -> None:
        if self._writing:
            left_s = max(0.0, until - asyncio.get_running_loop().time())
            await asyncio.wait(set(self._writing), timeout=left_s)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return task

    def _find(self, name: str) -> _Caller:
        caller = self._callers.get(name)
        if caller is None:
            caller = self._callers[name] = _Caller(0 if name == OTHERS else BURST, self._window_s)
            if not self._is_closed:
                self._set_timer(name, caller)
        return caller

    def _set_timer(self, name: str, caller: _Caller) -> None:
        caller.began_s = asyncio.get_running_loop().time()
        caller.timer = asyncio.get_running_loop().call_later(caller.length_s, self._end, name)

    def _end(self, name: str) -> None:
        caller = self._callers[name]
        if caller.count:
            self._tell(name, caller)
            caller.length_s = min(2 * caller.length_s, self._longest_s)
        else:
            caller.length_s = self._window_s
        caller.lines += name != OTHERS
        if caller.lines >= BURST or (name == OTHERS and caller.length_s == self._window_s):
            del self._callers[name]
        else:
            self._set_timer(name, caller)

    def _tell(self, name: str, caller: _Caller) -> None:
        if not caller.count:
            return
        told = _Caller(0, caller.length_s)
        told.count, told.calls, told.models = caller.count, caller.calls, caller.models
        told.counted_s = caller.counted_s + asyncio.get_running_loop().time() - caller.began_s
        caller.clear()
        self._start(self._write_count(name, told))

    async def _write_line(self, refused: Refused, model: str, detail: str) -> None:
        with contextlib.suppress(AiorchError):
            await self._write(refused, model, detail)

    async def _write_count(self, name: str, told: _Caller) -> None:
        methods, outcomes = ({call[index] for call in told.calls} for index in (0, 1))
        refused = Refused(name, _find_only(methods, SEVERAL), _find_only(outcomes, SEVERAL))
        detail = {
            "refused_again": told.count,
            "within_s": round(told.counted_s),
            "calls": {" ".join(call): count for call, count in told.calls.items()},
            "models": dict(told.models),
        }
        text = json.dumps(detail, separators=(",", ":"))
        try:
            await self._write(refused, _find_only(set(told.models), ""), text)
        except AiorchError:
            self._find(name).take_back(told)
        except BaseException:
            self._find(name).take_back(told)
            raise


def _add(counter: Counter[_Name], name: _Name, count: int) -> None:
    if name in counter or len(counter) < _MAX_NAMED:
        counter[name] += count


def _find_only(found: set[str], several: str) -> str:
    return next(iter(found)) if len(found) == 1 else several
