"""When to move a knob, which one, and whether it was right: one model's tuner, as a state machine. Pure.

A move is made for a cause: the objective is missed, traffic or run times have changed, or a review is due. What the
simulation promises most for is tried, one knob at a time; then it is judged by what was measured, and undone where it
did harm. A knob that did harm, or brought nothing, rests, twice as long each time. So a steady load sees few moves.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import stdev
from typing import TYPE_CHECKING, Final

from aiorch_server.optimizer.predict import Knobs
from aiorch_server.optimizer.sight import Sight, Trail

if TYPE_CHECKING:
    from aiorch_server.optimizer.knee import Knee


class State(enum.Enum):
    """What the tuner waits for."""

    LEARNING = "learning"  # run times that can be trusted
    STEADY = "steady"  # a cause
    SETTLING = "settling"  # what a move changed to show
    JUDGING = "judging"  # enough answers to judge it by


TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    State.LEARNING: frozenset({State.STEADY}),
    State.STEADY: frozenset({State.SETTLING, State.LEARNING}),
    State.SETTLING: frozenset({State.JUDGING, State.STEADY}),
    State.JUDGING: frozenset({State.STEADY, State.SETTLING}),
}


@dataclass(frozen=True, slots=True)
class Bounds:
    """From where to where each knob may be moved; both ends belong to it."""

    max_rows: int
    max_delay_us: int
    min_instances: int
    max_instances: int

    def hold(self, knobs: Knobs) -> bool:
        """Whether the knobs lie within."""
        return (
            1 <= knobs.max_rows <= self.max_rows
            and 0 <= knobs.delay_us <= self.max_delay_us
            and self.min_instances <= knobs.instances <= self.max_instances
        )


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is to be expected of some knobs: the share of good answers with its standard error, and a percentile.

    ``tries`` are shares by repetition: those of two outlooks had the same traffic and the same doubts.
    """

    good: float
    error: float
    percentile_us: float
    tries: tuple[float, ...] = ()

    def doubt(self, other: Outlook) -> float:
        """Standard error of how much better one is than the other."""
        if len(self.tries) < 2 or len(self.tries) != len(other.tries):
            return math.hypot(self.error, other.error)
        return stdev(a - b for a, b in zip(self.tries, other.tries, strict=True)) / math.sqrt(len(self.tries))


@dataclass(frozen=True, slots=True)
class Move:
    """One knob from one value to another, and why; ``is_undone`` where it takes the move before back."""

    knob: str
    before: Knobs
    after: Knobs
    reason: str
    is_undone: bool = False


