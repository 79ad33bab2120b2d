"""Refused changes in the audit log: some lines for each caller, and for what is beyond them one line that counts.

Whoever may change nothing could fill the disk otherwise. A caller has a few lines to begin with and one more each
minute. What was refused beyond that is told when a window ends, and each further one is twice as long, up to an hour.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from aiorch_server.errors import AiorchError

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
        self.clear()

    def clear(self) -> None:
        self.count = 0
        self.counted_s = 0.0  # how long it took: longer than a window where no line could be written
        self.calls: Counter[tuple[str, str]] = Counter()
        self.models: Counter[str] = Counter()

    def add(self, refused: Refused, model: str) -> None:
        self.count += 1
        for counter, name in ((self.calls, (refused.method, refused.outcome)), (self.models, model[:_MAX_NAME])):
            if name in counter or len(counter) < _MAX_NAMED:
                counter[name] += 1  # type: ignore[index]


class Refusals:
    """Decides which refusals get lines of their own, and tells of the others by ``write``; on one event loop."""

    def __init__(self, write: Write, *, window_s: float = WINDOW_S, longest_s: float = LONGEST_S) -> None:
        self._write = write
        self._window_s, self._longest_s = window_s, longest_s
        self._callers: dict[str, _Caller] = {}
        self._writing: set[asyncio.Task[None]] = set()

    def has_line(self, refused: Refused, model: str) -> bool:
        """Whether whoever asks is to write a line; else the refusal is counted here, and told later."""
        name = refused.principal
        if name not in self._callers and len(self._callers) >= MAX_CALLERS:
            name = OTHERS
        caller = self._callers.get(name)
        if caller is None:
            caller = self._callers[name] = _Caller(0 if name == OTHERS else BURST, self._window_s)
            self._set_timer(name, caller)
        if caller.lines:
            caller.lines -= 1
            return True
        caller.add(refused, model)
        return False

    async def close(self, limit_s: float) -> None:
        """Tells what was counted, as far as that goes within ``limit_s``."""
        for name, caller in self._callers.items():
            assert caller.timer is not None
            caller.timer.cancel()
            self._tell(name, caller)
        self._callers.clear()
        if self._writing:
            _, late = await asyncio.wait(set(self._writing), timeout=limit_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _set_timer(self, name: str, caller: _Caller) -> None:
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
        told.counted_s = caller.counted_s + caller.length_s
        caller.clear()
        task = asyncio.create_task(self._write_count(name, caller, told))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write_count(self, name: str, caller: _Caller, told: _Caller) -> None:
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
        except AiorchError:  # told with what comes
            caller.count += told.count
            caller.counted_s += told.counted_s
            caller.calls.update(told.calls)
            caller.models.update(told.models)


def _find_only(found: set[str], several: str) -> str:
    return next(iter(found)) if len(found) == 1 else several
