"""Version policies: the right versions, one step at a time, and never without one that serves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.config.placement import AllVersions, LatestVersions, SpecificVersions, VersionPolicy
from aiorch_server.lifecycle.version_policy import (
    Action,
    Standing,
    Verb,
    choose_action,
    choose_aspired,
    find_missing,
)
from aiorch_server.types import ModelState

READY, LOADING = Standing(ModelState.READY), Standing(ModelState.LOADING)
UNLOADING, GONE = Standing(ModelState.UNLOADING), Standing(ModelState.UNAVAILABLE)
FAILED = Standing(ModelState.UNAVAILABLE, has_failed=True)
LATEST_TWO = VersionPolicy(latest=LatestVersions(num_versions=2))
ALL = VersionPolicy(all=AllVersions())
SPECIFIC = VersionPolicy(specific=SpecificVersions(versions=(1, 3, 9)))


@pytest.mark.parametrize(
    ("policy", "present", "aspired"),
    [
        (None, [1, 10, 2], (10,)),
        (VersionPolicy(latest=LatestVersions()), [1, 10, 2], (10,)),
        (LATEST_TWO, [1, 10, 2], (10, 2)),
        (LATEST_TWO, [4], (4,)),
        (ALL, [1, 3, 2], (3, 2, 1)),
        (SPECIFIC, [1, 2, 3], (3, 1)),
        (ALL, [], ()),
        (None, [], ()),
    ],
)
def test_aspired_versions(policy: VersionPolicy | None, present: list[int], aspired: tuple[int, ...]) -> None:
    assert choose_aspired(policy, present) == aspired


def test_versions_that_are_named_but_not_there() -> None:
    assert find_missing(SPECIFIC, [1, 2]) == (3, 9)
    assert find_missing(ALL, []) == find_missing(None, []) == ()


@pytest.mark.parametrize(
    ("standings", "aspired", "action"),
    [
        ({}, [], None),
        ({}, [1, 2], Action(Verb.LOAD, 2)),
        ({2: LOADING}, [1, 2], Action(Verb.LOAD, 1)),
        ({2: READY, 1: LOADING}, [1, 2], None),
        ({1: READY}, [2], Action(Verb.LOAD, 2)),
        ({1: READY, 2: LOADING}, [2], None),
        ({1: READY, 2: READY}, [2], Action(Verb.UNLOAD, 1)),
        ({1: READY, 2: READY}, [2, 3], Action(Verb.UNLOAD, 1)),
        ({1: READY, 2: FAILED}, [2], None),
        ({1: READY, 2: FAILED}, [2, 3], Action(Verb.LOAD, 3)),
        ({1: READY, 2: UNLOADING}, [2], None),
        ({1: READY, 2: GONE}, [2], Action(Verb.LOAD, 2)),
        ({1: READY, 2: READY}, [], Action(Verb.UNLOAD, 1)),
        ({1: LOADING, 2: FAILED}, [], None),
        ({1: UNLOADING}, [], None),
        ({3: READY, 2: FAILED}, [2, 3], None),
    ],
)
def test_the_next_action(standings: dict[int, Standing], aspired: list[int], action: Action[int] | None) -> None:
    assert choose_action(standings, aspired) == action


def test_a_changed_artefact_is_loaded_before_the_old_one_goes() -> None:
    old, new = (1, "a"), (1, "b")
    assert choose_action({old: READY}, [new]) == Action(Verb.LOAD, new)
    assert choose_action({old: READY, new: LOADING}, [new]) is None
    assert choose_action({old: READY, new: FAILED}, [new]) is None
    assert choose_action({old: READY, new: READY}, [new]) == Action(Verb.UNLOAD, old)


STANDINGS = st.builds(Standing, st.sampled_from(ModelState), st.just(False)) | st.just(FAILED)


@given(
    st.dictionaries(st.integers(1, 8), STANDINGS),
    st.sets(st.integers(1, 8)),
    st.sets(st.integers(1, 8)),
    st.randoms(use_true_random=False),
)
def test_it_converges_and_never_stops_serving(
    standings: dict[int, Standing], aspired: set[int], broken: set[int], random: object
) -> None:
    """Carries out actions with the loads of ``broken`` failing and what runs finishing in any order."""
    rng = random
    for _ in range(100):
        action = choose_action(standings, aspired)
        assert action == choose_action(dict(reversed(standings.items())), sorted(aspired))
        ready = {version for version, each in standings.items() if each.state is ModelState.READY}
        if action is not None and action.verb is Verb.LOAD:
            assert action.key in aspired - ready
            assert not standings.get(action.key, GONE).has_failed
            standings[action.key] = LOADING
        elif action is not None:
            assert action.key in ready - aspired
            assert not aspired or ready & aspired
            standings[action.key] = UNLOADING
        running = [version for version, each in standings.items() if each in (LOADING, UNLOADING)]
        if action is None and not running:
            break
        if running and (action is None or rng.random() < 0.5):  # type: ignore[attr-defined]
            version = rng.choice(running)  # type: ignore[attr-defined]
            if standings[version] == UNLOADING:
                standings[version] = GONE
            else:
                standings[version] = FAILED if version in broken else READY
    else:
        raise AssertionError("does not converge")
    ready = {version for version, each in standings.items() if each.state is ModelState.READY}
    loadable = {version for version in aspired if not standings[version].has_failed}
    assert loadable <= ready
    if loadable or not aspired:
        assert ready == loadable
