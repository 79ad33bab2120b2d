"""The choice of a version by shares: against a model in plain Python, and what makes it worth having."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

import pytest
from hand_driven import make_spec
from hypothesis import given
from hypothesis import strategies as st
from share_model import ShareModel, find_worst_window

from aiorch_server._core import Router, Scheduler, Shares

weights = st.lists(st.integers(0, 10_000), min_size=1, max_size=16).filter(any)
keys = st.one_of(st.just(b""), st.binary(max_size=40))


@given(weights, st.booleans(), st.integers(0, 10_000), st.lists(keys, max_size=60))
def test_it_chooses_as_the_model_does(
    given_weights: Sequence[int], is_sticky: bool, sampled: int, asked: Sequence[bytes]
) -> None:
    pairs = [(7 * index + 1, weight) for index, weight in enumerate(given_weights)]
    shares, model = Shares(pairs, is_sticky=is_sticky, sampled=sampled), ShareModel(pairs, is_sticky, sampled)
    assert [shares.choose(key) for key in asked] == [model.choose(key) for key in asked]
    following = Shares(reversed(pairs), is_sticky=is_sticky, sampled=sampled, after=shares)
    assert following.turns == shares.turns == model.turns
    model.shares.reverse()
    assert [following.choose(key) for key in asked] == [model.choose(key) for key in asked]


@pytest.mark.parametrize(
    ("pairs", "sampled"), [([], 0), ([(1, 0)], 0), ([(0, 1)], 0), ([(1, -1)], 0), ([(1, 1)], 10_001), ([(1, 1)], -1)]
)
def test_what_makes_no_shares(pairs: list[tuple[int, int]], sampled: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        Shares(pairs, sampled=sampled)
    with pytest.raises(ValueError, match="must be"):
        Shares([(version, 1) for version in range(1, 18)])


def test_routes_know_only_versions_that_are_there() -> None:
    router = Router()
    router.publish({"echo": (3, {3: Scheduler(make_spec())}, Shares([(3, 1)]))})
    with pytest.raises(ValueError, match=r"shares of 'echo' are for \(3, 4\), not all among \[3\]"):
        router.publish({"echo": (3, {3: Scheduler(make_spec())}, Shares([(3, 1), (4, 1)]))})
    with pytest.raises(TypeError):
        router.publish({"echo": (3, {3: Scheduler(make_spec())}, object())})  # type: ignore[dict-item]


@pytest.mark.parametrize("shares", [(9_000, 1_000), (5_000, 5_000), (9_900, 100), (6_000, 3_000, 1_000), (1, 9_999)])
@pytest.mark.parametrize("sampled", [0, 500])
def test_every_window_has_its_shares_and_the_sample_has_them_too(shares: Sequence[int], sampled: int) -> None:
    pairs = list(enumerate(shares, 1))
    chosen = Shares(pairs, sampled=sampled)
    choices = [chosen.choose() for _ in range(100_000)]
    for version, share in pairs:
        part = share / 10_000
        assert find_worst_window([version for version, _ in choices], version, part) <= 3
        in_sample = [found for found, is_sampled in choices if is_sampled]
        assert abs(len(in_sample) - sampled * 10) <= 3
        assert abs(in_sample.count(version) - part * len(in_sample)) <= 5


@pytest.mark.parametrize("clients", range(2, 21))
def test_clients_who_take_turns_all_get_the_same_shares(clients: int) -> None:
    """An error that counts up to ten would send every second or tenth client to the canary always."""
    shares = Shares([(1, 9_000), (2, 1_000)])
    canary = Counter[int]()
    for turn in range(clients * 1000):
        canary[turn % clients] += shares.choose()[0] == 2
    assert all(90 <= canary[client] <= 110 for client in range(clients)), canary


def test_threads_share_one_counter() -> None:
    shares = Shares([(1, 9_000), (2, 1_000)], sampled=500)
    counts: list[Counter[tuple[int, bool]]] = []

    def run() -> None:
        counts.append(Counter(shares.choose() for _ in range(25_000)))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shares.turns == 100_000
    model = ShareModel([(1, 9_000), (2, 1_000)], sampled=500)
    assert sum(counts, Counter()) == Counter(model.choose() for _ in range(100_000))


def find_places(*shares: tuple[int, int]) -> dict[bytes, int]:
    sticky = Shares(shares, is_sticky=True)
    return {key: sticky.choose(key)[0] for key in (b"user-%d" % number for number in range(20_000))}


def test_a_share_that_grows_takes_keys_and_gives_none_away() -> None:
    before = find_places((1, 9_000), (2, 1_000))
    for stable, canary in [(7_500, 2_500), (5_000, 5_000), (1_000, 9_000), (0, 10_000)]:
        after = find_places((1, stable), (2, canary))
        assert all(after[key] == 2 for key, version in before.items() if version == 2)
        assert abs(Counter(after.values())[2] - 2 * canary) < 300  # of 20,000; four deviations
        before = after
    three = find_places((1, 8_000), (2, 1_000), (3, 1_000))
    grown = find_places((1, 7_000), (2, 1_000), (3, 2_000))
    assert all(grown[key] == 3 for key, version in three.items() if version == 3)
    # the one that went away gives all it had, nobody else moves
    without = find_places((1, 8_000), (2, 1_000))
    assert all(without[key] == version for key, version in three.items() if version != 3)


def test_keys_spread_evenly() -> None:
    """Chi-square over ten equal versions, for keys that differ in their last digits only."""
    places = find_places(*((version, 1_000) for version in range(1, 11)))
    counted = Counter(places.values())
    expected = len(places) / 10
    assert sum((counted[version] - expected) ** 2 / expected for version in range(1, 11)) < 27.9  # 9 degrees, 0.1 %


def test_a_key_counts_only_where_shares_are_sticky() -> None:
    pairs = [(1, 5_000), (2, 5_000)]
    loose, sticky = Shares(pairs), Shares(pairs, is_sticky=True)
    assert {loose.choose(b"anna")[0] for _ in range(10)} == {1, 2}
    assert len({sticky.choose(b"anna")[0] for _ in range(10)}) == 1
    assert {sticky.choose()[0] for _ in range(10)} == {1, 2}
    assert (loose.turns, sticky.turns) == (10, 10)
    assert {loose.choose(b"anna", is_kept=True)[0] for _ in range(10)} == {sticky.choose(b"anna")[0]}
