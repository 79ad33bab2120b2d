"""Which sequences there are, where each has its place, and which of its requests may run next.

Pure: no clock (time is passed in), no event loop, no tensors. A sequence is bound to one place of one instance for its
whole life; its requests leave one at a time, in the order in which they came. When all places are taken, new sequences
wait in a backlog, in order.
"""

from __future__ import annotations

import enum
import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from aiorch_server.errors import InternalError, QueueFull


class Phase(enum.Enum):
    """Where a sequence stands."""

    BACKLOG = "BACKLOG"  # waits for a place
    SEATED = "SEATED"  # has a place, nothing of it runs
    RUNNING = "RUNNING"  # one of its requests is with the instance
    ENDED = "ENDED"  # has no place any more


class Step(enum.Enum):
    """What happens to a sequence."""

    SEAT = "SEAT"
    RUN = "RUN"
    RETURN = "RETURN"
    END = "END"


#: What is not here is a fault of this module.
_STEPS: dict[tuple[Phase, Step], Phase] = {
    (Phase.BACKLOG, Step.SEAT): Phase.SEATED,
    (Phase.BACKLOG, Step.END): Phase.ENDED,
    (Phase.SEATED, Step.RUN): Phase.RUNNING,
    (Phase.SEATED, Step.END): Phase.ENDED,
    (Phase.RUNNING, Step.RETURN): Phase.SEATED,
}


@dataclass(slots=True, eq=False)
class Member:
    """One request of a sequence; ``payload`` is its owner's own."""

    is_start: bool
    is_end: bool
    n_bytes: int = 0
    payload: object = None
    arrived_ns: int = 0
    sequence: Sequence | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """Requests that belong together; ``memory`` is what its owner keeps from one to the next.

    ``is_complete`` says that no request can join it any more: it ends when what waits has run.
    """

    key: int | str
    phase: Phase = Phase.BACKLOG
    instance: int = -1
    slot: int = -1
    waiting: deque[Member] = field(default_factory=deque)
    running: Member | None = None
    is_complete: bool = False
    memory: object = None

    def step(self, step: Step) -> None:
        """Goes where the table says; InternalError for what is not in it."""
        following = _STEPS.get((self.phase, step))
        if following is None:
            raise InternalError(f"a sequence that is {self.phase.value} cannot {step.value}")
        self.phase = following


class NotStarted(Exception):
    """The sequence is not known, and the request does not start it."""


