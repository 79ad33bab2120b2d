"""Drives the rollouts of all models, on the one server that holds the lease; what it does is in the database alone.

Each step is one transaction that looks at the lease first: a driver that stood still and comes back changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from aiorch_server.deployments.rollout import CLOCK_S, Observation, abandon, advance, begin_anew, has_begun_before
from aiorch_server.deployments.samples import merge, name_step
from aiorch_server.deployments.writing import write_move
from aiorch_server.errors import AiorchError, Conflict, RegistryUnavailable
from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.deployments import find_deployment
from aiorch_server.registry.leases import Lease, acquire_lease, check_lease, release_lease
from aiorch_server.registry.records import Deployment, Rollout, ServerStatus
from aiorch_server.registry.rollouts import get_rollout, put_rollout, read_open_rollouts
from aiorch_server.registry.servers import read_server_statuses, read_servers
from aiorch_server.registry.session import Session
from aiorch_server.types import ModelState

if TYPE_CHECKING:
    from aiorch_server.registry.database import Database

logger = logging.getLogger(__name__)

LEASE: Final = "rollouts"
#: How long a driver that was killed keeps others from going on.
LEASE_S: Final = 6.0
TICK_S: Final = 0.25
#: Who has not been heard of for so long is not waited for.
SILENT_S: Final = 10.0
#: A call of the database takes no longer, with the wait for a thread.
LONGEST_CALL_S: Final = 5.0
#: Nor named any more after so long.
_FORGOTTEN_S: Final = 600.0


class _Look(NamedTuple):
    """What the database's clock showed, and by how much that is ahead of the monotonic one."""

    now: datetime
    ahead_s: float


def _look(session: Session) -> _Look:
    now = read_clock(session)
    return _Look(now, now.timestamp() - time.monotonic())


