"""Who gets an instance more where the machine has not room for all."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.optimizer.budget import Claim, share_instances

CALM = Claim(priority=0, instances=1, fewest=1, most=4, is_short=False)
SHORT = replace(CALM, is_short=True)


def test_what_is_free_is_for_anybody_where_nobody_misses() -> None:
    assert share_instances([CALM, CALM], 4).limits == (3, 3)
    assert share_instances([], 4).limits == ()


def test_the_most_important_one_that_misses_comes_first() -> None:
    found = share_instances([SHORT, replace(SHORT, priority=2), replace(CALM, priority=9)], 4)
    assert (found.limits, found.giver) == ((1, 2, 1), None)


def test_the_least_important_one_gives_an_instance_up() -> None:
    two = replace(CALM, instances=2)
    found = share_instances([replace(two, priority=1), two, replace(SHORT, priority=5)], 5)
    assert (found.limits, found.giver, found.taker) == ((2, 2, 1), 1, 2)


def test_nobody_gives_to_an_equal_or_what_it_must_have() -> None:
    assert share_instances([replace(CALM, instances=2), SHORT], 3).giver is None
    assert share_instances([CALM, replace(SHORT, priority=5)], 2).giver is None


claims = st.builds(
    lambda priority, fewest, extra, room, is_short: Claim(
        priority, fewest + extra, fewest, fewest + extra + room, is_short
    ),
    st.integers(-2, 2), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3), st.booleans(),
)  # fmt: skip


@given(st.lists(claims, max_size=6), st.integers(1, 12))
def test_nobody_loses_by_a_limit_and_all_grow_within_the_budget(found: list[Claim], budget: int) -> None:
    shares = share_instances(found, budget)
    used = sum(claim.instances for claim in found)
    for claim, limit in zip(found, shares.limits, strict=True):
        assert claim.instances <= limit <= claim.most
        assert limit - claim.instances <= max(0, budget - used)
    if shares.giver is not None:
        assert shares.taker is not None
        assert found[shares.giver].priority < found[shares.taker].priority
        assert found[shares.giver].instances > found[shares.giver].fewest
