"""Who is refused where not everybody can be served: two tenants and many, on the queue alone and in a scheduler."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorch_server._core import BatchFormer

MS = 1_000_000
CURVE = [(1, 1 * MS), (8, 4 * MS)]
#: Rows per ns of one instance that is never short of work.
CAPACITY = 8 / (4 * MS)
FLOODER, OTHER = 1, 2


@dataclass(frozen=True)
class Flow:
    """One tenant's requests: so many rows per ns, in requests of ``rows`` rows."""

    tenant: int
    load: float
    weight: float = 1.0
    rows: int = 1
    level: int = 0

    def arrivals(self, chance: random.Random, until_ns: int) -> Iterator[tuple[int, Flow]]:
        at = 0.0
        while (at := at + chance.expovariate(self.load / self.rows)) < until_ns:
            yield int(at), self


@dataclass
class Outcome:
    """Rows by tenant, of what came after the warm-up: offered, answered in time, refused or made way, dropped."""

    offered: Counter[int] = field(default_factory=Counter)
    good: Counter[int] = field(default_factory=Counter)
    fates: Counter[str] = field(default_factory=Counter)


def serve(
    flows: Sequence[Flow],
    *,
    duration_ns: int,
    warm_up_ns: int,
    target_ns: int = 0,
    max_waiting: int = 16384,
    instances: int = 1,
    seed: int = 0,
) -> Outcome:
    """Serves the flows, and checks that each request has exactly one end."""
    chance = random.Random(seed)
    former = BatchFormer(8, target_ns=target_ns, is_shedding=target_ns > 0, instances=instances, curve=CURVE)
    coming = sorted((each for flow in flows for each in flow.arrivals(chance, duration_ns)), key=lambda each: each[0])
    coming.reverse()
    outcome = Outcome()
    free_ns = [0] * instances
    open_: dict[int, tuple[int, Flow]] = {}

    def end(ticket: int, fate: str, finish_ns: int = 0) -> None:
        at_ns, flow = open_.pop(ticket)  # KeyError: it had an end already
        outcome.fates[fate] += 1
        if fate == "served" and at_ns >= warm_up_ns and (not target_ns or finish_ns <= at_ns + target_ns):
            outcome.good[flow.tenant] += flow.rows

    offered = 0
    while coming or len(former):
        first = min(range(instances), key=free_ns.__getitem__)
        now_ns = coming[-1][0] if coming else max(free_ns[first], 1)
        if len(former) and free_ns[first] <= now_ns:
            now_ns = free_ns[first]
            for ticket in former.drop_late(now_ns):
                end(ticket, "dropped")
            tickets, rows, _ = former.form(now_ns)
            if tickets:
                free_ns[first] = now_ns + CURVE[0][1] + (rows - 1) * (CURVE[1][1] - CURVE[0][1]) // 7
                for ticket in tickets:
                    end(ticket, "served", free_ns[first])
            continue
        at_ns, flow = coming.pop()
        offered += 1
        if at_ns >= warm_up_ns:
            outcome.offered[flow.tenant] += flow.rows
        ticket, displaced = former.admit(
            at_ns, free_ns, tenant=flow.tenant, weight=flow.weight, rows=flow.rows, max_waiting=max_waiting
        )
        if ticket:
            open_[ticket] = at_ns, flow
        else:
            outcome.fates["refused"] += 1
            assert not displaced, "who is refused displaces nobody"
        for each in displaced:
            assert open_[each][1].tenant != flow.tenant
            end(each, "displaced")
        for index, each in enumerate(free_ns):  # an idle instance looks at once
            if each < at_ns:
                free_ns[index] = at_ns
    assert not open_ and outcome.fates.total() == offered
    return outcome


def share_of(flows: Sequence[Flow], tenant: int, capacity: float) -> float:
    """Weighted max-min: what a tenant gets of the capacity."""
    open_flows, left, given_ = list(flows), capacity, {}
    while open_flows:
        level = left / sum(each.weight for each in open_flows)
        small = [each for each in open_flows if each.load <= level * each.weight]
        if not small:
            given_.update({each.tenant: level * each.weight for each in open_flows})
            break
        for each in small:
            given_[each.tenant] = each.load
            left -= each.load
            open_flows.remove(each)
    return given_[tenant]


TWO = {
    "late": {"target_ns": 150 * MS},
    "full": {"max_waiting": 400},
}