class Driver:
    """``server`` is this server's name; ``on_change`` is called after each change. For one event loop's thread."""

    def __init__(
        self,
        database: Database,
        *,
        server: str,
        on_change: Callable[[], None] = lambda: None,
        lease_s: float | None = None,
        silent_s: float | None = None,
    ) -> None:
        self._database = database
        self._server = server
        self._on_change = on_change
        self._lease_s = LEASE_S if lease_s is None else lease_s
        self._silent_s = SILENT_S if silent_s is None else silent_s
        # A process of the same name that runs later must not go on with this one's lease.
        self._holder = f"{server} {secrets.token_hex(4)}"
        self._lease: Lease | None = None
        self._is_rolling = False
        #: By how much the database's clock was ahead of the monotonic one when it was last looked at: by servers that
        #: do not drive, too, for they may be the next, and because the clock was set.
        self._ahead_s: float | None = None
        #: What it showed when it was seen that it had been set; steps that began before begin anew.
        self._set_at: datetime | None = None
        self._end = asyncio.Event()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_driving(self) -> bool:
        """Whether this server holds the lease, as far as it knows."""
        return self._lease is not None

    def start(self) -> None:
        """Begins to ask for the lease, and to drive."""
        self._task = asyncio.create_task(self._run())

    def notice(self, is_rolling: bool) -> None:
        """Whether a rollout is under way, as seen just now, with this server's report written: it may go on."""
        self._is_rolling = is_rolling
        if is_rolling:
            self._news.set()

    async def stop(self) -> None:
        """Drives no more, and leaves the lease to others, if the database is there."""
        self._end.set()
        self._news.set()
        if self._task is not None:
            # Not cancelled before it is at rest: it could get the lease again after it was given back.
            await asyncio.wait([self._task], timeout=LONGEST_CALL_S)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        lease, self._lease = self._lease, None
        if lease is not None:
            try:
                await self._database.run(lambda session: release_lease(session, lease))
            except AiorchError as error:
                logger.info("the lease on rollouts was not given back: %s", error)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        asked_at = -self._lease_s
        while not self._end.is_set():
            try:
                if loop.time() >= asked_at + self._lease_s / 3:
                    asked_at = loop.time()
                    await self._ask()
                if self._lease is not None and self._is_rolling:
                    await self._drive(self._lease)
            except RegistryUnavailable:
                self._lease = None  # the reconciler tells of it
            except Conflict as error:
                logger.warning("%s", error)
                self._lease = None
            except Exception:
                logger.exception("driving the rollouts failed; it is tried again")
            try:
                async with asyncio.timeout(TICK_S if self._lease is not None and self._is_rolling else 1.0):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()

    async def _ask(self) -> None:
        def ask(session: Session) -> tuple[_Look, Lease | None]:
            return _look(session), acquire_lease(session, LEASE, self._holder, duration_s=self._lease_s)

        look, lease = await self._database.run(ask)
        self._follow_clock(look)
        if (lease is None) != (self._lease is None):
            logger.info("%s drives the rollouts", "this server" if lease is not None else "another server")
        self._lease = lease

    async def _drive(self, lease: Lease) -> None:
        def read(session: Session) -> tuple[_Look, list[str]]:
            return _look(session), [rollout.id for rollout in read_open_rollouts(session)]

        look, ids = await self._database.read(read)
        self._follow_clock(look)
        for id in ids:
            try:
                if await self._database.run(lambda session, id=id: self._step(session, lease, id)):  # type: ignore[misc]
                    self._on_change()
            except (RegistryUnavailable, Conflict):
                raise
            except Exception:  # the others go on
                logger.exception("rollout %s could not be driven; it is tried again", id)

    def _follow_clock(self, look: _Look) -> None:
        if self._ahead_s is not None and abs(look.ahead_s - self._ahead_s) > CLOCK_S:
            logger.warning("the registry's clock was set: rollouts begin their steps anew")
            self._set_at = look.now
        self._ahead_s = look.ahead_s

    def _step(self, session: Session, lease: Lease, id: str) -> bool:
        """One move of one rollout, if there is one; gives whether it changed what should run."""
        now = check_lease(session, lease)
        rollout = get_rollout(session, id)
        if rollout.state.is_end:
            return True
        deployment = find_deployment(session, rollout.model)
        if deployment is None:
            put_rollout(session, abandon(rollout, "its deployment is gone", now))
            return True
        heard = read_servers(session)
        statuses = {each.server: each for each in read_server_statuses(session, rollout.model)}
        seen = observe(rollout, deployment, statuses, heard, now, silent_s=self._silent_s)
        is_before = self._set_at is not None and has_begun_before(rollout, self._set_at)
        move = begin_anew(rollout, now) if is_before else advance(rollout, seen, now)
        write_move(session, rollout, move, deployment, actor=self._server, is_driver=True)
        return bool(move.text)


def observe(
    rollout: Rollout,
    deployment: Deployment,
    statuses: Mapping[str, ServerStatus],
    heard: Mapping[str, datetime],
    now: datetime,
    *,
    silent_s: float = SILENT_S,
) -> Observation:
    """What the servers made of the present deployment: ``heard`` tells when each was heard of last. Pure.

    A server that was heard of in the future said so before the clock was set back.
    """
    live = [server for server, seen_at in heard.items() if abs((now - seen_at).total_seconds()) <= silent_s]
    silent = [server for server in heard if server not in live and (now - heard[server]).total_seconds() < _FORGOTTEN_S]
    waiting, failures = [], {}
    for server in live:
        status = statuses.get(server)
        if status is None or status.observed_generation < deployment.generation:
            waiting.append(server)
            continue
        for version in status.versions:
            is_gone = version.state in (ModelState.UNAVAILABLE.value, ModelState.UNLOADING.value)
            if version.version == rollout.to_version and version.version in deployment.loaded and is_gone:
                failures[server] = version.reason or version.state
    return Observation(
        n_servers=len(live),
        waiting=tuple(waiting),
        silent=tuple(silent),
        failures=failures,
        samples=merge(name_step(rollout), (each.samples for each in statuses.values())),
    )