@dataclass(frozen=True, slots=True)
class Situation:
    """What a tuner decides by, besides what it saw itself.

    ``suggested`` are further knobs worth a look; ``predict`` simulates; ``run_us`` is how long a batch of the present
    cap takes, None as long as that is not known well enough. ``knee`` is asked for where there is no target.
    """

    run_us: float | None
    predict: Callable[[Knobs], Outlook]
    suggested: tuple[Knobs, ...] = ()
    knee: Knee | None = None


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a tuner moves, in seconds; what is counted is answers."""

    settle_s: float = 1.0
    judge_s: float = 3.0
    longest_judge_s: float = 30.0
    judge_answers: int = 300
    rest_s: float = 20.0
    longest_rest_s: float = 1800.0
    look_s: float = 2.0
    review_s: float = 10.0
    longest_review_s: float = 600.0


#: What a change of the arrival rate or of run times is worth a look.
_CHANGED: Final = 1.25
#: Better by less than this share of good answers, or of the percentile, is not worth a move.
_GOOD_GAIN, _PERCENTILE_GAIN = 0.005, 0.1
#: Part of the target within which the percentile leaves room to spare.
_AT_EASE: Final = 0.7
#: As much worse is harm: shares of good answers, and of the percentile.
_GOOD_HARM, _PERCENTILE_HARM = 0.01, 0.15


class Tuner:
    """Decides for one model version; ``step`` is called about once a second.

    ``allowed_misses`` is the share of requests that may miss the target of ``target_us``, None where there is no such:
    the percentile alone is then kept low. An instance more has to bring ``instance_cost`` times what another move has
    to; one that costs much is given back sooner, too. Times are seconds on any clock that does not run backwards.
    """

    def __init__(
        self,
        knobs: Knobs,
        bounds: Bounds,
        *,
        allowed_misses: float | None = None,
        target_us: float = math.inf,
        instance_cost: float = 1.0,
        pace: Pace | None = None,
    ) -> None:
        self.knobs = knobs
        self.bounds = bounds
        self.allowed_misses = allowed_misses
        self.target_us = target_us
        self.instance_cost = instance_cost
        self.state = State.LEARNING
        #: What became of the last move, in words; "" as long as it is not judged.
        self.verdict = ""
        #: What the last look for a move foretold of the knobs that it chose, or left.
        self.promised: Outlook | None = None
        self._pace = pace or Pace()
        self._trail = Trail()
        self._since_s = 0.0
        self._rests: dict[str, tuple[float, float]] = {}  # knob -> until when, and how long it rested
        self._move: Move | None = None
        self._moved_at_s: float | None = None
        self._before: Sight | None = None
        self._known: tuple[float, float] | None = None  # rate and run time of the last decision
        self._review_s = self._pace.review_s
        self._look_s = self._pace.look_s
        self._looks_at_s = -math.inf  # not before then, where the last look found nothing and all is as it was

    def step(self, now_s: float, sight: Sight, situation: Situation) -> Move | None:
        """Takes in what was seen since the last call; gives the move to make now, if any. ``knobs`` has made it."""
        self._trail.add(sight)
        if self.state is State.LEARNING:
            if situation.run_us is not None:
                self._enter(State.STEADY, now_s)
            return None
        if self.state is State.SETTLING:
            if now_s - self._since_s >= self._pace.settle_s:
                # an undone move is not judged once more: what was there before is known
                self._enter(State.JUDGING if self._move is not None else State.STEADY, now_s)
                self._trail.forget()
            return None
        if self.state is State.JUDGING:
            return self._judge(now_s)
        if situation.run_us is None:
            self._enter(State.LEARNING, now_s)
            return None
        reason = self._find_cause(now_s, situation.run_us)
        return self._choose(now_s, situation, reason) if reason else None

    @property
    def is_missing(self) -> bool:
        """Whether more requests than allowed missed the target lately, by more than chance."""
        return self.allowed_misses is not None and self._trail.recent(self._pace.judge_s).misses_surely(
            self.allowed_misses
        )

    def reject(self, now_s: float, reason: str) -> None:
        """The move that ``step`` gave could not be made: as if it had not been; its knob rests."""
        if self._move is not None and self.state is State.SETTLING:
            self.knobs = self._move.before
            self._rest(self._move.knob, now_s)
            self.verdict = reason
            self._move = None
            self._enter(State.STEADY, now_s)

    def _enter(self, state: State, now_s: float) -> None:
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"a tuner does not go from {self.state.value} to {state.value}")
        self.state, self._since_s = state, now_s

    def _find_cause(self, now_s: float, run_us: float) -> str:
        seen = self._trail.recent(self._pace.judge_s)
        if not seen.arrivals:
            return ""
        if self._known is None:
            return "first look"
        rate, known_run_us = self._known
        if not 1 / _CHANGED < seen.rate / max(rate, 1e-9) < _CHANGED and abs(seen.rate - rate) * seen.seconds > 30:
            return f"the load went from {rate:.0f} to {seen.rate:.0f} requests/s"
        if not 1 / _CHANGED < run_us / max(known_run_us, 1e-9) < _CHANGED:
            return f"a batch such as now takes {run_us / 1e3:.3g} ms, those before took {known_run_us / 1e3:.3g} ms"
        if self.allowed_misses is not None and now_s >= self._looks_at_s and seen.misses_surely(self.allowed_misses):
            return f"{100 * seen.missed_share:.1f} % of requests miss the objective"
        return "review" if now_s - self._since_s >= self._review_s else ""

    def _choose(self, now_s: float, situation: Situation, reason: str) -> Move | None:
        assert situation.run_us is not None
        seen = self._trail.recent(self._pace.judge_s)
        self._known = (seen.rate, situation.run_us)
        self._since_s = now_s
        present = situation.predict(self.knobs)
        best, promised = None, present
        for knob, wanted in self._list_candidates(situation):
            if self._is_resting(knob, now_s):
                continue
            outlook = situation.predict(wanted)
            if self._is_better(outlook, wanted, promised, best.after if best is not None else self.knobs):
                best, promised = Move(knob, self.knobs, wanted, ""), outlook
        self.promised = promised
        if best is None:
            self._review_s = min(2 * self._review_s, self._pace.longest_review_s)
            self._looks_at_s = now_s + self._look_s
            self._look_s = min(2 * self._look_s, self._pace.longest_review_s)
            return None
        self._review_s, self._look_s = self._pace.review_s, self._pace.look_s
        return self._begin(
            now_s, replace(best, reason=f"{reason}: {_tell_promise(best.after, best.knob, present, promised)}")
        )

    def _begin(self, now_s: float, move: Move) -> Move:
        self._move, self._moved_at_s = move, now_s
        self._before, self.verdict = self._trail.recent(self._pace.judge_s), ""
        self.knobs = move.after
        self._enter(State.SETTLING, now_s)
        return move

    def _list_candidates(self, situation: Situation) -> Iterator[tuple[str, Knobs]]:
        now, run_us = self.knobs, situation.run_us or 0.0
        caps = {now.max_rows * 2, now.max_rows // 2, *(each.max_rows for each in situation.suggested)}
        delays = {0, now.delay_us // 2, now.delay_us * 2, round(run_us / 4)}
        delays.update(each.delay_us for each in situation.suggested)
        counts = {now.instances + 1, now.instances - 1}
        # below the knee rows are dearer: answers come sooner there only until the load grows
        least = min((each.max_rows for each in situation.suggested), default=1)
        caps = {max(cap, min(least, now.max_rows)) for cap in caps}
        tried = [("max_batch_size", replace(now, max_rows=min(cap, self.bounds.max_rows))) for cap in sorted(caps)]
        tried += [("delay", replace(now, delay_us=min(delay, self.bounds.max_delay_us))) for delay in sorted(delays)]
        tried += [("instances", replace(now, instances=count)) for count in sorted(counts)]
        seen = {now}
        for knob, wanted in tried:
            if wanted not in seen and self.bounds.hold(wanted):
                seen.add(wanted)
                yield knob, wanted

    def _is_better(self, one: Outlook, knobs: Knobs, other: Outlook, others: Knobs) -> bool:
        gain = one.good - other.good
        worth = _GOOD_GAIN * (self.instance_cost if knobs.instances > others.instances else 1.0)
        noise = max(worth, 2 * one.doubt(other))
        if self.allowed_misses is not None and abs(gain) > noise:
            return gain > 0
        if self.allowed_misses is not None and knobs.instances < others.instances:
            # of what may be missed, a half is kept in reserve; less where instances are dear
            return one.good >= 1 - self.allowed_misses * max(0.0, 1.0 - 0.5 / self.instance_cost)
        if self._is_at_ease(other):
            return False
        if self.allowed_misses is not None and gain < 0:
            return False  # who refuses more answers the others sooner
        return one.percentile_us < (1 - _PERCENTILE_GAIN) * other.percentile_us and knobs.instances <= others.instances

    def _is_at_ease(self, outlook: Outlook) -> bool:
        """Whether the target is kept with room to spare, by what is expected and by what was seen."""
        if self.allowed_misses is None:
            return False
        seen = self._trail.recent(self._pace.judge_s)
        misses = max(1.0 - outlook.good, seen.missed_share)
        slowest_us = max(outlook.percentile_us, seen.percentile_us)
        return misses <= self.allowed_misses / 2 and slowest_us <= _AT_EASE * self.target_us

    def _judge(self, now_s: float) -> Move | None:
        assert self._move is not None and self._before is not None
        move, before, after = self._move, self._before, self._trail.whole()
        waited_s = now_s - self._since_s
        is_harm = self._is_harm(before, after)
        is_enough = waited_s >= self._pace.judge_s and after.answered >= self._pace.judge_answers
        # harm that is sure already is not watched any longer
        if not is_enough and not is_harm and waited_s < self._pace.longest_judge_s:
            return None
        self._move = None
        self.verdict = _tell_effect(before, after)
        if not self._is_same_load(before, after):
            self.verdict += "; that is another load, which says nothing about the move"
        if not is_harm:
            self._rests.pop(move.knob, None)
            self._known = (after.rate, self._known[1] if self._known else 0.0)
            self._enter(State.STEADY, now_s)
            return None
        self._rest(move.knob, now_s)
        self.knobs = move.before
        self._enter(State.SETTLING, now_s)
        return Move(move.knob, move.after, move.before, f"the move before did harm, {self.verdict}", is_undone=True)

    def _is_harm(self, before: Sight, after: Sight) -> bool:
        if not self._is_same_load(before, after):
            return False
        noise = 2 * math.hypot(before.share_error, after.share_error)
        if self.allowed_misses is not None:
            is_missing = after.missed_share > self.allowed_misses
            return is_missing and after.missed_share - before.missed_share > max(_GOOD_HARM, noise)
        if after.answered < self._pace.judge_answers:
            return False
        return after.percentile_us > (1 + _PERCENTILE_HARM) * before.percentile_us

    def _is_same_load(self, before: Sight, after: Sight) -> bool:
        """What came under another load says nothing about a move."""
        return 1 / _CHANGED < after.rate / max(before.rate, 1e-9) < _CHANGED

    def _is_resting(self, knob: str, now_s: float) -> bool:
        return self._rests.get(knob, (0.0, 0.0))[0] > now_s

    def _rest(self, knob: str, now_s: float) -> None:
        rested_s = self._rests.get(knob, (0.0, self._pace.rest_s / 2))[1]
        rest_s = min(2 * rested_s, self._pace.longest_rest_s)
        self._rests[knob] = (now_s + rest_s, rest_s)


def _tell_promise(after: Knobs, knob: str, present: Outlook, promised: Outlook) -> str:
    choice = {
        "max_batch_size": f"batches of at most {after.max_rows}",
        "delay": f"waiting {after.delay_us / 1000:.3g} ms for company" if after.delay_us else "no waiting for company",
        "instances": f"{after.instances} instance{'s' * (after.instances != 1)}",
    }[knob]
    return f"{choice} should keep {_tell_outlook(promised)}; left alone it would be {_tell_outlook(present)}"


def _tell_outlook(outlook: Outlook) -> str:
    return f"{100 * outlook.good:.1f} % in time (percentile {outlook.percentile_us / 1000:.3g} ms)"


def _tell_effect(before: Sight, after: Sight) -> str:
    percentiles = f"percentile {before.percentile_us / 1000:.3g} -> {after.percentile_us / 1000:.3g} ms"
    kept = f"in time {100 * (1 - before.missed_share):.1f} -> {100 * (1 - after.missed_share):.1f} %, "
    rates = f" at {before.rate:.0f} -> {after.rate:.0f} requests/s"
    return f"{kept if before.missed or after.missed else ''}{percentiles}{rates}"
