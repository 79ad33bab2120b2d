"""Rows of slabs, by hand and against a plain model: in order, never twice, in memory that is reused and bounded."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

SlabProbe: Any = importlib.import_module("aiorch_server._core.slabs").SlabProbe
read_slab_bytes: Any = importlib.import_module("aiorch_server._core.buffers").read_slab_bytes

ROW_BYTES = 65536
MAX_SLAB_BYTES = 64 << 20
LARGEST_SLAB_BYTES = 16 << 20


def make_slab(usual_rows: int) -> Any:
    slab = SlabProbe()
    for _ in range(60):  # a slow average
        slab.note_batch(usual_rows)
    return slab


@pytest.fixture(autouse=True)
def no_slab_is_left() -> Any:
    yield
    assert read_slab_bytes() == 0


def test_there_are_no_rows_where_requests_run_alone() -> None:
    slab = SlabProbe()
    assert slab.reserve(ROW_BYTES, 1) is None
    slab = make_slab(1)
    assert slab.reserve(ROW_BYTES, 1) is None


def test_the_rows_of_a_batch_lie_one_after_the_other() -> None:
    slab = make_slab(4)
    places = [slab.reserve(ROW_BYTES, rows) for rows in (1, 2, 1)]
    base, first = places[0]
    assert first % 64 == 0
    assert places == [(base, first), (base, first + ROW_BYTES), (base, first + 3 * ROW_BYTES)]
    for buffer, _ in places:
        slab.let_go(buffer)
    slab.note_batch(4)
    assert slab.reserve(ROW_BYTES, 1) == (base, first)  # nobody has a row any more: the same, warm memory


def test_a_batch_begins_where_all_of_it_fits() -> None:
    slab = make_slab(4)
    first = [slab.reserve(ROW_BYTES, 1)[0] for _ in range(3)]
    slab.note_batch(3)
    assert slab.reserve(ROW_BYTES, 1)[0] not in first


def test_rows_that_a_vector_register_would_not_like_are_not_given() -> None:
    slab = make_slab(4)
    assert slab.reserve(ROW_BYTES + 4, 1) is None
    assert slab.reserve(0, 1) is None
    assert slab.reserve(LARGEST_SLAB_BYTES, 1) is None
    assert slab.reserve(LARGEST_SLAB_BYTES // 2, 3) is None


def test_the_memory_of_all_slabs_is_bounded() -> None:
    slab = make_slab(64)
    places = []
    while (place := slab.reserve(ROW_BYTES * 4, 1)) is not None:
        places.append(place)
        assert read_slab_bytes() <= MAX_SLAB_BYTES
    assert len(places) == MAX_SLAB_BYTES // (ROW_BYTES * 4)
    for buffer, _ in places:
        slab.let_go(buffer)
    assert slab.reserve(ROW_BYTES * 4, 1) is not None


class Slabs(RuleBasedStateMachine):
    """Whatever happens, rows that somebody has do not overlap, and what nobody has is let go of."""

    def __init__(self) -> None:
        super().__init__()
        self.slab = make_slab(4)
        self.held: list[tuple[int, int, int]] = []  # slab, start, end

    @rule(rows=st.integers(1, 9), row_bytes=st.sampled_from([ROW_BYTES, ROW_BYTES * 3, 4096, 4100]))
    def reserve(self, rows: int, row_bytes: int) -> None:
        place = self.slab.reserve(row_bytes, rows)
        if place is None:
            return
        assert row_bytes % 64 == 0
        buffer, start = place
        end = start + rows * row_bytes
        assert all(end <= other_start or other_end <= start for _, other_start, other_end in self.held)
        # in order: above all rows of this slab that somebody still has
        assert all(other_end <= start for other, _, other_end in self.held if other == buffer)
        self.held.append((buffer, start, end))

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 1 << 30))
    def let_go(self, number: int) -> None:
        self.slab.let_go(self.held.pop(number % len(self.held))[0])

    @rule(rows=st.integers(1, 8))
    def take(self, rows: int) -> None:
        self.slab.note_batch(rows)

    @rule()
    def relax(self) -> None:
        self.slab.relax()
        if not self.held:
            assert read_slab_bytes() == 0

    @invariant()
    def is_bounded(self) -> None:
        assert read_slab_bytes() <= MAX_SLAB_BYTES

    def teardown(self) -> None:
        self.slab = None
        self.held = []
        assert read_slab_bytes() == 0


Slabs.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSlabs = Slabs.TestCase
