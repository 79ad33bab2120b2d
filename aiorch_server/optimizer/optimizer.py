"""Looks at each live model version about once a second and lets its tuner move what is worth moving."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from aiorch_server._core import Scheduler
from aiorch_server.config.objective import POLICIES, POLICY, Objective, read_fields, read_objective
from aiorch_server.errors import AiorchError, ModelNotReady
from aiorch_server.execution.thread_executor import InstanceGroup
from aiorch_server.lifecycle.servable import Servable
from aiorch_server.lifecycle.threads import run_blocking
from aiorch_server.optimizer.baselines import RULES, RuledVersion
from aiorch_server.optimizer.budget import share_instances
from aiorch_server.optimizer.tuned import Decision, TunedVersion
from aiorch_server.optimizer.window import Window
from aiorch_server.types import BatchingPolicy, SchedulerObservation

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 1.0
#: How long a new objective of an operator may take to be heard of.
READ_S: Final = 5.0
#: So long a server waits for one more instance to load.
_LOAD_S: Final = 300.0


class ServableLevers:
    """A servable with one queue as a tuner has it; see ``tuned.Levers``."""

    def __init__(self, servable: Servable) -> None:
        scheduler, instances = servable.plain_scheduler, servable.instances
        assert scheduler is not None
        assert isinstance(instances, InstanceGroup)
        self._label = f"{servable.name}:{servable.version}"
        self._scheduler: Scheduler = scheduler
        self._group: InstanceGroup = instances
        self._is_budgeted = servable.memory is not None and servable.memory.is_budgeted
        self.largest_rows = max(1, servable.signature.max_batch_size)
        self.observe: Callable[[], SchedulerObservation] = scheduler.observe
        self.read_arrivals: Callable[[], int] = scheduler.read_arrivals
        self.policy: Callable[[], BatchingPolicy] = scheduler.policy
        self.set_policy = scheduler.set_policy

    @property
    def serving(self) -> int:
        """Instances that take batches."""
        return self._group.serving

    @property
    def can_grow(self) -> bool:
        """Whether instances may come and go: not where memory is budgeted, of which they would take some unasked."""
        return self._group.can_grow and not self._is_budgeted

    async def set_instances(self, count: int) -> None:
        """Loads one after another, or lets go; raises what the load of one raises."""
        for _ in range(count - self._group.serving):
            await run_blocking(f"grow {self._label}", lambda: self._group.grow(timeout_s=_LOAD_S))
        for _ in range(self._group.serving - count):
            if not self._group.shrink():
                raise ModelNotReady(f"'{self._label}' keeps its last instance")


@dataclass(frozen=True, slots=True)
class Account:
    """What ``explain`` tells of one version: where knobs stand, what is asked, and the last decisions, oldest first."""

    model: str
    version: int
    objective: Objective
    state: str
    knobs: Mapping[str, float]
    percentile_us: float
    rate: float
    decisions: tuple[Decision, ...]


class Tuning(Protocol):
    """A version whose knobs are moved, by the tuner or by one of the rules that it is compared with."""

    name: str
    version: int
    objective: Objective
    window: Window | None
    decisions: deque[Decision]

    @property
    def state(self) -> str:
        """What it waits for, in a word."""
        ...

    @property
    def rate(self) -> float:
        """Requests/s lately."""
        ...

    @property
    def knobs(self) -> dict[str, float]:
        """Where they stand."""
        ...

    async def tick(self) -> None:
        """Looks, and makes what moves are due."""
        ...

    def give_back(self, written: BatchingPolicy) -> None:
        """Lets the version batch as it was written."""
        ...


@dataclass(slots=True)
class _Entry:
    servable: Servable
    written: BatchingPolicy
    instances: int  # as written, too
    tuned: Tuning
    read_arrivals: Callable[[], int]
    arrivals: int = -1  # when it was looked at last; a version to which nothing comes is not
    task: asyncio.Task[None] | None = None


class Optimizer:
    """For the event loop's thread; nothing is moved before ``start``, and all stays as it is after ``stop``.

    ``list_servables`` gives what serves now. ``read_objectives`` gives those that operators have set for models, as
    fields of tuning.proto; they win over the configuration's. Where that fails, what it gave last holds.
    All versions with a target together get ``max_instances`` (0: as many as ``cores``), or what their objectives say as
    the least. Without an objective a model's cap is kept at the knee of its curve, unless its configuration says what
    sizes it prefers. Models are left alone that say ``tuning: off``, or have no one queue of their own (ensembles,
    sequences).
    """

    def __init__(
        self,
        list_servables: Callable[[], Iterable[Servable]],
        *,
        cores: int,
        max_instances: int = 0,
        interval_s: float = INTERVAL_S,
        read_objectives: Callable[[], Awaitable[Mapping[str, Mapping[str, Any]]]] | None = None,
    ) -> None:
        self._list_servables, self._read_objectives = list_servables, read_objectives
        self._cores, self._interval_s = cores, interval_s
        self._budget = max_instances or cores
        self._objectives: dict[str, Objective] = {}
        self._read_at_s = -math.inf
        self._written: dict[int, tuple[Servable, Objective, bool]] = {}  # what configurations say, read once
        self._returns: set[asyncio.Task[None]] = set()
        self._entries: dict[int, _Entry] = {}  # by id of the servable, which the entry holds
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From now on knobs are moved."""
        self._task = asyncio.create_task(self._run(), name="optimizer")

    async def stop(self) -> None:
        """Ends; a move under way is given up."""
        if self._task is not None:
            tasks = [self._task, *(entry.task for entry in self._entries.values() if entry.task is not None)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._task = None

    def explain(self, model: str = "") -> list[Account]:
        """What is known of each tuned version of a model, or of all."""
        return [_describe(entry) for entry in self._entries.values() if model in ("", entry.servable.name)]

    def list_tuned(self) -> list[TunedVersion]:
        """The versions that a tuner has, those that came last at the end; none that follow another server's rule."""
        kept = tuple(self._entries.values())
        return [it.tuned for it in kept if isinstance(it.tuned, TunedVersion) and it.servable.is_open]

    async def tick(self) -> None:
        """One look at everything; a version's error is logged and hinders no other."""
        if self._read_objectives is not None and time.monotonic() - self._read_at_s >= READ_S:
            self._read_at_s = time.monotonic()
            try:
                found = await self._read_objectives()
            except AiorchError as error:
                logger.warning("objectives cannot be read, those known hold: %s", error)
            else:
                self._objectives = {model: read_fields(fields) for model, fields in found.items()}
        self._follow()
        self._share_instances()
        for entry in self._entries.values():
            if entry.task is not None and not entry.task.done():  # a move may take as long as an instance takes to load
                continue
            arrivals, before = entry.read_arrivals(), entry.arrivals
            entry.arrivals, entry.task = arrivals, None
            if arrivals != before:
                entry.task = asyncio.create_task(_tick(entry))
        if tasks := [entry.task for entry in self._entries.values() if entry.task is not None]:
            await asyncio.wait(tasks, timeout=self._interval_s)

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            try:
                await self.tick()
            except Exception:
                logger.exception("the optimizer's look at the models failed; the next one comes in due time")
            await asyncio.sleep(max(0.1, self._interval_s - (time.monotonic() - began)))

    def _share_instances(self) -> None:
        entries = [
            (entry, entry.tuned)
            for entry in self._entries.values()
            if isinstance(entry.tuned, TunedVersion) and entry.tuned.objective.latency_us
        ]
        claims = [
            # to whom nothing comes misses nothing
            tuned.claim if entry.read_arrivals() != entry.arrivals else replace(tuned.claim, is_short=False)
            for entry, tuned in entries
        ]
        shares = share_instances(claims, self._budget)
        for (_, tuned), limit in zip(entries, shares.limits, strict=True):
            tuned.limit_instances(limit)
        if shares.giver is not None and shares.taker is not None:
            giver, taker = entries[shares.giver][0], entries[shares.taker][1]
            if giver.task is None or giver.task.done():
                giver.task = asyncio.create_task(_give_up(giver, taker.name))

    def _follow(self) -> None:
        """Takes up what has come, drops what has gone, and begins anew where the objective has changed."""
        live = {}
        self._written = {id(each): self._written.get(id(each)) or _read(each) for each in self._list_servables()}
        for key, (each, objective, is_left_alone) in self._written.items():
            objective = self._objectives.get(each.name, objective)
            if each.is_open and not is_left_alone and (objective != Objective() or _can_have_knee(each)):
                live[key] = each, objective
        for key in self._entries.keys() - live.keys():
            gone = self._entries.pop(key)
            if gone.task is not None:
                gone.task.cancel()
            if gone.servable.is_open:
                gone.tuned.give_back(gone.written)
                self._returns.add(task := asyncio.create_task(_return_instances(gone)))
                task.add_done_callback(self._returns.discard)
        for key, (servable, objective) in live.items():
            entry = self._entries.get(key)
            if entry is not None and entry.tuned.objective == objective:
                continue
            levers = ServableLevers(servable)
            written = levers.policy() if entry is None else entry.written
            instances = levers.serving if entry is None else entry.instances
            if entry is not None:
                entry.tuned.give_back(written)
                if entry.task is not None:
                    entry.task.cancel()
            tuned = self._tune(servable, levers, objective, instances)
            self._entries[key] = _Entry(servable, written, instances, tuned, levers.read_arrivals)

    def _tune(self, servable: Servable, levers: ServableLevers, objective: Objective, instances: int) -> Tuning:
        policy = _read_policy(servable)
        if policy in RULES:
            return RuledVersion(
                servable.name, servable.version, levers, objective, policy, on_decision=_log_decision
            )  # fmt: skip
        return TunedVersion(
            servable.name,
            servable.version,
            levers,
            objective,
            cores=self._cores,
            written_instances=instances,
            on_decision=_log_decision,
        )


async def _tick(entry: _Entry) -> None:
    """An error is logged, and hinders no other version."""
    try:
        await entry.tuned.tick()
    except Exception:
        logger.exception("'%s:%d' could not be tuned", entry.servable.name, entry.servable.version)


async def _give_up(entry: _Entry, to: str) -> None:
    assert isinstance(entry.tuned, TunedVersion)
    try:
        await entry.tuned.give_up_instance(to)
    except Exception:
        logger.exception("'%s:%d' could not give up an instance", entry.servable.name, entry.servable.version)


async def _return_instances(entry: _Entry) -> None:
    try:
        await ServableLevers(entry.servable).set_instances(entry.instances)
    except AiorchError as error:
        logger.warning("'%s:%d' keeps its instances: %s", entry.servable.name, entry.servable.version, error)


def _read(servable: Servable) -> tuple[Servable, Objective, bool]:
    """With what its configuration asks for, and whether it is to be left alone."""
    return servable, read_objective(servable.config.to_strings()), not _can_be_tuned(servable)


def _can_have_knee(servable: Servable) -> bool:
    batching = servable.config.dynamic_batching
    if _read_policy(servable) != POLICIES[0]:
        return False
    return servable.signature.max_batch_size > 1 and not (batching and batching.preferred_batch_size)


def _can_be_tuned(servable: Servable) -> bool:
    if servable.plain_scheduler is None or not isinstance(servable.instances, InstanceGroup):
        return False
    if servable.signature.is_decoupled or not servable.instances.is_batched:
        return False
    return _read_policy(servable) != "off"


def _read_policy(servable: Servable) -> str:
    return servable.config.to_strings().get(POLICY, POLICIES[0])


def _log_decision(tuned: Tuning, decision: Decision) -> None:
    logger.info(
        "'%s:%d': %s %g -> %g: %s",
        tuned.name, tuned.version, decision.knob, decision.before, decision.after, decision.reason,
    )  # fmt: skip


def _describe(entry: _Entry) -> Account:
    tuned = entry.tuned
    found = tuned.window.percentile(tuned.objective.percentile / 100.0) if tuned.window is not None else None
    return Account(
        entry.servable.name,
        entry.servable.version,
        tuned.objective,
        tuned.state,
        tuned.knobs,
        found.value_ns / 1e3 if found is not None else 0.0,
        tuned.rate,
        tuple(tuned.decisions),
    )
