"""Where a model's rows stop getting cheaper, and a tuner that keeps the cap there where nobody asks for more. Pure.

A larger batch is worth its longer run as long as each of its rows costs less. At the knee of the curve the server can
answer as many requests as anywhere beyond it, and each waits for a shorter run. What was not seen is not presumed: the
cap is lowered to a knee that lies an octave below the largest batch that ran, and raised where larger ones were better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from aiorch_server.optimizer.service_time import Estimate
from aiorch_server.optimizer.sight import Sight
from aiorch_server.optimizer.tuner import Move, Situation, Tuner

#: A larger batch has to be cheaper for each row by this part to be worth its longer run; by twice to be gone back to.
CHEAPER: Final = 0.03
#: Standard errors by which larger batches may be better than they look.
_DOUBT: Final = 1.0
#: As much worse is harm: the percentile, where rows got dearer by that much too.
_PERCENTILE_HARM, _COST_HARM = 0.15, 0.03
#: Between two moves, in seconds: nothing that is asked for hangs on it.
_PAUSE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Knee:
    """The cap to have, and why."""

    rows: int
    reason: str


def find_knee(estimates: Sequence[Estimate], *, cap: int, largest_seen: int, most: int) -> Knee | None:
    """A better cap than ``cap``, of at most ``most`` rows; None where nothing is surely better."""
    known = [each for each in estimates if each.rows <= min(largest_seen, most) and each.is_trusted]
    if not known:
        return None
    cheapest = min(known, key=_cost_us)
    present = max((each for each in known if each.rows <= cap), key=lambda each: each.rows, default=known[0])
    if cheapest.rows > cap and _cost_us(cheapest) * (1 + 2 * CHEAPER) < _cost_us(present):
        knee = next(each for each in known if _cost_us(each) <= (1 + CHEAPER) * _cost_us(cheapest))
        return Knee(knee.rows, f"rows are cheaper in larger batches: {_tell(knee)}, {_tell(present)}")
    knee = next(
        each
        for each in known
        if all(_cost_us(each) <= (1 + CHEAPER) * _least_us(other) for other in known if other.rows > each.rows)
    )
    if knee.rows >= cap or 2 * knee.rows > min(largest_seen, most):
        return None
    largest = known[-1]
    return Knee(knee.rows, f"rows get no cheaper in larger batches, which take longer: {_tell(knee)}, {_tell(largest)}")


class KneeTuner(Tuner):
    """Moves the cap to where ``Situation.knee`` says, and back where answers got slower because of it."""

    def _find_cause(self, now_s: float, run_us: float) -> str:
        return "" if self._moved_at_s is not None and now_s - self._moved_at_s < _PAUSE_S else "look"

    def _choose(self, now_s: float, situation: Situation, reason: str) -> Move | None:
        knee = situation.knee
        if knee is None or knee.rows == self.knobs.max_rows or self._is_resting("max_batch_size", now_s):
            return None
        after = replace(self.knobs, max_rows=knee.rows)
        return self._begin(now_s, Move("max_batch_size", self.knobs, after, knee.reason))

    def _is_harm(self, before: Sight, after: Sight) -> bool:
        if after.answered < self._pace.judge_answers or not self._is_same_load(before, after):
            return False
        # a queue that grows anyway makes every answer slower than those before: the runs must have become dearer too
        is_slower = after.percentile_us > (1 + _PERCENTILE_HARM) * before.percentile_us
        return is_slower and after.row_us > (1 + _COST_HARM) * before.row_us


def _cost_us(estimate: Estimate) -> float:
    return estimate.mean_ns / estimate.rows / 1e3


def _least_us(estimate: Estimate) -> float:
    return (estimate.mean_ns - _DOUBT * estimate.error_ns) / estimate.rows / 1e3


def _tell(estimate: Estimate) -> str:
    return f"{_cost_us(estimate):.3g} us each by {estimate.rows}"
