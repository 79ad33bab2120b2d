"""The registry's database: transactions on threads of their own, each within a bounded time.

``work`` is a plain function over a Session, such as those of the modules beside this one; all that it writes is one
transaction. Writers follow each other, on every kind of database: each first takes one lock (SQLite has but one
anyway). So two writers never build upon the same state, and whoever has read an event has read those before it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import enum
import itertools
import random
import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import Final, Generic, TypeVar

from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from aiorch_server.errors import AiorchError, InternalError, RegistryUnavailable
from aiorch_server.registry.connections import Line, open_engine, using_line
from aiorch_server.registry.failures import explain, explain_silence, explain_unknown, is_lost, is_transient
from aiorch_server.registry.schema import counters
from aiorch_server.registry.urls import DatabaseUrl

T = TypeVar("T")
Work = Callable[[Session], T]
#: Longest time for a connection, a statement, a lock; a call takes at most _PATIENCE_S more, its wait for a thread and
#: further attempts included.
TIMEOUT_S: Final = 3.0
_PATIENCE_S: Final = 1.0
_THREADS: Final = 4
_MAX_WAITING: Final = 1000
_MAX_ATTEMPTS: Final = 6
_FIRST_PAUSE_S: Final = 0.01
WRITER: Final = "writer"


class Database:
    """The database behind ``url``, for all threads and event loops; connects when first used, and again when lost.

    Raises InvalidSettings for a URL that cannot be, or without its driver.
    """

    def __init__(self, url: str | DatabaseUrl, *, threads: int = _THREADS, timeout_s: float = TIMEOUT_S) -> None:
        self.url = url if isinstance(url, DatabaseUrl) else DatabaseUrl(url)
        self._threads, self._timeout_s, self._limit_s = threads, timeout_s, timeout_s + _PATIENCE_S
        self._executor = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="registry")
        self._waiting = threading.Semaphore(_MAX_WAITING)
        self._lock = threading.Lock()
        self._engine  # noqa: B018  a missing driver is told now

    def __repr__(self) -> str:
        return f"Database({str(self.url)!r})"

    async def run(self, work: Work[T]) -> T:
        """What ``work`` gives, once all that it wrote is durable; nothing of it is where this raises.

        ``work`` may be called several times (another writer was in the way, the connection broke) and must do nothing
        but read and write in the session, and raise. Its errors come as they are. Raises RegistryUnavailable where the
        database does not do it within some seconds, OutcomeUnknown where it may have done it nevertheless. A caller
        that is cancelled does not undo what is under way.
        """
        return await self._await(work, is_read=False)

    async def read(self, work: Work[T]) -> T:
        """As ``run``, for work that writes nothing: it waits for no writer, and sees one state of all tables."""
        return await self._await(work, is_read=True)

    def run_blocking(self, work: Work[T]) -> T:
        """As ``run``, for threads without an event loop."""
        return self._wait(work, is_read=False)

    def read_blocking(self, work: Work[T]) -> T:
        """As ``read``, for threads without an event loop."""
        return self._wait(work, is_read=True)

    def close(self) -> None:
        """Gives all connections back, when what is under way has ended; waits for that, at most some seconds."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._engine.dispose()

    async def aclose(self) -> None:
        """As ``close``, off the event loop."""
        await asyncio.to_thread(self.close)

    @cached_property
    def _engine(self) -> Engine:
        self.url.prepare_folder()
        return open_engine(self.url, connections=self._threads, connect_s=self._timeout_s, timeout_s=self._timeout_s)

    @cached_property
    def _reading_engine(self) -> Engine:
        if self.url.kind == "sqlite":
            return self._engine.execution_options(is_read=True)
        is_postgresql = self.url.kind == "postgresql"
        options = {"postgresql_readonly": True} if is_postgresql else {}
        return self._engine.execution_options(isolation_level="REPEATABLE READ", **options)

    async def _await(self, work: Work[T], *, is_read: bool) -> T:
        call, future = self._submit(work, is_read=is_read)
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def tell(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ended.set)

        future.add_done_callback(tell)
        try:
            async with asyncio.timeout(self._limit_s):
                await ended.wait()
        except TimeoutError:
            return self._give_up(call, future)
        except asyncio.CancelledError:
            future.cancel()
            raise
        return future.result()

    def _wait(self, work: Work[T], *, is_read: bool) -> T:
        call, future = self._submit(work, is_read=is_read)
        try:
            return future.result(self._limit_s)
        except concurrent.futures.TimeoutError:
            return self._give_up(call, future)

    def _submit(self, work: Work[T], *, is_read: bool) -> tuple[_Call[T], concurrent.futures.Future[T]]:
        if not self._waiting.acquire(blocking=False):
            raise RegistryUnavailable(f"too many calls wait for the registry's database {self.url}; try again")
        engine = self._reading_engine if is_read else self._engine
        call = _Call(self.url, engine, work, is_read=is_read, timeout_s=self._timeout_s)
        try:
            future = self._executor.submit(call.run)
        except RuntimeError:
            self._waiting.release()
            raise RegistryUnavailable("the registry is closed") from None
        future.add_done_callback(lambda _: self._waiting.release())
        return call, future

    def _give_up(self, call: _Call[T], future: concurrent.futures.Future[T]) -> T:
        is_committing = call.give_up()
        future.cancel()
        if future.done() and not future.cancelled():
            return future.result()
        raise explain_unknown(self.url) if is_committing else explain_silence(self.url, self._limit_s)


