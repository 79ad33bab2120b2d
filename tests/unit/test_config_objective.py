"""Objectives as one line of text: what is read, what is written back, and what is refused with which words."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiorch_server.config.model import ModelConfig
from aiorch_server.config.objective import (
    Objective,
    format_duration,
    parse_duration_us,
    parse_objective,
    read_fields,
    read_objective,
)
from aiorch_server.errors import ModelLoadError

WHOLE = "p99.9=50ms, error_budget=0.02, instances=2..4, max_batch_size=16, max_delay=5ms, priority=-1, cost=2.5"


def test_every_word() -> None:
    found = parse_objective(WHOLE)
    assert found == Objective(50_000, 99.9, 0.02, 2, 4, 16, 5_000, -1, 2.5)
    assert str(found) == WHOLE
    assert parse_objective(WHOLE.replace(",", " ")) == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Objective()),
        ("p99=50ms", Objective(50_000)),
        ("p50=1.5s", Objective(1_500_000, 50.0)),
        ("instances=3", Objective(min_instances=3, max_instances=3)),
        ("instances=2..", Objective(min_instances=2)),
    ],
)
def test_short_lines(text: str, expected: Objective) -> None:
    assert parse_objective(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("p99", "p99: found ''; a time such as 50ms"),
        ("p99=50", "p99: found '50'; a time such as 50ms"),
        ("p99=0ms", "p99: found '0ms'; a time"),
        ("p99=2000000s", "of at most an hour"),
        ("p0=5ms", "a percentile from p1 to p99.999"),
        ("p100=5ms", "found 'p100'"),
        ("p99=5ms p50=1ms", "found 'p50' after another latency"),
        ("latency=5ms", "found 'latency'"),
        ("max_batch=5", "did you mean 'max_batch_size'?"),
        ("instances=0", "instances: found '0'; a whole number from 1 to 1024"),
        ("instances=4..2", "instances: found 4..2; the smaller first"),
        ("instances=a..2", "instances: found 'a'"),
        ("error_budget=0", "error_budget: found '0'; a number above 0, at most 1"),
        ("error_budget=nan", "error_budget: found 'nan'"),
        ("cost=1e400", "cost: found '1e400'"),
        ("priority=1.5", "priority: found '1.5'"),
        ("p99=\uff15ms", "p99: found"),
        ("=", "found ''"),
        ("p99=5ms " * 100, "one line of at most 500"),
    ],
)
def test_what_cannot_be(text: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_objective(text)
    assert words in str(caught.value)


def test_a_model_says_it() -> None:
    config = ModelConfig.from_dict({"name": "m", "parameters": {"objective": {"string_value": "p95=20ms"}}})
    assert read_objective(config.to_strings()) == Objective(20_000, 95.0)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"objective": "p99=soon"}, "parameters.objective: p99: found 'soon'"),
        ({"tuning": "fast"}, "parameters.tuning: found 'fast'; one of auto, aimd, linear, off is right"),
    ],
)
def test_a_model_that_says_it_wrongly(parameters: dict[str, str], words: str) -> None:
    given = {name: {"string_value": text} for name, text in parameters.items()}
    with pytest.raises(ModelLoadError) as caught:
        ModelConfig.from_dict({"name": "m", "parameters": given})
    assert words in str(caught.value)


def test_misses_that_are_allowed() -> None:
    assert Objective(1, 99.0).allowed_misses == pytest.approx(0.01)
    assert Objective(1, 99.0, 0.05).allowed_misses == 0.05


OBJECTIVES = st.builds(
    Objective,
    latency_us=st.integers(1, 3_600_000_000),
    percentile=st.sampled_from([50.0, 90.0, 99.0, 99.9]),
    error_budget=st.sampled_from([0.0, 0.001, 0.5, 1.0]),
    max_instances=st.sampled_from([0, 8, 1024]),
    min_instances=st.integers(1, 8),
    max_batch_size=st.integers(0, 4096),
    max_delay_us=st.integers(0, 10_000_000),
    priority=st.integers(-1000, 1000),
    cost=st.sampled_from([1.0, 0.25, 3.0]),
)


@given(OBJECTIVES)
def test_what_is_written_is_read_back(objective: Objective) -> None:
    assert parse_objective(str(objective)) == objective


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        objective = parse_objective(text)
    except ValueError as error:
        assert str(error)
    else:
        assert parse_objective(str(objective)) == objective or not objective.latency_us


@given(st.integers(1, 3_600_000_000))
def test_durations(duration_us: int) -> None:
    assert parse_duration_us(format_duration(duration_us)) == duration_us


def test_the_default_is_no_target() -> None:
    assert not str(Objective())
    assert str(replace(Objective(), cost=2.0)) == "cost=2"


def test_fields_of_an_operator() -> None:
    found = read_fields({"latency_us": 20_000, "percentile": 0.0, "max_instances": 3, "instance_cost": 2.0})
    assert found == Objective(20_000, 99.0, max_instances=3, cost=2.0)
    assert read_fields({}) == Objective()