@pytest.mark.parametrize("bound", sorted(TWO))
@settings(max_examples=40, deadline=None)
@given(
    # nearer to its share, bursts go beyond it
    part=st.one_of(st.floats(0.05, 0.7), st.floats(1.5, 10.0)),
    weight=st.sampled_from([1.0, 2.0, 4.0]),
    rows=st.integers(1, 3),
    instances=st.integers(1, 2),
    seed=st.integers(0, 2**32),
)
def test_who_keeps_to_his_share_does_not_notice_a_flood(
    bound: str, part: float, weight: float, rows: int, instances: int, seed: int
) -> None:
    """Half the capacity to each of two, by weight; the other offers ``part`` of its share, or far more."""
    capacity = CAPACITY * instances
    share = weight / (1 + weight)
    flows = [Flow(FLOODER, 10 * capacity), Flow(OTHER, part * share * capacity, weight, rows)]
    duration_ns, warm_up_ns = 1900 * MS, 400 * MS
    outcome = serve(flows, duration_ns=duration_ns, warm_up_ns=warm_up_ns, instances=instances, seed=seed, **TWO[bound])
    offered = outcome.offered[OTHER]
    served = sum(outcome.good.values())
    expected = min(offered, share * served)
    assert outcome.good[OTHER] >= 0.95 * expected, outcome
    assert served >= 0.9 * capacity * (duration_ns - warm_up_ns), "and little is lost by it"
    if part > 1:
        assert outcome.good[OTHER] <= 1.08 * expected, "nor does it get more"


def test_without_tenants_the_flood_wins() -> None:
    """What the other tests would see if nobody made way."""
    flows = [Flow(0, 10 * CAPACITY), Flow(0, 0.3 * CAPACITY)]
    outcome = serve(flows, duration_ns=1000 * MS, warm_up_ns=200 * MS, max_waiting=100)
    assert outcome.fates["displaced"] == 0 and outcome.fates["refused"] > 0.8 * outcome.fates.total()


@pytest.mark.parametrize("bound", sorted(TWO))
def test_nobody_starves_among_many(bound: str) -> None:
    flows = [Flow(FLOODER, 10 * CAPACITY), *(Flow(tenant, 0.2 * CAPACITY) for tenant in range(2, 22))]
    duration_ns, warm_up_ns = 4000 * MS, 500 * MS
    outcome = serve(flows, duration_ns=duration_ns, warm_up_ns=warm_up_ns, seed=3, **TWO[bound])
    share = CAPACITY * (duration_ns - warm_up_ns) / 21
    assert min(outcome.good.values()) > 0.75 * share and max(outcome.good.values()) < 1.35 * share, outcome.good


def test_a_single_large_request_has_its_turn() -> None:
    """However much more than a share it is: the first of a tenant that has nothing waiting comes in."""
    former = BatchFormer(8)
    for index in range(100):
        assert former.admit(index, [0], tenant=1 + index % 20, rows=1, max_waiting=100)[0]
    large, displaced = former.admit(100, [0], tenant=99, rows=32, max_waiting=100)
    assert large and len(displaced) == 1
    assert former.admit(101, [0], tenant=99, rows=32, max_waiting=100) == (0, []), "but the second waits for its share"


def test_who_has_one_request_keeps_it() -> None:
    former = BatchFormer(8)
    for index in range(100):
        assert former.admit(index, [0], tenant=1 + index, rows=8, max_waiting=100)[0]
    assert former.admit(100, [0], tenant=999, max_waiting=100) == (0, [])


def test_the_newest_of_the_heaviest_makes_way() -> None:
    former = BatchFormer(8)
    tickets = [
        former.admit(at, [0], tenant=tenant, weight=weight, max_waiting=9)[0]
        for at, (tenant, weight) in enumerate([(1, 1), (1, 1), (2, 4), (2, 4), (2, 4), (2, 4), (1, 1), (2, 4), (2, 4)])
    ]
    assert former.admit(9, [0], tenant=2, weight=4, max_waiting=9)[1] == [tickets[6]], (
        "three by one is more than six by four"
    )
    assert former.admit(10, [0], tenant=3, max_waiting=9)[1] == [tickets[1]]


