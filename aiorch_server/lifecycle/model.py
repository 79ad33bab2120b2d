"""One model under management: its versions, brought one after another to what is aspired.

Laws: a version that serves is only replaced or taken away once its successor serves; a failed load changes nothing but
the reason; what was taken away is drained, and whoever holds a lease or waits for an answer keeps it alive meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aiorch_server.errors import AiorchError, InternalError, MemoryBudgetExceeded, ModelLoadError
from aiorch_server.lifecycle.servable import Servable
from aiorch_server.lifecycle.states import explain_transition
from aiorch_server.lifecycle.version_policy import Standing, Verb, choose_action
from aiorch_server.repository import ModelSnapshot
from aiorch_server.types import ModelIndexEntry, ModelState

if TYPE_CHECKING:
    from aiorch_server.lifecycle.demand import Failure

logger = logging.getLogger(__name__)

STOPPING_TEXT = "Server is stopping, scheduler for model has stopped accepting new inference requests"
UNLOADED = "unloaded"
ENDED = "all instances ended"
ON_DEMAND = "on demand: the first request loads it"

#: What is told about each step: the row of the index as it is now.
Observer = Callable[[ModelIndexEntry], None]


class LoadVersion(Protocol):
    """Loads one version; raises an AiorchError, and leaves nothing behind when it is cancelled."""

    async def __call__(self, version: int, fingerprint: str) -> Servable:
        """The servable, owned by the caller."""
        ...


@dataclass(slots=True)
class VersionRecord:
    """What is known about one version: its state, why, and the servable while it serves."""

    version: int
    state: ModelState = ModelState.UNKNOWN
    reason: str = ""
    servable: Servable | None = None
    #: The fingerprint that failed to load: not tried again until it changes or somebody asks.
    failed: str = ""
    #: An ensemble that is kept, but does not serve while a model of its steps does not.
    is_withheld: bool = False


class ManagedModel:
    """The versions of one model; all changes are made within ``changing``, on the event loop."""

    def __init__(self, name: str, publish: Callable[[], None], observe: Observer, drain_timeout_s: float) -> None:
        self.name = name
        self.versions: dict[int, VersionRecord] = {}
        #: What is wrong with the model as a whole, "" if nothing.
        self.reason = ""
        #: Whether it is meant to serve: an unload takes this back.
        self.is_wanted = False
        #: Whether somebody asked for this model itself, and not only for an ensemble that needs it.
        self.is_asked = False
        #: Whether the registry says what serves of it: then it is no part of the server's readiness.
        self.is_deployed = False
        #: Whether requests load it, and it may be evicted for others.
        self.is_on_demand = False
        #: The versions of it that requests load.
        self.offered: frozenset[int] = frozenset()
        #: Why they could not load it, until they do.
        self.failure: Failure | None = None
        #: Requests that wait for it to be loaded, or have yet to take their lease.
        self.waiters = 0
        #: The models that an ensemble needs, as (name, version or "").
        self.requires: frozenset[tuple[str, str]] = frozenset()
        #: Whether it did not load because one of those did not serve.
        self.is_waiting = False
        self._publish = publish
        self._observe = observe
        self._drain_timeout_s = drain_timeout_s
        #: What the repository held when it was last tried; None: nothing comparable.
        self.seen: ModelSnapshot | None = None
        self._lock = asyncio.Lock()
        self._visitors = 0
        self._resumed: asyncio.Future[None] | None = None
        self._drains: dict[Servable, asyncio.Task[bool]] = {}

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """The right to change this model; one at a time, in the order of asking."""
        self._visitors += 1
        try:
            async with self._lock:
                yield
        finally:
            self._visitors -= 1

    @property
    def is_contended(self) -> bool:
        """Whether somebody else waits for the right to change this model."""
        return self._visitors > 1

    @property
    def is_changing(self) -> bool:
        """Whether somebody changes this model, or waits for the right to."""
        return self._visitors > 0

    @property
    def is_idle(self) -> bool:
        """Whether nobody uses, changes or waits for it."""
        return not self._visitors and not self.waiters and all(each.is_idle for each in self.servables())

    @property
    def needs_its_steps(self) -> bool:
        """Whether the models that it needs must stay: it serves, should serve, or is being loaded."""
        return self.is_wanted or self._visitors > 0

    @property
    def is_resting(self) -> bool:
        """Whether nothing of it serves, and nobody is about to change that."""
        return not self.servables() and not self._visitors

    def is_loadable(self, now: float) -> bool:
        """Whether a request for it would load it now; ``now`` is the loop's time."""
        return bool(self.offered) and (self.failure is None or now >= self.failure.until)

    def follow_demand(self, is_on_demand: bool, snapshot: ModelSnapshot | None) -> None:
        """From now on requests load what is in ``snapshot``, or not any more; what failed before does not count."""
        self.is_on_demand, self.failure = is_on_demand, None
        self.offered = frozenset(snapshot.versions if snapshot is not None and is_on_demand else ())
        if self.offered and not self.is_wanted and not self.versions:
            self.reason = ON_DEMAND

    @property
    def is_forgotten(self) -> bool:
        """Whether nothing is known of it, and nobody wants it; who changes it last may drop it."""
        return not (self.versions or self.is_wanted or self.is_deployed or self.is_on_demand)

    def forget_versions(self) -> None:
        """Leaves no trace of versions that do not serve."""
        self.versions = {each.version: each for each in self.versions.values() if each.servable is not None}

    def ready(self) -> dict[int, Servable]:
        """The servables that take requests now, by version."""
        return {
            record.version: record.servable
            for record in self.versions.values()
            if record.servable is not None and record.state is ModelState.READY
        }

    def servables(self) -> list[Servable]:
        """What serves or drains, by version."""
        records = (self.versions[version] for version in sorted(self.versions))
        return [record.servable for record in records if record.servable is not None]

    def index(self) -> list[ModelIndexEntry]:
        """One row per version that was ever tried, or one for the model if there is none."""
        if not self.versions:
            state = ModelState.UNAVAILABLE if self.reason else ModelState.UNKNOWN
            return [ModelIndexEntry(self.name, "", state, self.reason)]
        return [self._describe(self.versions[version]) for version in sorted(self.versions)]

    def problem(self) -> str:
        """Why the model does not serve as it is meant to, "" if it does. "unloaded" is no problem."""
        if not self.is_wanted or self.is_deployed or self.is_on_demand:
            return ""
        for record in self.versions.values():
            if record.state is not ModelState.READY and record.reason != UNLOADED:
                return record.reason or f"version {record.version} is {record.state.value}"
        if not self.ready():
            return self.reason or "no version is ready"
        return ""

    async def reconcile(
        self, aspired: Mapping[int, str], load: LoadVersion, *, is_asked: bool, force: bool = False
    ) -> None:
        """Takes the steps that the version policy chooses until there is none left; call it within ``changing``.

        ``aspired`` gives the fingerprint of each version. A changed fingerprint means: load anew, then swap. What
        failed before with the same fingerprint is only tried again where somebody asked for it (``is_asked``);
        ``force`` loads again what did not change. Raises ModelLoadError with all reasons when a version does not load;
        the others are served all the same. MemoryBudgetExceeded if one of them had no room.
        """
        self.reason = ""
        self.is_wanted = True
        forced = set(aspired) if force else set()
        failures: dict[int, str] = {}
        has_room = True
        for version in aspired:
            record = self.versions.setdefault(version, VersionRecord(version))
            if is_asked or force:
                record.failed = ""
        while (action := choose_action(self._standings(aspired, forced, failures), aspired)) is not None:
            record = self.versions[action.key]
            if action.verb is Verb.UNLOAD:
                await self._take_down([record])
                continue
            forced.discard(record.version)
            try:
                await self._bring_up(record, aspired[record.version], load)
            except AiorchError as error:
                failures[record.version] = error.public_text
                has_room = has_room and not isinstance(error, MemoryBudgetExceeded)
        for version, fingerprint in aspired.items():
            record = self.versions[version]
            if record.servable is not None and record.servable.fingerprint == fingerprint and version not in failures:
                record.reason = ""
            elif version not in failures:  # it failed before and did not change since
                failures[version] = record.reason
        if failures:
            text = "; ".join(f"version {version}: {failures[version]}" for version in sorted(failures))
            kind = ModelLoadError if has_room else MemoryBudgetExceeded
            raise kind(f"load failed for model '{self.name}': {text}")

    def _standings(
        self, aspired: Mapping[int, str], forced: Collection[int], failures: Collection[int]
    ) -> dict[int, Standing]:
        """How the policy is to see the versions: one that serves, but has to be loaded anew, is not there yet."""
        standings: dict[int, Standing] = {}
        for version, record in self.versions.items():
            fingerprint = aspired.get(version)
            is_stale = fingerprint is not None and (
                version in forced or record.servable is None or record.servable.fingerprint != fingerprint
            )
            if record.state is ModelState.READY and not is_stale:
                standings[version] = Standing(ModelState.READY)
            elif fingerprint is not None:
                has_failed = version in failures or record.failed == fingerprint
                standings[version] = Standing(ModelState.UNAVAILABLE, has_failed)
        return standings

    async def unload(self, reason: str = UNLOADED) -> None:
        """Takes all versions away and returns when they are drained, or the time is over; within ``changing``."""
        is_serving = bool(self.ready())
        self.is_wanted = self.is_asked = self.is_waiting = False
        self.reason = ""
        await self._take_down(list(self.versions.values()), reason)
        if not is_serving:
            # No step was told, but that the model is not wanted any more changes the server's readiness.
            for entry in self.index():
                self._tell(entry)

    def fail(self, reason: str) -> None:
        """Records what is wrong with the model as a whole; what serves goes on serving."""
        self.reason = reason
        self.is_wanted = True
        for entry in self.index():
            self._tell(entry)

    def pause(self) -> None:
        """Takes no more requests, until ``unload`` or ``resume``; within ``changing``. Those under way are answered."""
        for record in self.versions.values():
            if record.state is ModelState.READY:
                self._step(record, ModelState.UNLOADING)
        self._publish()

    def resume(self) -> None:
        """Takes requests again, after ``pause``."""
        for record in self.versions.values():
            if record.state is ModelState.UNLOADING and record.servable is not None:
                self._step(record, ModelState.UNAVAILABLE, ENDED)
                if record.servable.instances.ended.done():  # while it was paused, when nobody was told
                    record.servable.abandon(ENDED)
                    record.failed, record.servable = record.servable.fingerprint, None
                else:
                    self._step(record, ModelState.LOADING)
                    self._step(record, ModelState.READY)
        self._publish()
        if self._resumed is not None:
            self._resumed.set_result(None)
            self._resumed = None

    def when_resumed(self) -> asyncio.Future[None]:
        """Done after the next ``resume``; shared: for waiting only."""
        if self._resumed is None:
            self._resumed = asyncio.get_running_loop().create_future()
        return self._resumed

    def follow_steps(self, record: VersionRecord, problem: str) -> bool:
        """Withholds an ensemble because of ``problem``, or brings it back if there is none; whether that changed it.

        The caller publishes. Its requests under way are finished: they hold leases on what they need.
        """
        if problem and record.state is ModelState.READY:
            record.is_withheld = True
            self._step(record, ModelState.UNLOADING)
            self._step(record, ModelState.UNAVAILABLE, problem)
        elif not problem and record.is_withheld and record.state is ModelState.UNAVAILABLE:
            record.is_withheld = False
            self._step(record, ModelState.LOADING)
            self._step(record, ModelState.READY)
        else:
            return False
        return True

    async def stop(self, grace_s: float) -> None:
        """Drains everything that lives within ``grace_s``, then fails what is left; never raises but when cancelled."""
        servables = {record.servable for record in self.versions.values() if record.servable is not None}
        servables |= set(self._drains)
        for record in self.versions.values():
            if record.state is ModelState.READY:
                self._step(record, ModelState.UNLOADING)
        try:
            await asyncio.gather(*(servable.drain(grace_s, STOPPING_TEXT) for servable in servables))
        finally:
            for servable in servables:
                servable.abandon(STOPPING_TEXT)
            drains = list(self._drains.values())
            for drain in drains:
                drain.cancel()
            await asyncio.gather(*drains, return_exceptions=True)
            for record in self.versions.values():
                record.servable = None
                if record.state is ModelState.UNLOADING:
                    self._step(record, ModelState.UNAVAILABLE, UNLOADED)

    async def _bring_up(self, record: VersionRecord, fingerprint: str, load: LoadVersion) -> None:
        if record.state is not ModelState.READY:
            self._step(record, ModelState.LOADING)
        try:
            servable = await load(record.version, fingerprint)
        except AiorchError as error:
            record.failed = fingerprint
            if error.told:
                logger.warning("'%s' version %d did not load: %s", self.name, record.version, error)
            self._note_failure(record, error.public_text)
            raise
        except asyncio.CancelledError:
            self._note_failure(record, "the load was cancelled")
            raise
        except Exception as error:
            logger.exception("loading '%s' version %d failed unexpectedly", self.name, record.version)
            record.failed = fingerprint
            self._note_failure(record, f"unexpected {type(error).__name__} while loading")
            raise InternalError(record.reason) from error
        former = record.servable
        record.servable, record.failed, record.is_withheld = servable, "", False
        if record.state is ModelState.UNAVAILABLE:  # the former one died while this one was loading
            self._step(record, ModelState.LOADING)
        if record.state is ModelState.LOADING:
            self._step(record, ModelState.READY)
        else:
            record.reason = ""
        self._publish()
        self._watch(record, servable)
        if former is not None:
            await self._drain(former)

    def _note_failure(self, record: VersionRecord, reason: str) -> None:
        if record.state is ModelState.LOADING:
            self._step(record, ModelState.UNAVAILABLE, reason)
        else:
            record.reason = f"still serving what was loaded before; the new one failed: {reason}"
            self._tell(self._describe(record))

    async def _take_down(self, records: list[VersionRecord], reason: str = UNLOADED) -> None:
        leaving: list[tuple[VersionRecord, Servable]] = []
        for record in records:
            record.failed = ""
            if record.state in (ModelState.READY, ModelState.UNLOADING) and record.servable is not None:
                leaving.append((record, record.servable))
                if record.state is ModelState.READY:
                    self._step(record, ModelState.UNLOADING)
            else:
                if record.is_withheld and record.servable is not None:
                    self._start_drain(record.servable)
                    record.servable, record.is_withheld = None, False
                record.reason = reason
        if not leaving:
            return
        # Unrouted before it is closed: nothing may arrive at a closed scheduler.
        self._publish()
        drains = [self._start_drain(servable) for _, servable in leaving]
        try:
            await asyncio.wait(drains)
        finally:
            for record, servable in leaving:
                if record.servable is servable:
                    record.servable = None
                if record.state is ModelState.UNLOADING:
                    self._step(record, ModelState.UNAVAILABLE, reason)

    async def _drain(self, servable: Servable) -> None:
        await asyncio.wait([self._start_drain(servable)])

    def _start_drain(self, servable: Servable) -> asyncio.Task[bool]:
        """Drains in a task of its own: cancelling who waits for it must not leave a servable half drained."""
        text = f"model '{self.name}' version {servable.version} was unloaded before the request could run"
        drain = asyncio.ensure_future(servable.drain(self._drain_timeout_s, text))
        self._drains[servable] = drain

        def finish(drain: asyncio.Task[bool]) -> None:
            self._drains.pop(servable, None)
            if drain.cancelled():
                return
            if drain.exception() is not None:
                logger.error("draining %r failed", servable, exc_info=drain.exception())
            elif not drain.result():
                logger.warning("%r did not end within %g s", servable, self._drain_timeout_s)

        drain.add_done_callback(finish)
        return drain

    def _watch(self, record: VersionRecord, servable: Servable) -> None:
        """Notices when the last instance dies by itself; the scheduler has then failed its queue already."""
        loop = asyncio.get_running_loop()

        def on_end(reason: str) -> None:
            if record.servable is not servable or record.state is not ModelState.READY:
                return
            servable.abandon(reason)
            record.servable = None
            record.failed = servable.fingerprint
            self._step(record, ModelState.UNLOADING)
            self._step(record, ModelState.UNAVAILABLE, reason or ENDED)
            self._publish()

        def tell_loop(reason: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(on_end, reason)

        servable.instances.ended.add_done_callback(lambda ended: tell_loop(ended.result()))

    def _step(self, record: VersionRecord, state: ModelState, reason: str = "") -> None:
        logger.info(
            "'%s' version %d: %s -> %s, %s%s",
            self.name,
            record.version,
            record.state.value,
            state.value,
            explain_transition(record.state, state),
            f" ({reason})" if reason else "",
        )
        record.state, record.reason = state, reason
        self._tell(self._describe(record))

    def _describe(self, record: VersionRecord) -> ModelIndexEntry:
        return ModelIndexEntry(self.name, str(record.version), record.state, record.reason or self.reason)

    def _tell(self, entry: ModelIndexEntry) -> None:
        try:
            self._observe(entry)
        except Exception:
            logger.exception("an observer of model states failed")
