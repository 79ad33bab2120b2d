"""The table of sequences against a plain model of it: lists, no indexes, everything computed anew."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorch_server.errors import InternalError, QueueFull
from aiorch_server.scheduling.sequence_table import Member, NotStarted, Phase, Sequence, SequenceTable, Step

IDLE_NS = 50


@dataclass
class PlainSequence:
    key: int
    members: list[int] = field(default_factory=list)  # tickets that wait
    running: int | None = None
    place: tuple[int, int] | None = None
    is_open: bool = True  # requests may still join
    idle_since: int | None = None


class PlainModel:
    """What the table has to do, said once more and slowly."""

    def __init__(self, instances: int, slots: int, *, max_backlog: int, max_waiting: int, max_requests: int) -> None:
        self.places = [(instance, slot) for instance in range(instances) for slot in range(slots)]
        self.instances = instances
        self.max_backlog, self.max_waiting, self.max_requests = max_backlog, max_waiting, max_requests
        self.sequences: list[PlainSequence] = []  # in order of arrival
        self.starts: dict[int, bool] = {}
        self.lost: set[int] = set()
        self.is_closing = False

    def free(self) -> list[tuple[int, int]]:
        taken = [each.place for each in self.sequences]
        return [place for place in self.places if place not in taken and place[0] not in self.lost]

    def waiting(self) -> int:
        return sum(len(each.members) for each in self.sequences)

    def admit(self, key: int, ticket: int, *, start: bool, end: bool, now: int) -> str:
        found = next((each for each in self.sequences if each.key == key and each.is_open), None)
        if found is None and not start:
            return "not started"
        if self.waiting() >= self.max_requests:
            return "full"
        if found is None:
            if not self.free() and sum(each.place is None for each in self.sequences) >= self.max_backlog:
                return "full"
            found = PlainSequence(key)
            self.sequences.append(found)
        elif len(found.members) >= self.max_waiting:
            return "full"
        found.members.append(ticket)
        self.starts[ticket] = start
        if end or self.is_closing:
            found.is_open = False
        self.tidy(now)
        return "in"

    def withdraw(self, ticket: int, now: int) -> set[int]:
        for each in self.sequences:
            if ticket == each.running or ticket in each.members:
                first = 0 if ticket == each.running else each.members.index(ticket)
                last = first
                while last < len(each.members) and (
                    each.members[last] == ticket or not self.starts[each.members[last]]
                ):
                    last += 1
                if last == len(each.members):
                    each.is_open = False
                gone = set(each.members[first:last]) - {ticket}
                each.members[first:last] = []
                self.tidy(now)
                return gone
        return set()

    def take(self, ticket: int) -> None:
        (found,) = (each for each in self.sequences if each.members[:1] == [ticket])
        found.running = found.members.pop(0)

    def finish(self, ticket: int, now: int) -> None:
        (found,) = (each for each in self.sequences if each.running == ticket)
        found.running = None
        self.tidy(now)

    def expire(self, now: int) -> None:
        while True:  # one after another: a place that comes free may change what is idle
            old = [each for each in self.sequences if each.idle_since is not None and each.idle_since + IDLE_NS <= now]
            if not old:
                return
            min(old, key=lambda each: each.idle_since or 0).is_open = False
            self.tidy(now)

    def lose(self, instance: int, now: int) -> set[int]:
        self.lost.add(instance)
        gone: set[int] = set()
        for each in self.sequences:
            if (each.place and each.place[0] == instance) or (each.place is None and len(self.lost) == self.instances):
                gone |= set(each.members)
                each.members.clear()
                each.is_open = False
        self.tidy(now)
        return gone

    def close(self, now: int) -> None:
        self.is_closing = True
        for each in self.sequences:
            each.is_open = False
        self.tidy(now)

    def tidy(self, now: int) -> None:
        """Ends what is over, seats who waits, notes who is idle."""
        while True:
            self.sequences = [
                each for each in self.sequences if each.members or each.running is not None or each.is_open
            ]
            first = next((each for each in self.sequences if each.place is None), None)
            free = self.free()
            if first is None or not free:
                break
            most = max(range(self.instances), key=lambda i: sum(place[0] == i for place in free))
            first.place = min(place for place in free if place[0] == most)
        for each in self.sequences:
            is_idle = each.place is not None and not each.members and each.running is None
            if not is_idle:
                each.idle_since = None
            elif each.idle_since is None:
                each.idle_since = now

    def ready(self, instance: int) -> set[int]:
        return {
            each.members[0] for each in self.sequences
            if each.place and each.place[0] == instance and each.members and each.running is None
        }  # fmt: skip


OPERATIONS = st.one_of(
    st.tuples(st.just("admit"), st.integers(1, 4), st.booleans(), st.sampled_from([False, False, True])),
    st.tuples(st.just("admit"), st.integers(1, 2), st.booleans(), st.just(False)),
    st.tuples(st.just("take"), st.integers(0, 100)),
    st.tuples(st.just("take"), st.integers(0, 100)),
    st.tuples(st.just("finish"), st.integers(0, 100)),
    st.tuples(st.just("finish"), st.integers(0, 100)),
    st.tuples(st.just("withdraw"), st.integers(0, 100)),
    st.tuples(st.just("pass"), st.integers(1, 60)),
    st.tuples(st.sampled_from(["lose", "close"]), st.integers(0, 100)),
)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(1, 4), st.integers(2, 8),
    st.lists(OPERATIONS, min_size=20, max_size=80),
)  # fmt: skip
def test_against_the_plain_model(
    instances: int,
    slots: int,
    max_backlog: int,
    max_waiting: int,
    max_requests: int,
    operations: list[tuple[object, ...]],
) -> None:
    bounds = {"max_backlog": max_backlog, "max_waiting": max_waiting, "max_requests": max_requests}
    table = SequenceTable(instances, slots, idle_ns=IDLE_NS, max_bytes=1 << 30, **bounds)
    plain = PlainModel(instances, slots, **bounds)
    members: dict[int, Member] = {}
    now, closures = 0, 0
    seen: list[set[object]] = [set() for _ in range(instances)]
    for ticket, (what, *arguments) in enumerate(operations):
        number = int(arguments[0])  # type: ignore[call-overload]
        if what == "admit":
            start, end = bool(arguments[1]), bool(arguments[2])
            member = Member(start, end, n_bytes=1, payload=ticket)
            try:
                table.admit(number, member, now)
                outcome = "in"
                members[ticket] = member
            except NotStarted:
                outcome = "not started"
            except QueueFull:
                outcome = "full"
            if table.is_lost:  # its owner asks before it admits
                return
            assert outcome == plain.admit(number, ticket, start=start, end=end, now=now)
        elif what == "take":
            ready = sorted(payloads(each for i in range(instances) for each in table.ready(i)))
            if ready:
                chosen = ready[number % len(ready)]
                table.take(members[chosen])
                plain.take(chosen)
        elif what == "finish":
            running = sorted(each.running for each in plain.sequences if each.running is not None)
            if running:
                chosen = running[number % len(running)]
                table.finish(members[chosen], now)
                plain.finish(chosen, now)
        elif what == "withdraw" and members:
            chosen = sorted(members)[number % len(members)]
            assert payloads(table.withdraw(members[chosen], now)) == plain.withdraw(chosen, now)
        elif what == "pass":
            now += number
            wake_ns = table.expire(now)
            plain.expire(now)
            idle = [each.idle_since for each in plain.sequences if each.idle_since is not None]
            assert wake_ns == (min(idle) + IDLE_NS if idle else 0)
        elif what == "lose" and closures < 1:
            closures += 1
            assert payloads(table.lose(number % instances, now)) == plain.lose(number % instances, now)
        elif what == "close" and closures < 1:
            closures += 1
            table.close(now)
            plain.close(now)
        compare(table, plain)
        seen = look_again(table, seen)


def look_again(table: SequenceTable, seen: list[set[object]]) -> list[set[object]]:
    """What is newly ready was announced."""
    due = table.instances_due()
    ready = [payloads(table.ready(instance)) for instance in range(len(seen))]
    assert all(instance in due for instance, now in enumerate(ready) if now - seen[instance])
    return ready


def payloads(members: object) -> set[object]:
    return {each.payload for each in members}  # type: ignore[attr-defined]


def compare(table: SequenceTable, plain: PlainModel) -> None:
    assert table.live == sum(each.place is not None for each in plain.sequences)
    assert table.backlog == sum(each.place is None for each in plain.sequences)
    assert table.waiting_requests == table.waiting_bytes == plain.waiting()
    for instance in range(plain.instances):
        assert payloads(table.ready(instance)) == plain.ready(instance)
        taken = [each.place[1] for each in plain.sequences if each.place and each.place[0] == instance]
        assert table.occupied(instance) == max(taken, default=-1) + 1


def test_all_is_given_back() -> None:
    """A sequence that is over leaves nothing, whoever ended it."""
    table = SequenceTable(1, 2, idle_ns=IDLE_NS, max_backlog=9, max_waiting=9, max_requests=9, max_bytes=99)
    first = Member(True, False, 5)
    table.admit(1, first, 0)
    assert table.instances_due() == [0]
    assert table.instances_due() == []
    table.take(first)
    table.finish(first, 10)
    assert table.instances_due() == [0]
    assert table.expire(10) == 10 + IDLE_NS
    assert table.expire(10 + IDLE_NS) == 0
    assert (table.live, table.backlog, table.waiting_bytes, table._known, dict(table._idle)) == (0, 0, 0, {}, {})
    with pytest.raises(NotStarted):
        table.admit(1, Member(False, False), 100)


def test_bytes_are_bounded_but_one_request_always_fits() -> None:
    table = SequenceTable(1, 1, idle_ns=IDLE_NS, max_backlog=9, max_waiting=9, max_requests=9, max_bytes=10)
    table.admit(1, Member(True, False, 100), 0)
    with pytest.raises(QueueFull):
        table.admit(1, Member(False, False, 1), 0)


@pytest.mark.parametrize(
    ("phase", "step"),
    [(Phase.BACKLOG, Step.RUN), (Phase.RUNNING, Step.RUN), (Phase.RUNNING, Step.END), (Phase.ENDED, Step.SEAT)],
)
def test_what_is_not_in_the_table_is_a_fault(phase: Phase, step: Step) -> None:
    with pytest.raises(InternalError, match=f"{phase.value} cannot {step.value}"):
        Sequence(1, phase).step(step)


def test_out_of_turn() -> None:
    table = SequenceTable(1, 1, idle_ns=IDLE_NS, max_backlog=9, max_waiting=9, max_requests=9, max_bytes=10)
    first, second = Member(True, False), Member(False, False)
    table.admit(1, first, 0)
    table.admit(1, second, 0)
    with pytest.raises(InternalError, match="out of turn"):
        table.take(second)
