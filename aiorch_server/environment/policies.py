"""Who chooses: constant knobs, the rules of other servers, the server's own tuner, and what was learnt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from aiorch_server.config.objective import Objective
from aiorch_server.environment.batching import Action, BatchingEnvironment, Observation
from aiorch_server.environment.knobs import Choice
from aiorch_server.environment.learned import Network, read_network
from aiorch_server.environment.workload import LARGEST_ROWS, MOST_INSTANCES
from aiorch_server.optimizer.baselines import LOOK_S, RULES
from aiorch_server.optimizer.tuned import TunedVersion
from aiorch_server.types import BatchingPolicy, SchedulerObservation


class Policy(Protocol):
    """Acts once in each window of ``window_s``; sees the observation, and may look into the environment for more."""

    window_s: float

    def begin(self, environment: BatchingEnvironment) -> None:
        """An episode has begun."""
        ...

    def act(self, observation: Observation) -> Action:
        """The knobs of the next window."""
        ...


class Constant:
    """The same knobs all the time, as a configuration says them."""

    window_s = 1.0

    def __init__(self, choice: Choice) -> None:
        self._choice = choice

    def begin(self, environment: BatchingEnvironment) -> None:
        """Puts them in the target's units."""
        self._action = self._choice.encode(environment.workload.target_us)

    def act(self, observation: Observation) -> Action:
        """Those."""
        return self._action


class Ruled:
    """The rule of another server (optimizer.baselines), which goes by short windows; instances are not its business."""

    window_s = LOOK_S

    def __init__(self, name: str, instances: int) -> None:
        self._name, self._instances = name, instances

    def begin(self, environment: BatchingEnvironment) -> None:
        """A new one."""
        self._environment = environment
        self._rule = RULES[self._name](LARGEST_ROWS, environment.workload.target_us)

    def act(self, observation: Observation) -> Action:
        """What it makes of the last window."""
        if (window := self._environment.window) is not None:
            self._rule.step(window)
        wanted = self._rule.setting
        choice = Choice(wanted.max_rows, wanted.delay_us, self._instances, bool(wanted.curve))
        return choice.encode(self._environment.workload.target_us)


class Auto:
    """The server's own tuner, with an objective of p99; it begins with one instance."""

    window_s = 1.0

    def begin(self, environment: BatchingEnvironment) -> None:
        """A new one, which knows nothing yet."""
        self._target_us = environment.workload.target_us
        self._levers = _Recorder(environment)
        self._tuned = TunedVersion(
            "simulated",
            1,
            self._levers,
            Objective(latency_us=self._target_us, max_instances=MOST_INSTANCES),
            cores=MOST_INSTANCES,
            written_instances=1,
            now_s=lambda: environment.seen.at_ns / 1e9,
        )

    def act(self, observation: Observation) -> Action:
        """Its next look, and its move if there is one."""
        asyncio.run(self._tuned.tick())
        return self._levers.choice.encode(self._target_us)


class Learned:
    """A small network; by itself the one that comes with the package."""

    window_s = 1.0

    def __init__(self, network: Network | None = None) -> None:
        self._network = network or read_network()

    def begin(self, environment: BatchingEnvironment) -> None:
        """It remembers nothing."""

    def act(self, observation: Observation) -> Action:
        """What it makes of this observation."""
        return self._network.act(observation)


@dataclass(slots=True)
class _Recorder:
    """Levers that only note what is wanted: it is done with the next step. Run times are the environment's own."""

    environment: BatchingEnvironment
    choice: Choice = field(default_factory=Choice)

    @property
    def largest_rows(self) -> int:
        return LARGEST_ROWS

    @property
    def serving(self) -> int:
        return self.choice.instances

    @property
    def can_grow(self) -> bool:
        return True

    def observe(self) -> SchedulerObservation:
        return self.environment.seen

    def policy(self) -> BatchingPolicy:
        it = self.choice
        return BatchingPolicy(it.max_rows, it.delay_us, 0, 0, it.is_refusing, it.is_refusing, 0, ())

    def set_policy(
        self,
        *,
        max_rows: int | None = None,
        delay_us: int | None = None,
        target_us: int | None = None,
        margin_us: int | None = None,
        is_deferring: bool | None = None,
        is_shedding: bool | None = None,
        curve: tuple[tuple[int, int], ...] | None = None,
    ) -> None:
        it = self.choice
        self.choice = Choice(
            it.max_rows if max_rows is None else max_rows,
            it.delay_us if delay_us is None else delay_us,
            it.instances,
            it.is_refusing if is_shedding is None else is_shedding,
        )

    async def set_instances(self, count: int) -> None:
        self.choice = replace(self.choice, instances=count)


#: What to compare with, for so many instances where a policy does not choose them itself.
POLICIES: Final[Mapping[str, Callable[[int], Policy]]] = {
    "none": lambda instances: Constant(Choice(1, 0, instances)),
    "greedy": lambda instances: Constant(Choice(LARGEST_ROWS, 0, instances)),
    "fixed": lambda instances: Constant(Choice(LARGEST_ROWS, 5000, instances)),
    "refusing": lambda instances: Constant(Choice(LARGEST_ROWS, 0, instances, is_refusing=True)),
    "aimd": lambda instances: Ruled("aimd", instances),
    "linear": lambda instances: Ruled("linear", instances),
    "auto": lambda instances: Auto(),
    "learned": lambda instances: Learned(),
}