class SequenceTable:
    """All sequences of one model version.

    Bounds: ``max_backlog`` sequences without a place, ``max_waiting`` requests in one sequence, ``max_requests`` and
    ``max_bytes`` in all of them; QueueFull beyond. Every method that ends sequences gives their places to those in the
    backlog at once; ``instances_due`` says where something may run since it was last asked.
    """

    def __init__(
        self,
        instances: int,
        slots: int,
        *,
        idle_ns: int,
        max_backlog: int,
        max_waiting: int,
        max_requests: int,
        max_bytes: int,
    ) -> None:
        self._idle_ns = idle_ns
        self._max_backlog = max_backlog
        self._max_waiting = max_waiting
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._known: dict[int | str, Sequence] = {}  # those that a request can still join
        self._backlog: OrderedDict[Sequence, None] = OrderedDict()
        self._free = [list(range(slots)) for _ in range(instances)]  # a heap of slots for each instance
        self._seated: list[dict[int, Sequence]] = [{} for _ in range(instances)]
        self._ready: list[OrderedDict[Sequence, None]] = [OrderedDict() for _ in range(instances)]
        self._idle: OrderedDict[Sequence, int] = OrderedDict()  # seated with nothing to do, and since when
        self._lost: set[int] = set()
        self._due: set[int] = set()
        self._is_closing = False
        self.waiting_requests = 0
        self.waiting_bytes = 0

    # ------------------------------------------------------------------------------------------ requests come and go

    def admit(self, key: int | str, member: Member, now_ns: int) -> Sequence:
        """Queues ``member`` in its sequence; NotStarted, or QueueFull where a bound is reached."""
        sequence = self._known.get(key)
        if sequence is None and not member.is_start:
            raise NotStarted
        if self.waiting_requests >= self._max_requests or (
            self.waiting_requests and self.waiting_bytes + member.n_bytes > self._max_bytes
        ):
            raise QueueFull("Exceeds maximum queue size")
        if sequence is None:
            if len(self._backlog) >= self._max_backlog and not any(self._free):
                raise QueueFull("Exceeds maximum queue size")
            sequence = self._known[key] = Sequence(key)
            self._backlog[sequence] = None
        elif len(sequence.waiting) >= self._max_waiting:
            raise QueueFull("Exceeds maximum queue size")
        member.sequence, member.arrived_ns = sequence, now_ns
        sequence.waiting.append(member)
        self.waiting_requests += 1
        self.waiting_bytes += member.n_bytes
        if member.is_end or self._is_closing:
            self._complete(sequence)
        self._idle.pop(sequence, None)
        self._seat_backlog()
        self._note_ready(sequence)
        return sequence

    def take(self, member: Member) -> None:
        """``member``, the first that waits in a sequence that is ready, goes to the instance."""
        sequence = _sequence_of(member)
        if not sequence.waiting or sequence.waiting[0] is not member:
            raise InternalError("a request of a sequence was taken out of turn")
        sequence.step(Step.RUN)
        self._forget_waiting(sequence.waiting.popleft())
        sequence.running = member
        self._ready[sequence.instance].pop(sequence, None)

    def finish(self, member: Member, now_ns: int) -> None:
        """``member`` is back from the instance, however it went there."""
        sequence = _sequence_of(member)
        sequence.step(Step.RETURN)
        sequence.running = None
        self._due.add(sequence.instance)
        self._settle_down(sequence, now_ns)

    def withdraw(self, member: Member, now_ns: int) -> list[Member]:
        """``member`` is given up by who sent it: its sequence ends there, unless a later request starts it anew.

        Gives those behind it that cannot run any more, without ``member``. Nothing happens if it is over already.
        """
        sequence = _sequence_of(member)
        if sequence.running is member:
            begin = 0
        elif member in sequence.waiting:
            begin = sequence.waiting.index(member)
        else:
            return []
        behind = list(sequence.waiting)
        end = next((i for i in range(begin, len(behind)) if behind[i] is not member and behind[i].is_start), None)
        dropped = behind[begin:end]
        sequence.waiting = deque(behind[:begin] + (behind[end:] if end is not None else []))
        for each in dropped:
            self._forget_waiting(each)
        if end is None:
            self._complete(sequence)
        self._settle_down(sequence, now_ns)
        return [each for each in dropped if each is not member]

    # ----------------------------------------------------------------------------------------------- what may run

    def touch(self, instance: int) -> None:
        """Something at ``instance`` changed that the table does not know of."""
        self._due.add(instance)

    def instances_due(self) -> list[int]:
        """Instances for which something has changed since the last call."""
        due, self._due = self._due, set()
        return sorted(due)

    def ready(self, instance: int) -> Iterator[Member]:
        """The request that is next in each sequence of ``instance`` that can run, in the order they became ready."""
        for sequence in list(self._ready[instance]):
            yield sequence.waiting[0]

    def occupied(self, instance: int) -> int:
        """The number of slots of ``instance`` up to the last one that has a sequence."""
        return max(self._seated[instance], default=-1) + 1

    # ------------------------------------------------------------------------------------------- how sequences end

    def is_known(self, key: int | str) -> bool:
        """Whether a request of the sequence ``key`` can join it."""
        return key in self._known

    def expire(self, now_ns: int) -> int:
        """Ends sequences that were idle for too long; gives when to look again, 0 for not before something runs."""
        while self._idle:
            sequence, since_ns = next(iter(self._idle.items()))
            if since_ns + self._idle_ns > now_ns:
                return since_ns + self._idle_ns
            self._complete(sequence)
            self._settle_down(sequence, now_ns)
        return 0

    def lose(self, instance: int, now_ns: int) -> list[Member]:
        """``instance`` is gone: gives what waited in its sequences; with the last one, what waited anywhere."""
        self._lost.add(instance)
        self._free[instance].clear()
        gone = list(self._seated[instance].values())
        if len(self._lost) == len(self._free):
            gone += self._backlog
        dropped: list[Member] = []
        for sequence in gone:
            dropped += sequence.waiting
            for member in sequence.waiting:
                self._forget_waiting(member)
            sequence.waiting.clear()
            self._complete(sequence)
            self._settle_down(sequence, now_ns)
        return dropped

    @property
    def is_lost(self) -> bool:
        """Whether no instance is left."""
        return len(self._lost) == len(self._free)

    def close(self, now_ns: int) -> None:
        """No request will come any more: sequences end as soon as what waits in them has run."""
        self._is_closing = True
        for sequence in list(self._known.values()):
            self._complete(sequence)
            self._settle_down(sequence, now_ns)

    @property
    def live(self) -> int:
        """Sequences that have a place."""
        return sum(map(len, self._seated))

    @property
    def backlog(self) -> int:
        """Sequences that wait for a place."""
        return len(self._backlog)

    # ------------------------------------------------------------------------------------------------- the insides

    def _complete(self, sequence: Sequence) -> None:
        sequence.is_complete = True
        if self._known.get(sequence.key) is sequence:
            del self._known[sequence.key]

    def _settle_down(self, sequence: Sequence, now_ns: int) -> None:
        """After a change: the sequence is over, idle, or has something to run."""
        if sequence.phase in (Phase.RUNNING, Phase.ENDED):
            return
        if sequence.waiting:
            self._note_ready(sequence)
        elif sequence.is_complete:
            self._end(sequence)
        elif sequence.phase is Phase.SEATED:
            self._ready[sequence.instance].pop(sequence, None)
            self._idle[sequence] = now_ns

    def _end(self, sequence: Sequence) -> None:
        was_seated = sequence.phase is Phase.SEATED
        sequence.step(Step.END)
        self._idle.pop(sequence, None)
        if not was_seated:
            del self._backlog[sequence]
            return
        self._ready[sequence.instance].pop(sequence, None)
        del self._seated[sequence.instance][sequence.slot]
        if sequence.instance not in self._lost:
            heapq.heappush(self._free[sequence.instance], sequence.slot)
        self._seat_backlog()

    def _seat_backlog(self) -> None:
        """Who waited longest gets the lowest place of the instance that has most of them left."""
        while self._backlog:
            instance = max(range(len(self._free)), key=lambda i: len(self._free[i]))
            if not self._free[instance]:
                return
            sequence, _ = self._backlog.popitem(last=False)
            sequence.instance, sequence.slot = instance, heapq.heappop(self._free[instance])
            sequence.step(Step.SEAT)
            self._seated[instance][sequence.slot] = sequence
            self._note_ready(sequence)

    def _note_ready(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.SEATED and sequence.waiting:
            self._ready[sequence.instance].setdefault(sequence, None)
            self._due.add(sequence.instance)

    def _forget_waiting(self, member: Member) -> None:
        self.waiting_requests -= 1
        self.waiting_bytes -= member.n_bytes


def _sequence_of(member: Member) -> Sequence:
    if member.sequence is None:
        raise InternalError("a request that was never admitted has no sequence")
    return member.sequence
