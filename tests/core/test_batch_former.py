"""The queue and the former against a plain-Python model, and the rules one by one."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aiorch_server._core import BatchFormer

PATIENCE_NS = 1_000_000_000
Curve = Sequence[tuple[int, int]]


@dataclass
class Waiting:
    ticket: int
    arrival_ns: int
    rows: int
    shape: tuple[int, ...]
    level: int
    deadline_ns: int
    expires_ns: int
    end_ns: int

    @property
    def place(self) -> tuple[int, int]:
        urgency = self.arrival_ns + PATIENCE_NS
        return self.level, min(urgency, self.end_ns or urgency)

    @property
    def order(self) -> tuple[tuple[int, int], int]:
        return self.place, self.ticket


@dataclass
class Policy:
    max_rows: int
    delay_ns: int = 0
    target_ns: int = 0
    margin_ns: int = 0
    is_deferring: bool = False
    is_shedding: bool = False
    instances: int = 1
    curve: Curve = ()


class PlainFormer:
    """The same rules, slowly: lists, sorted anew each time."""

    def __init__(self, policy: Policy, preferred: list[int], run_ns: int) -> None:
        self.policy, self.preferred, self.run_ns = policy, preferred, run_ns
        self.waiting: list[Waiting] = []
        self.formed = 0

    def run_time(self, rows: int) -> int:
        curve = self.policy.curve
        if not curve:
            return 0
        if len(curve) == 1 or rows <= curve[0][0]:
            return curve[0][1]
        (low, low_ns), (high, high_ns) = next(
            (pair for pair in itertools.pairwise(curve) if rows <= pair[1][0]), (curve[-2], curve[-1])
        )
        return low_ns + (high_ns - low_ns) * (rows - low) // (high - low)

    def rows_within(self, ns: int, most: int) -> int:
        return max((rows for rows in range(1, most + 1) if self.run_time(rows) <= ns), default=0)

    def find_end(self, received_ns: int, deadline_ns: int) -> int:
        ends = [deadline_ns] if deadline_ns else []
        if self.policy.target_ns:
            ends.append(received_ns + self.policy.target_ns)
        return min(ends, default=0)

    def bucket(self, shape: tuple[int, ...]) -> list[Waiting]:
        return sorted((item for item in self.waiting if item.shape == shape), key=lambda item: item.order)

    def shapes(self) -> set[tuple[int, ...]]:
        return {item.shape for item in self.waiting}

    def due_at(self, bucket: list[Waiting]) -> int:
        oldest = min(bucket, key=lambda item: item.ticket)
        rows = max(bucket[0].rows, min(sum(item.rows for item in bucket), self.policy.max_rows))
        ends = [bucket[0].end_ns, oldest.end_ns] if self.policy.is_deferring else [bucket[0].deadline_ns]
        run_ns = self.run_time(rows) if self.policy.curve else self.run_ns
        starts = [end - self.policy.margin_ns - run_ns for end in ends if end]
        return min([oldest.arrival_ns + self.policy.delay_ns, *starts])

    def form(self, now_ns: int) -> tuple[list[int], int, int]:
        policy = self.policy
        candidates: list[tuple[tuple[tuple[int, int], int], list[Waiting], int]] = []
        wakes: list[int] = []
        for shape in self.shapes():
            bucket = self.bucket(shape)
            rows = sum(item.rows for item in bucket)
            due = self.due_at(bucket)
            fillable = [size for size in self.preferred if size <= rows]
            if rows >= policy.max_rows or due <= now_ns:
                candidates.append((bucket[0].order, bucket, policy.max_rows))
            elif fillable:
                candidates.append((bucket[0].order, bucket, max(fillable)))
            else:
                wakes.append(due)
        if not candidates:
            return [], 0, min(wakes, default=0)
        _, bucket, limit = min(candidates, key=lambda candidate: candidate[0])
        first = bucket[0]
        self.formed += 1
        oldest = min(self.waiting, key=lambda item: item.ticket)
        if self.formed % 16 == 0 and oldest.arrival_ns + PATIENCE_NS <= now_ns:
            bucket, limit = [item for item in self.waiting if item.shape == oldest.shape], policy.max_rows
            first = bucket[0]
        elif policy.is_shedding and policy.curve and first.end_ns:
            within = self.rows_within(first.end_ns - now_ns, limit)
            limit = within if within >= first.rows else limit
        chosen = [first]
        for item in bucket[1:]:
            if sum(member.rows for member in chosen) + item.rows > limit:
                break
            chosen.append(item)
        self.waiting = [item for item in self.waiting if item not in chosen]
        return [item.ticket for item in chosen], sum(item.rows for item in chosen), 0

    def drop_late(self, now_ns: int) -> set[int]:
        policy, dropped = self.policy, set()
        if not policy.is_shedding or not policy.curve:
            return set()
        for shape in self.shapes():
            while len(self.waiting) > 1 and (bucket := self.bucket(shape)):
                head, newest = bucket[0], max(bucket, key=lambda item: item.ticket)
                rows, cap, left = sum(item.rows for item in bucket), policy.max_rows, head.end_ns - now_ns
                if not head.end_ns or self.run_time(min(cap, rows)) <= left:
                    break
                first = self.rows_within(left, min(cap, rows))
                if first >= head.rows:
                    rest = rows - first
                    batches = math.ceil(rest / cap)
                    rounds = math.ceil(batches / policy.instances)
                    end = now_ns + self.run_time(first) + rounds * self.run_time(min(cap, rest))
                    if not newest.end_ns or end <= newest.end_ns:
                        break
                self.waiting.remove(head)
                dropped.add(head.ticket)
        return dropped

    def finish_of(self, free_ns: list[int], batches: int, rows: int, now_ns: int) -> int:
        free = [max(at, now_ns) for at in free_ns]
        heapq.heapify(free)
        for _ in range(batches):
            heapq.heapreplace(free, free[0] + max(1, self.run_time(self.policy.max_rows)))
        return free[0] + self.run_time(rows)

    def foretell(self, now_ns: int, free_ns: list[int], item: Waiting) -> tuple[int, int]:
        cap, finish = self.policy.max_rows, 0
        if not self.policy.curve:
            return 0, 0
        for is_exact in (False, True):
            batches, rows = 0, item.rows
            for shape in self.shapes():
                ahead = sum(each.rows for each in self.bucket(shape) if not is_exact or each.place <= item.place)
                if shape == item.shape and ahead % cap + item.rows <= cap:
                    batches, rows = batches + ahead // cap, rows + ahead % cap
                else:
                    batches += -(-ahead // cap)
            finish = self.finish_of(free_ns, batches, rows, now_ns)
            late = finish + self.policy.margin_ns - item.end_ns
            if not item.end_ns or late <= 0:
                return finish, 0
        is_alone = not batches and rows == item.rows and min(free_ns) <= now_ns
        return finish, 0 if is_alone else late


curves = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 60)), max_size=4).map(
    lambda steps: [
        (sum(rows for rows, _ in steps[: at + 1]), sum(ns for _, ns in steps[: at + 1])) for at in range(len(steps))
    ]
)
spans = st.sampled_from([0, 50, 500])
changes = st.fixed_dictionaries(
    {},
    optional={
        "max_rows": st.integers(1, 12),
        "delay_ns": spans,
        "target_ns": st.sampled_from([0, 40, 150, 400]),
        "margin_ns": st.sampled_from([0, 20]),
        "is_deferring": st.booleans(),
        "is_shedding": st.booleans(),
        "instances": st.integers(1, 3),
        "curve": curves,
    },
)
shapes = st.tuples(st.integers(0, 2), st.integers(0, 1))
times = st.one_of(st.just(0), st.integers(1, 400))


class FormerMachine(RuleBasedStateMachine):
    @initialize(
        max_rows=st.integers(1, 12),
        delay=spans,
        preferred=st.lists(st.integers(1, 12), max_size=3, unique=True),
        run=st.sampled_from([0, 30]),
        change=changes,
    )
    def start(
        self, max_rows: int, delay: int, preferred: list[int], run: int, change: dict[str, int | bool | Curve]
    ) -> None:
        preferred = sorted(size for size in preferred if size <= max_rows)
        self.now = 1000
        self.max_rows = max_rows
        self.real = BatchFormer(max_rows, delay_ns=delay, preferred=preferred, run_ns=run, n_key=2)
        self.plain = PlainFormer(Policy(max_rows, delay), preferred, run)
        self.change(change)

    @rule(change=changes)
    def change(self, change: dict[str, int | bool | Curve]) -> None:
        if "max_rows" in change:
            change["max_rows"] = min(int(change["max_rows"]), self.max_rows)  # type: ignore[arg-type]
        self.real.set_policy(**change)  # type: ignore[arg-type]
        for name, value in change.items():
            setattr(self.plain.policy, name, value)

    @rule(rows=st.integers(1, 12), shape=shapes, level=st.integers(0, 2), deadline=times, expires=times, since=times)
    def push(self, rows: int, shape: tuple[int, int], level: int, deadline: int, expires: int, since: int) -> None:
        rows = min(rows, self.max_rows)
        deadline = deadline and self.now + deadline
        expires = expires and self.now + expires
        received = self.now - since
        end = self.plain.find_end(received, deadline)
        ticket = self.real.push(
            self.now,
            rows=rows,
            shape=shape,
            level=level,
            deadline_ns=deadline,
            expires_ns=expires,
            received_ns=received,
        )
        self.plain.waiting.append(Waiting(ticket, self.now, rows, shape, level, deadline, expires, end))

    @rule(
        rows=st.integers(1, 12),
        shape=shapes,
        level=st.integers(0, 2),
        deadline=times,
        free=st.lists(st.integers(-50, 600), min_size=1, max_size=4),
    )
    def foretell(self, rows: int, shape: tuple[int, int], level: int, deadline: int, free: list[int]) -> None:
        rows = min(rows, self.max_rows)
        deadline = deadline and self.now + deadline
        item = Waiting(0, self.now, rows, shape, level, deadline, 0, self.plain.find_end(self.now, deadline))
        free = [self.now + each for each in free]
        assert self.real.foretell(
            self.now, free, rows=rows, shape=shape, level=level, deadline_ns=deadline
        ) == self.plain.foretell(self.now, free, item)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.plain.waiting:
            item = data.draw(st.sampled_from(self.plain.waiting))
            self.real.cancel(item.ticket)
            self.plain.waiting.remove(item)

    @rule(by=st.one_of(st.integers(0, 300), st.just(PATIENCE_NS)))
    def pass_time(self, by: int) -> None:
        self.now += by

    @rule()
    def drop_late(self) -> None:
        shapes = self.plain.shapes()
        before = list(self.plain.waiting)
        real, plain = set(self.real.drop_late(self.now)), self.plain.drop_late(self.now)
        if len(shapes) > 1 and len(self.plain.waiting) == 1 and real != plain:
            # which shape keeps the last one is nobody's promise
            assert len(real) == len(plain)
            self.plain.waiting = [item for item in before if item.ticket not in real]
        else:
            assert real == plain

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
TestFormer.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)


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


def test_no_level_starves() -> None:
    former = BatchFormer(2)
    patient = [former.push(0, level=4), former.push(0, level=3)]
    now, served = PATIENCE_NS - 100, []
    for _ in range(40):
        urgent = [former.push(now), former.push(now)]
        served.append(former.form(now)[0])
        now += 10
        if served[-1] != urgent:
            assert served[-1] == patient, "in the order of arrival, whatever their levels"
            break
    assert len(served) == 16
    for _ in range(15):
        assert former.form(now)[0] == urgent
        urgent = [former.push(now), former.push(now)]


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


LINE = [(1, 100), (8, 800)]
STEEP = [(1, 100), (4, 130), (8, 1000)]


def test_the_wrong_policies_are_refused_and_change_nothing() -> None:
    former = BatchFormer(4, delay_ns=10)
    for wrong in (
        {"max_rows": 0},
        {"max_rows": 5},
        {"delay_ns": -1},
        {"target_ns": -1},
        {"margin_ns": 2**63 - 1},
        {"instances": -1},
        {"curve": [(0, 1)]},
        {"curve": [(1, -1)]},
        {"curve": [(2, 1), (1, 2)]},
        {"curve": [(1, 2), (2, 1)]},
        {"curve": [(rows, 1) for rows in range(1, 35)]},
    ):
        with pytest.raises(ValueError):
            former.set_policy(**{"delay_ns": 99, **wrong})  # type: ignore[arg-type]
    former.push(0)
    assert former.form(0) == ([], 0, 10)


def test_a_request_larger_than_the_cap_runs_alone() -> None:
    former = BatchFormer(8)
    large, small = former.push(0, rows=8), former.push(0)
    former.set_policy(max_rows=1)
    assert former.form(0) == ([large], 8, 0)
    assert former.form(0) == ([small], 1, 0)


def test_waiting_ends_when_the_oldest_could_not_make_it_otherwise() -> None:
    former = BatchFormer(8, delay_ns=10_000, target_ns=1000, margin_ns=50, is_deferring=True, curve=LINE)
    oldest = former.push(0)
    assert former.form(0) == ([], 0, 1000 - 50 - 100)
    others = [former.push(400), former.push(500)]
    assert former.form(500) == ([], 0, 1000 - 50 - 300), "a larger batch must start sooner"
    assert former.form(650) == ([oldest, *others], 3, 0)


def test_waiting_is_bounded_by_the_delay() -> None:
    former = BatchFormer(8, delay_ns=20, target_ns=10_000, is_deferring=True, curve=LINE)
    former.push(0)
    assert former.form(0) == ([], 0, 20)


def test_a_batch_is_no_larger_than_its_first_end_allows() -> None:
    former = BatchFormer(8, target_ns=1000, is_shedding=True, curve=STEEP)
    tickets = [former.push(0) for _ in range(8)]
    assert former.form(869)[0] == tickets[:4]
    assert former.form(869)[0] == tickets[4:]


def test_who_would_force_a_small_batch_is_dropped_where_others_need_a_large_one() -> None:
    former = BatchFormer(8, target_ns=1000, is_shedding=True, curve=LINE)
    early = [former.push(0) for _ in range(2)]
    late = [former.push(300) for _ in range(8)]
    assert set(former.drop_late(450)) == set(early), "after these two the last would end at 1450"
    assert former.form(450) == (late, 8, 0)


def test_who_can_run_in_a_small_batch_is_not_dropped_where_there_is_time_for_both() -> None:
    former = BatchFormer(8, target_ns=1000, is_shedding=True, curve=STEEP)
    early = [former.push(0) for _ in range(2)]
    late = [former.push(800) for _ in range(2)]
    assert former.drop_late(880) == []
    assert former.form(880)[0] == [*early, *late[:1]], "three of them take 120"


def test_the_last_one_is_never_dropped() -> None:
    former = BatchFormer(8, target_ns=1000, is_shedding=True, curve=[(1, 10_000)])
    tickets = [former.push(0) for _ in range(3)]
    assert set(former.drop_late(0)) == set(tickets[:2])
    assert former.form(0) == ([tickets[2]], 1, 0)


def test_who_finds_a_free_instance_and_nobody_before_is_never_late() -> None:
    former = BatchFormer(8, target_ns=1000, is_shedding=True, curve=[(1, 10_000)])
    assert former.foretell(0, [0]) == (10_000, 0)
    assert former.foretell(0, [1]) == (10_001, 9_001)
    former.push(0)
    assert former.foretell(0, [0])[1] == 9_000


def test_only_who_is_served_before_counts() -> None:
    former = BatchFormer(1, target_ns=1000, is_shedding=True, curve=[(1, 300)])
    for level in (1, 1, 1):
        former.push(0, level=level)
    assert former.foretell(0, [0], level=1) == (1200, 200)
    assert former.foretell(0, [0], level=0) == (300, 0)
    assert former.foretell(0, [0], level=1, deadline_ns=400) == (300, 0)


def test_too_many_to_count_are_all_before() -> None:
    former = BatchFormer(1, target_ns=10**6, is_shedding=True, curve=[(1, 1000)])
    for _ in range(2000):
        former.push(0)
    former.push(10)  # the last of all
    assert former.foretell(5, [0])[0] == 2001 * 1000 + 5 + 1000
    assert former.foretell(5, [0], deadline_ns=6)[0] == 5 + 1000