class _Stage(enum.Enum):
    WORKING = enum.auto()
    COMMITTING = enum.auto()
    GIVEN_UP = enum.auto()


class _Call(Generic[T]):
    """One transaction with its further attempts; runs on a thread, is given up by another."""

    def __init__(self, url: DatabaseUrl, engine: Engine, work: Work[T], *, is_read: bool, timeout_s: float) -> None:
        self._url, self._engine, self._work, self._is_read = url, engine, work, is_read
        # Whoever waited in vain for a lock is told so, before the caller gives up.
        self._until = time.monotonic() + timeout_s
        self._line = Line()
        self._lock = threading.Lock()
        self._stage = _Stage.WORKING

    def give_up(self) -> bool:
        """From now on nothing is committed; gives whether a commit is under way already."""
        with self._lock:
            is_committing = self._stage is _Stage.COMMITTING
            if not is_committing:
                self._stage = _Stage.GIVEN_UP
        self._line.cut()
        return is_committing and not self._is_read

    def run(self) -> T:
        """What the work gives, committed."""
        for attempt in itertools.count(1):
            try:
                with using_line(self._line):
                    return self._attempt()
            except SQLAlchemyError as error:
                cause = getattr(error, "orig", None)
                if isinstance(cause, AiorchError):  # of a column's type, such as a document that is too large
                    raise cause from None
                is_committing = self._stage is _Stage.COMMITTING and not self._is_read
                is_over = attempt == _MAX_ATTEMPTS or time.monotonic() > self._until
                may_pass = is_transient(error) or (is_lost(error) and not is_committing)
                if is_over or not may_pass or self._stage is _Stage.GIVEN_UP:
                    # Not chained: what drivers say may hold a password.
                    raise explain(error, self._url, is_committing=is_committing) from None
            self._enter(_Stage.WORKING)
            # Those who were in each other's way do not come back at the same time.
            time.sleep(_FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError

    def _attempt(self) -> T:
        self._enter(_Stage.WORKING)
        with Session(self._engine, expire_on_commit=False) as session:
            try:
                if not self._is_read:
                    _take_turn(session)
                result = self._work(session)
                session.flush()
                self._enter(_Stage.COMMITTING)
                session.commit()
            except BaseException:
                with contextlib.suppress(SQLAlchemyError):  # it is gone, and with it what it did
                    session.rollback()
                raise
            finally:
                self._line.hold(None)  # it goes back to where others take it from
            return result

    def _enter(self, stage: _Stage) -> None:
        with self._lock:
            if self._stage is _Stage.GIVEN_UP:
                raise RegistryUnavailable(f"the registry's database {self._url} took too long")
            self._stage = stage


def _take_turn(session: Session) -> None:
    """Waits until no other writer is at work; ends with the transaction."""
    found = session.execute(select(counters.c.value).where(counters.c.name == WRITER).with_for_update()).scalar()
    if found is None:
        raise InternalError("the registry's tables are incomplete: the writers' row is missing")
