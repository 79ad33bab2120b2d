"""One deployed model on this server: brought to what is wanted, and what became of it told.

The order keeps every request served: a version is loaded and warm before it has a share, and has none before it goes.
Shares among what is loaded change at once: no load that is under way holds up who is taken out of the traffic.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from aiorch_server.deployments.desired import Wanted
from aiorch_server.deployments.recorder import Recorder
from aiorch_server.deployments.sampler import Sampler
from aiorch_server.deployments.samples import name_step
from aiorch_server.deployments.shadow import Comparer
from aiorch_server.deployments.wish import CANDIDATE, STABLE
from aiorch_server.errors import AiorchError, ServerStopping
from aiorch_server.lifecycle.manager import LifecycleManager
from aiorch_server.lifecycle.model import ON_DEMAND
from aiorch_server.lifecycle.servable import Servable
from aiorch_server.registry.names import fit_text
from aiorch_server.registry.records import Manifest, RolloutState, ServerStatus, VersionStatus
from aiorch_server.repository import RegisteredModel, RegisteredRepository, RegisteredVersion
from aiorch_server.routing import Observer, Samples, Share, Traffic
from aiorch_server.types import ModelState

logger = logging.getLogger(__name__)

#: What should serve and does not is tried again after so long, then twice that, and so on.
FIRST_RETRY_S: Final = 5.0
LONGEST_RETRY_S: Final = 60.0

#: What is told to the registry of why a version does not serve.
LONGEST_REASON: Final = 2000

#: (model, version, manifest) -> how the lifecycle gets it.
FindVersion = Callable[[str, int, Manifest], RegisteredVersion]


class DeployedModel:
    """``want`` says what is wanted, a task follows, ``tell`` is called when there is news; on the event loop."""

    def __init__(
        self,
        name: str,
        manager: LifecycleManager,
        repository: RegisteredRepository,
        samples: Samples,
        find_version: FindVersion,
        tell: Callable[[], None],
    ) -> None:
        self.name = name
        self.wanted: Wanted | None = None
        self._manager = manager
        self._repository = repository
        self._samples = samples
        self._find_version = find_version
        self._tell = tell
        self._sampler = Sampler()
        self._recorder = Recorder()
        self._observed = 0
        self._tried: frozenset[int] = frozenset()
        self._problem = ""
        self._put: dict[int, RegisteredVersion] = {}
        self._news = asyncio.Event()
        self._settled = asyncio.Event()
        #: When what is missing is tried again, 0: nothing is.
        self._retry_s = 0.0
        self._task = asyncio.create_task(self._follow())

    def want(self, wanted: Wanted | None) -> None:
        """From now on this is wanted; None: nothing, and the model is gone when ``settle`` returns."""
        if wanted is not None and self.wanted is not None and wanted.mark == self.wanted.mark:
            return
        former = self.wanted
        if wanted is not None and former is not None and wanted.deployment.rollout != former.deployment.rollout:
            self._tried = frozenset()  # what failed before is tried again
        self.wanted = wanted
        self._settled.clear()
        self._news.set()
        if not self._manager.is_own(self.name):
            self._manager.withhold(self.name, wanted is None)
            if wanted is not None:
                self._share(wanted)

    def look(self) -> None:
        """Whether all that should serve still does: what has died meanwhile is loaded again, after a while."""
        if self._settled.is_set() and not self._retry_s and self._find_missing():
            self._news.set()

    async def settle(self) -> None:
        """Returns when what is wanted was made so, or has failed."""
        await self._settled.wait()

    @property
    def is_settled(self) -> bool:
        """Whether what is wanted was made so, or has failed."""
        return self._settled.is_set()

    async def stop(self) -> None:
        """Follows no more; what serves goes on serving."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._samples.set_sampling(self.name)

    def status(self) -> ServerStatus:
        """What became of it, and what was measured."""
        deployment = None if self.wanted is None else self.wanted.deployment
        loaded = () if deployment is None else deployment.loaded
        rows = [] if self._manager.is_own(self.name) else self._manager.index_model(self.name)
        entries = {int(each.version): each for each in rows if each.version}
        versions = []
        for version in sorted({*entries, *loaded}):
            entry = entries.get(version)
            if entry is not None and (version in loaded or entry.state is not ModelState.UNAVAILABLE):
                is_stale = entry.state is ModelState.UNAVAILABLE and version not in self._tried
                if not is_stale:  # what it failed of before it was wanted again says nothing
                    versions.append(VersionStatus(version, entry.state.value, _fit(entry.reason)))
            elif entry is None and version in self._tried:
                is_left = self.wanted is not None and _is_on_demand(self.wanted)
                reason = _fit(self._problem) or (ON_DEMAND if is_left else "not loaded")
                versions.append(VersionStatus(version, ModelState.UNAVAILABLE.value, reason))
        samples = self._sampler.read(self._manager.ready(self.name)).to_json() if self._sampler.step else ""
        return ServerStatus("", self.name, self._observed, tuple(versions), datetime.now(UTC), samples)

    async def _follow(self) -> None:
        try:
            await self._follow_news()
        finally:
            self._settled.set()  # nobody may wait for it any more

    async def _follow_news(self) -> None:
        while True:
            if not self._news.is_set():
                try:
                    async with asyncio.timeout(self._retry_s or None):
                        await self._news.wait()
                except TimeoutError:
                    await self._try(is_retry=True)
                    self._retry_s = min(self._retry_s * 2, LONGEST_RETRY_S) if self._find_missing() else 0.0
                    continue
            self._news.clear()
            await self._try(is_retry=False)
            self._retry_s = FIRST_RETRY_S if self._find_missing() else 0.0

    async def _try(self, *, is_retry: bool) -> None:
        wanted = self.wanted
        try:
            await (self._withdraw() if wanted is None else self._apply(wanted, is_retry=is_retry))
        except (asyncio.CancelledError, ServerStopping):
            raise
        except Exception as error:
            logger.exception("'%s' could not be brought to what is deployed", self.name)
            self._problem = f"unexpected {type(error).__name__}"
        if wanted is not None and wanted is self.wanted:
            self._tried = frozenset(wanted.deployment.loaded)
            self._observed = wanted.deployment.generation
        if not self._news.is_set():
            self._settled.set()
        self._tell()

    async def _apply(self, wanted: Wanted, *, is_retry: bool) -> None:
        deployment = wanted.deployment
        if not deployment.loaded:
            await self._withdraw()
            return
        if self._manager.is_own(self.name):
            self._problem = (
                "the model repository's folder holds a model of this name, too; remove it, or undeploy this one"
            )
            return
        ready = self._manager.ready(self.name)
        self._share(wanted)
        is_asked = is_retry or not set(deployment.loaded) <= self._tried
        kept = set(ready) - set(deployment.loaded)
        proven = set(deployment.loaded) - _list_candidates(wanted)
        if not ready and proven:  # or a candidate that is loaded first has all requests meanwhile
            await self._load(wanted, proven, set(), is_asked=is_asked)
        if self.wanted is wanted:
            await self._load(wanted, set(deployment.loaded), kept, is_asked=is_asked)
        fresh = [version for version in self._manager.ready(self.name) if version not in ready]
        if ready:
            for version in fresh:
                count = await self._recorder.warm(version)
                logger.info("'%s' version %d: warm with %d recorded requests", self.name, version, count)
        if self.wanted is not wanted:  # its shares hold already, and these would take them back
            return
        if self._share(wanted) and kept:
            await self._load(wanted, set(deployment.loaded), set(), is_asked=False)
        if self.wanted is not wanted:
            return
        self._measure(wanted)
        if wanted.rollout is not None and wanted.rollout.state is RolloutState.PENDING:
            await self._recorder.fill(self._count_answers)

    def _count_answers(self) -> int:
        ready = self._manager.ready(self.name).values()
        return sum(each.scheduler.counters().success.count for each in ready)

    def _share(self, wanted: Wanted) -> bool:
        """Sets the traffic, if somebody is there to take it, or nobody serves at all; gives whether it did."""
        deployment = wanted.deployment
        ready = self._manager.ready(self.name)
        shares = tuple(Share(each.version, each.share) for each in deployment.traffic)
        if not shares or (ready and not any(each.share and each.version in ready for each in shares)):
            return False
        traffic = Traffic(shares, is_sticky=deployment.is_sticky, sampled=deployment.sampled)
        self._samples.set_sampling(self.name, *self._list_observers(wanted))
        self._manager.set_traffic(self.name, traffic)
        return True

    def _list_observers(self, wanted: Wanted) -> list[Observer]:
        deployment, rollout = wanted.deployment, wanted.rollout
        if not deployment.sampled:
            return []
        if not deployment.shadow or rollout is None:
            return [self._recorder]
        candidate = rollout.to_version

        def note(difference: str) -> None:
            self._sampler.note(candidate, difference)

        return [self._recorder, Comparer(rollout.from_version, candidate, rollout.plan.gates, note)]

    def _measure(self, wanted: Wanted) -> None:
        rollout, deployment = wanted.rollout, wanted.deployment
        is_step = rollout is not None and rollout.step_began_at is not None and len(deployment.loaded) > 1
        idle = [each.version for each in deployment.traffic if each.tag == STABLE and not each.share]
        step = name_step(rollout) if rollout is not None and is_step else ""
        self._sampler.begin(step, self._manager.ready(self.name), whole=idle)

    async def _load(self, wanted: Wanted, versions: set[int], kept: set[int], *, is_asked: bool) -> None:
        """Loads ``versions``, and takes away all others that are not ``kept``; a failure is noted."""
        found = {version: self._put[version] for version in kept if version in self._put}
        for version in versions:
            manifest = wanted.manifests.get(version)
            if manifest is not None:
                found[version] = self._find_version(self.name, version, manifest)
        self._put = found
        self._repository.put(self.name, RegisteredModel(found, wanted.deployment.instances))
        self._problem = "" if versions <= found.keys() else "it is not in the registry"
        try:
            await self._manager.apply(self.name, is_asked=is_asked, is_on_demand=_is_on_demand(wanted))
        except ServerStopping:
            raise
        except AiorchError as error:
            self._problem = error.public_text
            logger.error("%s", error)

    async def _withdraw(self) -> None:
        self._repository.remove(self.name)
        self._put = {}
        try:
            await self._manager.withdraw(self.name)
        finally:  # also where the folder cannot be looked at: a model of that name may come back
            self._manager.set_traffic(self.name, None)
            self._samples.set_sampling(self.name)
            self._sampler.begin("", {})

    def _find_missing(self) -> list[int]:
        """What should serve and does not; candidates are not tried again: their rollout decides."""
        if self.wanted is None or _is_on_demand(self.wanted):
            return []
        candidates = _list_candidates(self.wanted)
        ready: dict[int, Servable] = dict(self._manager.ready(self.name))
        return [each for each in self.wanted.deployment.loaded if each not in ready and each not in candidates]


def _fit(reason: str) -> str:
    # Models say what they like, and no word of theirs may keep this server's report from being written.
    return fit_text(reason, LONGEST_REASON)


def _list_candidates(wanted: Wanted) -> set[int]:
    """What a rollout decides about; a tag that a person gave a share by hand is but a name."""
    if wanted.rollout is None:
        return set()
    return {each.version for each in wanted.deployment.traffic if each.tag == CANDIDATE}


def _is_on_demand(wanted: Wanted) -> bool:
    """Whether requests load it, and it may be evicted: not while a rollout measures it."""
    return wanted.deployment.is_on_demand and wanted.rollout is None
