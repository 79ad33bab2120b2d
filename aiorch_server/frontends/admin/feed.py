"""The registry's events for all who watch: read once, and kept nowhere for anybody.

A watcher is a position in the order of events. Where it is among the last events it is given those that were read for
all; where it is behind them it reads the database itself, a page at a time. So a slow one costs what a fast one costs.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from aiorch_server.errors import AiorchError, PreconditionFailed, QuotaExceeded, ServerStopping
from aiorch_server.frontends.admin.fields import InvalidField
from aiorch_server.registry import models
from aiorch_server.registry.events import first_event_number, last_event_number, read_events
from aiorch_server.registry.records import Event

if TYPE_CHECKING:
    from aiorch_server.registry.database import Database
    from aiorch_server.registry.session import Session

logger = logging.getLogger(__name__)

#: How often the table is looked at for what other servers wrote.
INTERVAL_S: Final = 1.0
MAX_WATCHERS: Final = 1000
#: So that one caller alone shuts nobody out.
MAX_WATCHERS_OF_ONE: Final = 100
_MAX_KEPT: Final = 10_000
_PAGE: Final = 1000
#: ``WatchEventsRequest.after`` for: only what comes.
ONLY_NEW: Final = -1


class _Read(NamedTuple):
    events: tuple[Event, ...]
    position: int


class EventFeed:
    """Events as they are committed; on one event loop, between ``start`` and ``stop``."""

    def __init__(self, database: Database, *, interval_s: float = INTERVAL_S) -> None:
        self._database = database
        self._interval_s = interval_s
        self._recent: list[Event] = []
        #: All events with numbers over ``_begin`` and up to ``_last`` are in ``_recent``; None: nobody has read yet.
        self._begin: int | None = None
        self._last = 0
        self._changed = asyncio.Event()
        self._woken = asyncio.Event()
        self._watchers = 0
        self._by_caller: Counter[str] = Counter()
        self._is_stopped = False
        self._task: asyncio.Task[None] | None = None

    @property
    def watchers(self) -> int:
        """How many watch now."""
        return self._watchers

    def start(self) -> None:
        """Begins to look at the table, for as long as somebody watches."""
        self._task = asyncio.create_task(self._follow(), name="event-feed")

    def announce_stop(self) -> None:
        """Ends all watches with ServerStopping."""
        self._is_stopped = True
        self._tell()

    async def stop(self) -> None:
        """As ``announce_stop``; looks no more."""
        self.announce_stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def wake(self) -> None:
        """Something was written: looks at once."""
        self._woken.set()

    async def find_position(self, after: int, model: str) -> int:
        """Where a watch begins that asks for events ``after`` this number, of ``model`` or of all.

        NotFoundError for an unknown model, InvalidField for a number that no event has, PreconditionFailed where events
        behind it are not kept any more.
        """

        def work(session: Session) -> int:
            if model:
                models.get(session, model)
            last, first = last_event_number(session), first_event_number(session)
            if after == ONLY_NEW:
                return last
            if not 0 <= after <= last:
                raise InvalidField("after", f"is {after}; expected {ONLY_NEW} to {last}, the number of the last event")
            if 0 < after < first - 1:
                raise PreconditionFailed(
                    f"events before {first} are not kept any more: look at the present state, then watch after {last}"
                )
            return after

        return await self._database.read(work)

    async def watch(
        self, position: int, model: str, sees: Callable[[str], bool], caller: str = ""
    ) -> AsyncGenerator[Event, None]:
        """Events behind ``position`` that are of ``model`` (empty: of any) and seen, without end.

        Raises ServerStopping when the feed is stopped, QuotaExceeded where too many watch, or ``caller`` too
        often ("": nobody was asked who it is).
        """
        if self._watchers >= MAX_WATCHERS:
            raise QuotaExceeded(f"{MAX_WATCHERS} callers watch events of this server already")
        if caller and self._by_caller[caller] >= MAX_WATCHERS_OF_ONE:
            raise QuotaExceeded(f"'{caller}' watches events of this server {MAX_WATCHERS_OF_ONE} times already")
        self._watchers += 1
        self._by_caller[caller] += 1
        self.wake()
        try:
            while True:
                changed = self._changed
                if self._is_stopped:
                    raise ServerStopping("the server is stopping: watch at another one, or later")
                found = await self._read_on(position, model)
                for event in found.events:
                    if (not model or event.model == model) and sees(event.model):
                        yield event
                if found.position == position:
                    await changed.wait()
                position = found.position
        finally:
            self._watchers -= 1
            self._by_caller[caller] -= 1
            if not self._by_caller[caller]:
                del self._by_caller[caller]

    async def _read_on(self, position: int, model: str) -> _Read:
        """The next events behind ``position``, and how far that is; the same position where there are none yet."""
        if self._begin is None:
            return _Read((), position)
        if position < self._begin:
            return await self._database.read(lambda session: _read_page(session, position, model))
        start = bisect.bisect_right(self._recent, position, key=lambda event: event.number)
        events = tuple(self._recent[start : start + _PAGE])
        return _Read(events, events[-1].number if events else position)

    async def _follow(self) -> None:
        is_away = False
        while True:
            if not self._watchers:
                self._begin = None
                self._woken.clear()
                await self._woken.wait()
                continue
            self._woken.clear()
            try:
                has_more = await self._look()
                is_away = False
            except AiorchError as error:
                if not is_away:
                    logger.warning("events cannot be read, those who watch wait: %s", error)
                has_more, is_away = False, True
            except Exception:
                logger.exception("the look at events failed; the next one comes in due time")
                has_more = False
            if not has_more:
                try:
                    async with asyncio.timeout(self._interval_s):
                        await self._woken.wait()
                except TimeoutError:
                    pass

    async def _look(self) -> bool:
        """Reads what is new, and tells all; whether there may be more."""
        if self._begin is None:
            self._last = await self._database.read(last_event_number)
            self._begin, self._recent = self._last, []
            self._tell()
            return True
        events = await self._database.read(lambda session: read_events(session, after=self._last, limit=_PAGE))
        if not events:
            return False
        self._recent += events
        self._last = events[-1].number
        if len(self._recent) > _MAX_KEPT:
            surplus = len(self._recent) - _MAX_KEPT // 2
            self._begin = self._recent[surplus - 1].number
            del self._recent[:surplus]
        self._tell()
        return len(events) == _PAGE

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _read_page(session: Session, position: int, model: str) -> _Read:
    last = last_event_number(session)
    events = read_events(session, after=position, model=model, limit=_PAGE)
    # the rest, up to the last of all, are of other models
    return _Read(events, events[-1].number if len(events) == _PAGE else max(last, position))
