"""What a choice of knobs would bring: traffic like that of late through the simulation, several times. Pure.

Each repetition has other traffic, other noise, and a model whose run times are off by another part of what is not known
of them; so the spread of the repetitions is how sure a prediction is. The same seed gives all candidates the same
traffic: their difference is surer than each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from aiorch_server._core import simulate
from aiorch_server.optimizer.arrivals import Floats, Ints, OnOff
from aiorch_server.optimizer.runs import Stalls
from aiorch_server.optimizer.service_time import Estimate

_NS_PER_S = 1e9
_NORMAL = NormalDist()
#: Of the simulated time, left out of what is counted: the queue begins empty.
_WARM_UP = 0.1
_MIN_REQUESTS = 200
#: Stalls drawn for a repetition; used in turn where that is not enough.
_STALLS = 512


@dataclass(frozen=True, slots=True)
class Knobs:
    """A choice: the fields of ``Scheduler.set_policy`` that are tuned, and how many instances there are."""

    max_rows: int
    delay_us: int = 0
    is_deferring: bool = False
    is_shedding: bool = False
    instances: int = 1


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of a model: ``quantile`` of the answers within ``target_us`` (0: no target); its queue's bound."""

    target_us: int = 0
    quantile: float = 0.99
    margin_us: int = 0
    max_waiting: int = 16384


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a request costs besides its run, as measured: the door's time for it and for its answer, an idle instance's
    way to its batch, what holds up runs, and the cores that instances and the door share. ``slowdowns``: see
    simulation.pxd; empty: none.
    """

    door_ns: int = 0
    answer_ns: int = 0
    wake_ns: int = 0
    cores: float = 64.0
    slowdowns: tuple[float, ...] = ()
    stalls: Stalls = field(default_factory=lambda: Stalls(0.0, ()))

    def draw_stalls(self, count: int, random: np.random.Generator) -> tuple[Ints, Ints]:
        """So many stalls and the times of running before them, for ``simulate``; none where none were seen."""
        seen = self.stalls.lengths_ns
        if not seen or self.stalls.running_ns <= 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        gaps = np.maximum(1000, random.exponential(self.stalls.running_ns / len(seen), count))
        return gaps.astype(np.int64), random.choice(np.array(seen), count).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Prediction:
    """``percentile_ns`` of the answers' latencies, answers within the target per second (``goodput``), and the parts of
    all requests that were late, or got no answer. Errors are standard deviations over the repetitions. ``busy`` is a
    part of the instances' time.
    """

    knobs: Knobs
    percentile_ns: float
    percentile_error_ns: float
    median_ns: float
    goodput: float
    goodput_error: float
    late: float
    lost: float
    busy: float
    rows_per_batch: float
    goods: tuple[float, ...] = ()  # the part of the requests that were answered within the target, by repetition


@dataclass(frozen=True, slots=True)
class Scenario:
    """Repetitions of traffic, noise and doubt to try candidates on; made once for all of them.

    ``curve`` is what is known of run times (``ServiceTime.estimates``).
    """

    curve: Sequence[Estimate]
    demand: Demand = field(default_factory=Demand)
    surroundings: Surroundings = field(default_factory=Surroundings)
    traffic: Sequence[tuple[Ints, Ints]] = ()
    noise: Floats = field(default_factory=lambda: np.zeros(0))
    doubts: Sequence[float] = ()
    stalls: Sequence[tuple[Ints, Ints]] = ()

    @classmethod
    def of(
        cls,
        curve: Sequence[Estimate],
        process: OnOff,
        *,
        rows_per_request: float = 1.0,
        demand: Demand | None = None,
        surroundings: Surroundings | None = None,
        requests: int = 5000,
        repetitions: int = 4,
        seed: int = 0,
    ) -> Scenario:
        """Traffic of that process: so many requests in each repetition."""
        random = np.random.default_rng(seed)
        duration_s = max(requests, _MIN_REQUESTS) / max(process.rate, 1e-3)
        traffic = []
        for _ in range(repetitions):
            times_ns = process.draw(duration_s, random)
            # whole rows around their mean: the server knows no more of them
            rows = np.floor(rows_per_request + random.random(len(times_ns))).astype(np.int64)
            traffic.append((times_ns, np.maximum(1, rows)))
        around = surroundings or Surroundings()
        stalls = [around.draw_stalls(_STALLS, random) for _ in range(repetitions)]
        doubts = [_NORMAL.inv_cdf((number + 0.5) / repetitions) for number in range(repetitions)]
        return cls(
            curve,
            demand or Demand(),
            around,
            traffic,
            random.standard_normal(4096),
            random.permutation(doubts).tolist(),
            stalls,
        )

    def predict(self, knobs: Knobs) -> Prediction:
        """Tries one candidate."""
        believed = [(estimate.rows, round(estimate.mean_ns)) for estimate in self.curve]
        spreads = [math.sqrt(math.log1p(estimate.spread**2)) for estimate in self.curve]
        around = self.surroundings
        tries = []
        for number, ((times_ns, rows), doubt) in enumerate(zip(self.traffic, self.doubts, strict=True)):
            # in proportion, for a time that is hardly known is still no time that is nearly 0
            doubts = [math.exp(doubt * math.log1p(each.error_ns / each.mean_ns)) for each in self.curve]
            truth = np.array([max(1.0, each.mean_ns * by) for each, by in zip(self.curve, doubts, strict=True)])
            truth = np.maximum.accumulate(truth)
            done = simulate(
                times_ns,
                rows=rows,
                truth=[(each.rows, round(ns)) for each, ns in zip(self.curve, truth.tolist(), strict=True)],
                curve=believed,
                max_rows=knobs.max_rows,
                delay_ns=knobs.delay_us * 1000,
                target_ns=self.demand.target_us * 1000,
                margin_ns=self.demand.margin_us * 1000,
                is_deferring=knobs.is_deferring,
                is_shedding=knobs.is_shedding,
                instances=knobs.instances,
                max_waiting=self.demand.max_waiting,
                spreads=spreads,
                noise=np.roll(self.noise, 1009 * number),
                slowdowns=around.slowdowns[: knobs.instances],
                cores=around.cores,
                door_ns=around.door_ns,
                answer_ns=around.answer_ns,
                wake_ns=around.wake_ns,
                stall_gaps_ns=self.stalls[number][0],
                stalls_ns=self.stalls[number][1],
            )
            busy_ns = float((done.batch_ends_ns - done.batch_starts_ns).sum())
            tries.append(self._judge(times_ns, done.latencies_ns, done.batch_rows, busy_ns / knobs.instances))
        every = np.array(tries)
        means, errors = every.mean(axis=0), every.std(axis=0, ddof=1 if len(every) > 1 else 0)
        return Prediction(
            knobs,
            percentile_ns=math.exp(means[0]),
            percentile_error_ns=math.exp(means[0]) * float(errors[0]),
            median_ns=math.exp(means[1]),
            goodput=float(means[2]),
            goodput_error=float(errors[2]),
            late=float(means[3]),
            lost=float(means[4]),
            busy=float(means[5]),
            rows_per_batch=float(means[6]),
            goods=tuple((1.0 - every[:, 3] - every[:, 4]).tolist()),
        )

    def _judge(
        self, times_ns: Ints, latencies_ns: Ints, batch_rows: npt.NDArray[np.int64], busy_ns: float
    ) -> tuple[float, ...]:
        end_ns = float(times_ns[-1]) if len(times_ns) else 1.0
        counted = latencies_ns[times_ns >= end_ns * _WARM_UP]
        answered = counted[counted > 0]
        if not len(answered):
            return (math.log(_NS_PER_S), math.log(_NS_PER_S), 0.0, 0.0, 1.0, busy_ns / end_ns, 0.0)
        target_ns = self.demand.target_us * 1000 or math.inf
        high, middle = np.quantile(answered, (self.demand.quantile, 0.5))
        late = float((answered > target_ns).sum())
        return (
            math.log(high),
            math.log(middle),
            (len(answered) - late) / (end_ns * (1.0 - _WARM_UP)) * _NS_PER_S,
            late / len(counted),
            1.0 - len(answered) / len(counted),
            busy_ns / max(end_ns, 1.0),
            float(batch_rows.mean()),
        )
