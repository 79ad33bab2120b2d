"""The queue and the former against a plain-Python model, and the rules one by one."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aiorch_server._core import BatchFormer

PATIENCE_NS = 1_000_000_000


@dataclass
class Waiting:
    ticket: int
    arrival_ns: int
    rows: int
    shape: tuple[int, ...]
    level: int
    deadline_ns: int
    expires_ns: int

    @property
    def order(self) -> tuple[int, int, int]:
        urgency = self.arrival_ns + PATIENCE_NS
        return self.level, min(urgency, self.deadline_ns or urgency), self.ticket


class PlainFormer:
    """The same rules, slowly: lists, sorted anew each time."""

    def __init__(self, max_rows: int, delay_ns: int, preferred: list[int], run_ns: int) -> None:
        self.max_rows, self.delay_ns, self.preferred, self.run_ns = max_rows, delay_ns, preferred, run_ns
        self.waiting: list[Waiting] = []

    def form(self, now_ns: int) -> tuple[list[int], int, int]:
        candidates: list[tuple[tuple[int, int, int], list[Waiting], int]] = []
        wakes: list[int] = []
        for shape in {item.shape for item in self.waiting}:
            bucket = sorted((item for item in self.waiting if item.shape == shape), key=lambda item: item.order)
            rows = sum(item.rows for item in bucket)
            due = min(item.arrival_ns for item in bucket) + self.delay_ns
            if bucket[0].deadline_ns:
                due = min(due, bucket[0].deadline_ns - self.run_ns)
            fillable = [size for size in self.preferred if size <= rows]
            if rows >= self.max_rows or due <= now_ns:
                candidates.append((bucket[0].order, bucket, self.max_rows))
            elif fillable:
                candidates.append((bucket[0].order, bucket, max(fillable)))
            else:
                wakes.append(due)
        if not candidates:
            return [], 0, min(wakes, default=0)
        _, bucket, limit = min(candidates, key=lambda candidate: candidate[0])
        chosen = [bucket[0]]
        for item in bucket[1:]:
            if sum(member.rows for member in chosen) + item.rows > limit:
                break
            chosen.append(item)
        self.waiting = [item for item in self.waiting if item not in chosen]
        return [item.ticket for item in chosen], sum(item.rows for item in chosen), 0


class FormerMachine(RuleBasedStateMachine):
    @initialize(
        max_rows=st.integers(1, 12),
        delay=st.sampled_from([0, 50, 500]),
        preferred=st.lists(st.integers(1, 12), max_size=3, unique=True),
        run=st.sampled_from([0, 30]),
    )
    def start(self, max_rows: int, delay: int, preferred: list[int], run: int) -> None:
        preferred = sorted(size for size in preferred if size <= max_rows)
        self.now = 1
        self.max_rows = max_rows
        self.real = BatchFormer(max_rows, delay_ns=delay, preferred=preferred, run_ns=run, n_key=2)
        self.plain = PlainFormer(max_rows, delay, preferred, run)

    @rule(
        rows=st.integers(1, 12),
        shape=st.tuples(st.integers(0, 2), st.integers(0, 1)),
        level=st.integers(0, 2),
        deadline=st.one_of(st.just(0), st.integers(1, 400)),
        expires=st.one_of(st.just(0), st.integers(1, 400)),
    )
    def push(self, rows: int, shape: tuple[int, int], level: int, deadline: int, expires: int) -> None:
        rows = min(rows, self.max_rows)
        deadline = deadline and self.now + deadline
        expires = expires and self.now + expires
        ticket = self.real.push(self.now, rows=rows, shape=shape, level=level, deadline_ns=deadline, expires_ns=expires)
        self.plain.waiting.append(Waiting(ticket, self.now, rows, shape, level, deadline, expires))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.plain.waiting:
            item = data.draw(st.sampled_from(self.plain.waiting))
            self.real.cancel(item.ticket)
            self.plain.waiting.remove(item)

    @rule(by=st.integers(0, 300))
    def pass_time(self, by: int) -> None:
        self.now += by

    @rule()
    def form(self) -> None:
        assert self.real.form(self.now) == self.plain.form(self.now)

    @rule()
    def expire(self) -> None:
        ended = {
            item.ticket
            for item in self.plain.waiting
            if any(end and end <= self.now for end in (item.deadline_ns, item.expires_ns))
        }
        assert set(self.real.expire(self.now)) == ended
        self.plain.waiting = [item for item in self.plain.waiting if item.ticket not in ended]

    @invariant()
    def same_length(self) -> None:
        if hasattr(self, "real"):
            assert len(self.real) == len(self.plain.waiting)


TestFormer = FormerMachine.TestCase
TestFormer.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_rows_count_not_requests() -> None:
    former = BatchFormer(8)
    tickets = [former.push(0, rows=rows) for rows in (3, 4, 2, 8)]
    assert former.form(0)[:2] == (tickets[:2], 7)
    assert former.form(0)[:2] == ([tickets[2]], 2)
    assert former.form(0)[:2] == ([tickets[3]], 8)


def test_shapes_never_flush_each_other() -> None:
    former = BatchFormer(4, delay_ns=100)
    first = former.push(0, shape=(1,))
    second = former.push(10, shape=(2,))
    assert former.form(20) == ([], 0, 100), "a second shape made the first one leave early"
    assert former.form(100) == ([first], 1, 0)
    assert former.form(100) == ([], 0, 110)
    assert former.form(110) == ([second], 1, 0)


def test_a_full_batch_does_not_wait() -> None:
    former = BatchFormer(2, delay_ns=1000)
    tickets = [former.push(0), former.push(0), former.push(0)]
    assert former.form(0)[0] == tickets[:2]
    assert former.form(0) == ([], 0, 1000)


def test_a_preferred_size_does_not_wait() -> None:
    former = BatchFormer(8, delay_ns=1000, preferred=[2, 4])
    tickets = [former.push(0) for _ in range(5)]
    assert former.form(0)[0] == tickets[:4]
    assert former.form(0) == ([], 0, 1000)
    assert former.form(1000)[0] == tickets[4:]


def test_levels_then_deadlines_then_arrival() -> None:
    former = BatchFormer(8)
    late, early, low, plain = (
        former.push(0, level=1, deadline_ns=900),
        former.push(0, level=1, deadline_ns=500),
        former.push(0, level=2, deadline_ns=100),
        former.push(0, level=1),
    )
    assert former.form(0)[0] == [early, late, plain, low]


def test_a_batch_starts_early_enough_for_its_first_deadline() -> None:
    former = BatchFormer(8, delay_ns=1000, run_ns=200)
    ticket = former.push(0, deadline_ns=500)
    assert former.form(0) == ([], 0, 300)
    assert former.form(300)[0] == [ticket]


def test_requests_without_deadline_are_not_overtaken_for_ever() -> None:
    former = BatchFormer(1)
    patient = former.push(0)
    hurried = former.push(PATIENCE_NS + 1, deadline_ns=PATIENCE_NS + 2)
    assert former.form(PATIENCE_NS + 1)[0] == [patient]
    assert former.form(PATIENCE_NS + 1)[0] == [hurried]
