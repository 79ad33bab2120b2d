"""The deadline heap against a plain dictionary."""

from __future__ import annotations

import importlib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

TimerProbe: Any = importlib.import_module("aiorch_server._core.timers").TimerProbe

SIZE = 40
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, SIZE - 1), st.integers(1, 50)),
        st.tuples(st.just("clear"), st.integers(0, SIZE - 1), st.just(0)),
        st.tuples(st.just("take"), st.just(0), st.integers(0, 60)),
    ),
    max_size=300,
)


@given(STEPS)
def test_timers_come_back_in_order(steps: list[tuple[str, int, int]]) -> None:
    probe = TimerProbe(SIZE)
    model: dict[int, int] = {}
    for step, number, at_ns in steps:
        if step == "set" and number not in model:
            probe.set(number, at_ns)
            model[number] = at_ns
        elif step == "clear":
            probe.clear(number)
            model.pop(number, None)
        elif step == "take":
            taken = probe.take_due(at_ns)
            due = [due for due in model.values() if due <= at_ns]
            if due:
                assert model.pop(taken) == min(due)
            else:
                assert taken is None
        assert probe.next_due() == min(model.values(), default=0)
    while (taken := probe.take_due(1000)) is not None:
        assert model.pop(taken) <= min(model.values(), default=1000)
    assert not model
