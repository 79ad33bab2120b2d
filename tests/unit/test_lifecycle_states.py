"""The table of a model version's states."""

from __future__ import annotations

import itertools

import pytest

from aiorch_server.errors import InternalError
from aiorch_server.lifecycle.states import TRANSITIONS, explain_transition
from aiorch_server.types import ModelState


def test_every_step_that_is_not_in_the_table_is_an_internal_error() -> None:
    for current, following in itertools.product(ModelState, repeat=2):
        if (current, following) in TRANSITIONS:
            assert explain_transition(current, following)
        else:
            with pytest.raises(InternalError, match=f"cannot go from {current.value} to {following.value}"):
                explain_transition(current, following)


def test_the_life_of_a_version_is_legal() -> None:
    S = ModelState
    life = [S.UNKNOWN, S.LOADING, S.UNAVAILABLE, S.LOADING, S.READY, S.UNLOADING, S.UNAVAILABLE, S.LOADING]
    for current, following in itertools.pairwise(life):
        explain_transition(current, following)


def test_nothing_leads_back_to_unknown_and_ready_is_only_reached_by_loading() -> None:
    assert all(after is not ModelState.UNKNOWN for _, after in TRANSITIONS)
    assert [before for before, after in TRANSITIONS if after is ModelState.READY] == [ModelState.LOADING]
