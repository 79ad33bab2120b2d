"""Keeps what is loaded within the memory budgets: a load gets room first, if need be from models that rest.

Only models that are loaded on demand are evicted, first those that nobody uses, the least recently used before others:
no lease, nothing queued or running, no sequence under way, nobody waiting for them. Where all are in use, those whose
turn is over go, the longest loaded first: see turns.py. An ensemble goes before its steps, and keeps them while it is
in use or always loaded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from aiorch_server.errors import MemoryBudgetExceeded
from aiorch_server.lifecycle.loader import Loader, Source
from aiorch_server.lifecycle.memory import CPU, Charge, Holding, MemoryLedger, add_charges, write_size
from aiorch_server.lifecycle.model import ManagedModel
from aiorch_server.lifecycle.scale import Scale
from aiorch_server.lifecycle.servable import Servable
from aiorch_server.lifecycle.threads import run_blocking
from aiorch_server.lifecycle.turns import LONGEST_PAUSE_S, LOOK_S, Turns

logger = logging.getLogger(__name__)

EVICTED = "on demand: evicted to make room for {}; the next request loads it"

#: Unloads a model for the reason given, drained.
Evict = Callable[[ManagedModel, str], Awaitable[None]]
#: Models that go together.
Group = Iterable[ManagedModel]
Choice = Callable[[Group], bool]
Order = Callable[[Group], float]


@dataclass(frozen=True, slots=True)
class MemoryTerms:
    """``budgets`` are bytes by device. A model stays for ``residence_s`` at least; ``patience_s``: longest wait for
    room while models that could be evicted are in use, but for the end of a turn.
    """

    budgets: Mapping[str, int]
    residence_s: float = 5.0
    patience_s: float = 10.0


class Residents:
    """Over the manager's own table of models; for the event loop's thread."""

    def __init__(self, models: Mapping[str, ManagedModel], loader: Loader, evict: Evict, terms: MemoryTerms) -> None:
        self.ledger = MemoryLedger(terms.budgets)
        self._models = models
        self._loader = loader
        self._evict = evict
        self._terms = terms
        self._scale = Scale()
        self._turns = Turns(terms.residence_s)
        #: Models that had to go so far.
        self.evictions = 0

    async def load(self, source: Source, version: int, fingerprint: str) -> Servable:
        """As ``Loader.load``, with room made before, and what it took charged to it until its last instance ended.

        Raises MemoryBudgetExceeded where there is no room, and none can be made.
        """
        name = source.model.name
        label = f"{name}:{version}"
        weight = await run_blocking(f"weigh {label}", lambda: self._loader.weigh(source, version))
        need = dict(weight.charge)
        known = self._scale.recall(name, version, fingerprint)
        if known is not None and CPU in need:
            # A measurement has noise: alone it refuses nobody, but asks for all there is.
            need[CPU] = max(weight.files_bytes, min(known, self.ledger.budgets.get(CPU, known)))
        holding = await self._make_room(label, need)
        try:
            with self._scale.weighing() as weighing:
                servable = await self._loader.load(source, version, fingerprint)
        except BaseException:
            holding.release()
            raise
        servable.instances.ended.add_done_callback(lambda _: holding.release())
        taken = self._scale.judge(weighing, servable.config.backend)
        if taken is not None and CPU in need:
            holding.settle({**need, CPU: max(weight.files_bytes, taken)})
            self._scale.remember(name, version, fingerprint, holding.charge[CPU])
        servable.memory = holding
        try:
            await self._shed(label)
        except BaseException:
            servable.abandon(f"the load of '{label}' was given up")
            raise
        return servable

    async def _make_room(self, label: str, need: Charge) -> Holding:
        until = self._find_latest(need)
        while (holding := self.ledger.take(label, need)) is None:
            lacks = self.ledger.find_lack(need)
            resting = self._choose(lacks, self._is_resting, _find_last_use)
            if resting is not None:
                await self._send_away(resting, label)
            elif self._choose(lacks, lambda _: True) is None or time.monotonic() >= until:
                raise MemoryBudgetExceeded(self.ledger.explain(label, need))
            elif (serving := self._choose(lacks, self._is_turn_over, _find_load)) is not None:
                await self._end_turns(serving, label)
            else:
                await asyncio.sleep(LOOK_S)
        return holding

    def _find_latest(self, need: Charge) -> float:
        """How long room is waited for: whose load takes long has long turns, and who waits for one sees its end."""
        serving = self._choose(self.ledger.find_lack(need), lambda _: True, _find_load) or ()
        turn_s = max(map(self._turns.find_end, serving), default=0.0) + LONGEST_PAUSE_S
        return max(time.monotonic() + self._terms.patience_s, turn_s)

    async def _shed(self, label: str) -> None:
        """Where a model took more than was thought, others go; what serves on demand alone may still be too much."""
        excess = self.ledger.find_excess()
        if not excess:
            return
        chosen = self._choose(excess, self._is_resting, _find_last_use)
        if chosen is not None:
            await self._send_away(chosen, label)
        for device, size in self.ledger.find_excess().items():
            logger.warning(
                "%s: %s more than the memory budget of %s is in use since '%s' was loaded: %s",
                device,
                write_size(size),
                write_size(self.ledger.budgets[device]),
                label,
                self.ledger.list_holders(device),
            )

    def _choose(self, lacks: Charge, may_go: Choice, order: Order | None = None) -> list[ManagedModel] | None:
        """The models to evict so that there are ``lacks`` bytes more, in that order; None if it cannot be done."""
        groups = []
        dependents = self._list_dependents()
        for model in self._models.values():
            if not any(add_charges(_list_charges([model])).get(device) for device in lacks):
                continue
            group = _find_group(model, dependents)
            if all(each.is_on_demand for each in group) and may_go(group):
                groups.append(group)
        if order is not None:
            groups.sort(key=order)
        chosen: dict[str, ManagedModel] = {}
        for group in groups:
            freed = add_charges(_list_charges(chosen.values()))
            if all(freed.get(device, 0) >= size for device, size in lacks.items()):
                break
            chosen.update((each.name, each) for each in reversed(group))
        freed = add_charges(_list_charges(chosen.values()))
        return list(chosen.values()) if all(freed.get(device, 0) >= size for device, size in lacks.items()) else None

    def _list_dependents(self) -> dict[str, list[ManagedModel]]:
        """The ensembles that need each model."""
        dependents: dict[str, list[ManagedModel]] = {}
        for each in self._models.values():
            if each.needs_its_steps:
                for name in {key[0] for key in each.requires}:
                    dependents.setdefault(name, []).append(each)
        return dependents

    def _is_resting(self, group: Group) -> bool:
        latest = time.monotonic() - self._terms.residence_s
        return all(
            each.is_idle and all(servable.loaded_at <= latest for servable in each.servables()) for each in group
        )

    def _is_turn_over(self, group: Group) -> bool:
        return all(self._turns.is_over(each) for each in group)

    async def _end_turns(self, models: list[ManagedModel], label: str) -> None:
        for model in models:
            if not await self._turns.end(model, EVICTED.format(f"'{label}'")):
                return
            logger.info("'%s' was in use and is evicted: it is the turn of '%s'", model.name, label)
            self.evictions += 1

    async def _send_away(self, models: list[ManagedModel], label: str) -> None:
        for model in models:
            if not model.is_idle:  # somebody came while another one was drained
                return
            logger.info("'%s' is evicted: '%s' needs its room", model.name, label)
            self.evictions += 1
            await self._evict(model, EVICTED.format(f"'{label}'"))


def _find_group(model: ManagedModel, dependents: Mapping[str, list[ManagedModel]]) -> list[ManagedModel]:
    """The model and the ensembles that need it, however far, those last."""
    group = {model.name: model}
    names = [model.name]
    while names:
        for each in dependents.get(names.pop(), ()):
            if each.name not in group:
                group[each.name] = each
                names.append(each.name)
    return list(group.values())


def _list_charges(models: Iterable[ManagedModel]) -> Iterable[Charge]:
    return [each.memory.charge for model in models for each in model.servables() if each.memory is not None]


def _find_last_use(group: Group) -> float:
    """When one of them was used or loaded last, in milliseconds of the clock that statistics have."""
    return max(
        (
            max(servable.statistics().last_inference_ms, servable.loaded_ms)
            for model in group
            for servable in model.servables()
        ),
        default=0,
    )


def _find_load(group: Group) -> float:
    """When the last of them was loaded."""
    return max((each.loaded_at for model in group for each in model.servables()), default=0.0)