def test_nobody_makes_way_for_who_is_less_urgent_or_nobodys() -> None:
    former = BatchFormer(8)
    for at in range(10):
        former.admit(at, [0], tenant=1, level=2, max_waiting=10)
    assert former.admit(10, [0], tenant=2, level=4, max_waiting=10) == (0, [])
    assert former.admit(10, [0], tenant=0, level=2, max_waiting=10) == (0, [])
    assert former.admit(10, [0], tenant=1, level=2, max_waiting=10) == (0, [])
    assert former.admit(10, [0], tenant=2, level=2, max_waiting=10)[1] == [10]


def test_who_was_delayed_was_promised_to_be_served() -> None:
    former = BatchFormer(8)
    for at in range(4):
        former.admit(at, [0], tenant=1, level=3, max_waiting=4)
    assert former.admit(4, [0], tenant=2, level=2, max_waiting=4) == (0, [])


def test_nobody_is_displaced_in_vain() -> None:
    former = BatchFormer(1, target_ns=5 * MS, is_shedding=True, curve=[(1, MS)])
    tickets = [former.admit(0, [0], tenant=1)[0] for _ in range(5)]
    assert all(tickets)
    for deadline_ns in (1, 2, MS // 2, MS - 1):  # before its own run could end
        assert former.admit(0, [1], tenant=2, deadline_ns=deadline_ns) == (0, [])
    assert former.admit(0, [0], tenant=2, shape=(7,)) == (6, [5]), "whatever the shape"
    assert former.admit(0, [4 * MS], tenant=3) == (0, []), "four would have to make way, and more than they have"
    assert len(former) == 5
    assert former.admit(0, [0], tenant=2, deadline_ns=2**62)[1] == [4], "the target comes before so late a deadline"


def test_tenants_by_the_thousand() -> None:
    former = BatchFormer(8)
    chance = random.Random(7)
    waiting: dict[int, int] = {}
    held: Counter[int] = Counter()
    served = 0
    for at in range(30_000):
        tenant = 1 + (chance.randrange(6000) if chance.random() < 0.5 else 0)
        ticket, displaced = former.admit(at, [0], tenant=tenant, max_waiting=4096)
        for each in displaced:
            held[waiting.pop(each)] -= 1
        if ticket:
            waiting[ticket] = tenant
            held[tenant] += 1
        elif held[tenant] == 0:
            assert max(held.values()) <= 2, "somebody had more than his share, and this one nothing"
        if at % 40 == 0:
            for each in former.form(at)[0]:
                held[waiting.pop(each)] -= 1
                served += 1
        if at % 97 == 0 and waiting:
            gone = next(iter(waiting))
            former.cancel(gone)
            held[waiting.pop(gone)] -= 1
        assert len(former) == len(waiting) <= 4096
    assert served > 7 * 750 and held[1] <= 2, "the flooder has no more left than others"
    while len(former):
        for each in former.form(10**9)[0]:
            del waiting[each]
    assert not waiting


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["admit", "admit", "admit", "form", "cancel", "expire", "late"]),
            st.integers(0, 5),  # tenant
            st.sampled_from([0.001, 1.0, 3.0, 1000.0]),
            st.integers(1, 9),
            st.sampled_from([0, 1, MS, 5 * MS, 2**62]),  # deadline
            st.integers(0, 3),  # level
            st.sampled_from([0, 1, MS, 10 * MS]),  # time that goes by
        ),
        max_size=80,
    )
)
def test_every_request_has_one_end(steps: list[tuple[str, int, float, int, int, int, int]]) -> None:
    former = BatchFormer(8, target_ns=8 * MS, is_shedding=True, curve=CURVE)
    now_ns, waiting, ended = 1, set[int](), set[int]()

    def end(tickets: list[int]) -> None:
        for each in tickets:
            waiting.remove(each)
            assert each not in ended
            ended.add(each)

    for step, tenant, weight, rows, deadline_ns, level, by_ns in steps:
        now_ns += by_ns
        if step == "admit":
            ticket, displaced = former.admit(
                now_ns,
                [now_ns],
                tenant=tenant,
                weight=weight,
                rows=rows,
                level=level,
                max_waiting=6,
                deadline_ns=min(now_ns + deadline_ns, 2**62) if deadline_ns else 0,
            )
            end(displaced)
            if ticket:
                waiting.add(ticket)
        elif step == "form":
            end(former.form(now_ns)[0])
        elif step == "expire":
            end(former.expire(now_ns))
        elif step == "late":
            end(former.drop_late(now_ns))
        elif waiting:
            gone = max(waiting)
            former.cancel(gone)
            end([gone])
        assert len(former) == len(waiting)
