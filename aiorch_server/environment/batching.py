"""The simulated server as an environment of Gymnasium: choose its knobs once a window."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import numpy.typing as npt

from aiorch_server.environment.knobs import HIGHEST, NAMES, SHAPE, Choice, look
from aiorch_server.environment.workload import KINDS, Workload, draw_workload
from aiorch_server.optimizer.simulated import SimulatedVersion
from aiorch_server.optimizer.window import Window
from aiorch_server.types import BatchingPolicy, SchedulerObservation

Observation = npt.NDArray[np.float32]
Action = npt.NDArray[np.int64]
#: Of the target, kept free where requests are refused by it; as tuners have it.
_MARGIN = 0.05


class BatchingEnvironment(gymnasium.Env[Observation, Action]):
    """One model version under an objective; see ``knobs`` for what is seen and moved.

    The server's own queue, batches and forecasts decide what becomes of each request; queue and runs go on from window
    to window. A window's reward is what was answered in time, in parts of what a second brings in the mean, less the
    instances' cost. An episode has a workload of its own, the same for the same seed, and is over after ``duration_s``.

    ``kind`` of traffic and ``cost`` of an instance are drawn or usual where nothing is said; ``options`` of ``reset``
    may bring a whole ``workload``. ``info`` has numbers of the workload, and counts of the window that has passed.
    Rules that need more find it in ``workload``, ``choice``, ``seen`` and ``window``, which only last until the next
    step.
    """

    def __init__(
        self,
        duration_s: float = 60.0,
        window_s: float = 1.0,
        kind: str = "",
        cost: float | None = None,
    ) -> None:
        if not 0 < window_s <= duration_s <= 86_400:
            raise ValueError(
                f"found windows of {window_s} s in {duration_s} s; a window lies within an episode of a day"
            )
        if kind not in ("", *KINDS):
            raise ValueError(f"'{kind}' is no kind of traffic; one of {', '.join(KINDS)} is right")
        self.observation_space = gymnasium.spaces.Box(0.0, HIGHEST, (len(NAMES),), np.float32)
        self.action_space = gymnasium.spaces.MultiDiscrete(list(SHAPE))
        self._duration_s, self._window_s, self._kind, self._cost = duration_s, window_s, kind, cost
        self._workload: Workload | None = None
        self._choice = Choice()
        self._window: Window | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begins anew with batches of what waits, one instance, and nobody refused."""
        super().reset(seed=seed)
        given = (options or {}).get("workload")
        self._workload = work = given or draw_workload(
            self.np_random, self._duration_s, kind=self._kind, cost=self._cost
        )
        policy = BatchingPolicy(
            max_rows=work.machine.largest_rows,
            delay_us=0,
            target_us=work.target_us,
            margin_us=round(work.target_us * _MARGIN),
            is_deferring=False,
            is_shedding=False,
            instances=0,
            curve=work.machine.curve_of(1),
        )
        self._version = SimulatedVersion(work.machine, work.times_ns, work.rows, policy=policy)
        self._choice = Choice()
        self._seen = self._version.observe()
        self._window = None
        self._windows = 0
        return look(work, self._choice, None), self._tell()

    def step(self, action: Action) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Lets one window pass with these knobs; ValueError where it is no action, or before ``reset``."""
        work = self.workload
        choice = Choice.decode(action, work.target_us)
        if choice != self._choice:
            self._version.set_policy(
                max_rows=choice.max_rows,
                delay_us=choice.delay_us,
                is_shedding=choice.is_refusing,
                is_deferring=choice.is_refusing,
                curve=work.machine.curve_of(choice.instances),
            )
            self._version.put_instances(choice.instances)
            self._choice = choice
        self._windows += 1
        before = self._seen
        self._version.advance(self._windows * self._window_s)
        self._seen = self._version.observe()
        self._window = window = Window.between(before, self._seen)
        reward = window.in_time / work.rate - work.cost * choice.instances * window.length_s
        is_over = (self._windows + 0.5) * self._window_s > work.duration_s
        return look(work, choice, window), reward, False, is_over, self._tell()

    @property
    def workload(self) -> Workload:
        """Of this episode; ValueError before ``reset``."""
        if self._workload is None:
            raise ValueError("an episode begins with reset")
        return self._workload

    @property
    def choice(self) -> Choice:
        """The knobs that hold."""
        return self._choice

    @property
    def seen(self) -> SchedulerObservation:
        """What the scheduler has counted."""
        return self._seen

    @property
    def window(self) -> Window | None:
        """What happened in the last window; None after ``reset``."""
        return self._window

    def _tell(self) -> dict[str, Any]:
        work, window = self.workload, self._window
        told: dict[str, Any] = {
            "kind": work.kind,
            "load": work.load,
            "rate": work.rate,
            "target_us": work.target_us,
            "time_s": self._version.now_s,
        }
        for name in ("arrivals", "in_time", "late", "refused_late", "dropped_late", "refused_full", "waiting"):
            told[name] = getattr(window, name) if window is not None else 0
        return told
