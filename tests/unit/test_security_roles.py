"""Patterns of model names."""

from __future__ import annotations

import random
import re
import time

import pytest

from aiorch_server.security.roles import matches


@pytest.mark.parametrize(
    ("pattern", "model", "expected"),
    [
        ("", "", True),
        ("a", "a", True),
        ("a", "ab", False),
        ("*", "", True),
        ("a*", "a", True),
        ("aba*aba", "aba", False),
        ("a*b", "a\nb", True),
        ("a.c", "abc", False),
        ("*ab*b", "ab", False),
        ("*ab*b", "abb", True),
    ],
)
def test_patterns(pattern: str, model: str, expected: bool) -> None:
    assert matches(pattern, model) is expected


def test_patterns_are_what_they_look_like() -> None:
    chosen = random.Random(5)
    for _ in range(5000):
        pattern = "".join(chosen.choices("ab*", k=chosen.randint(0, 7)))
        model = "".join(chosen.choices("ab\n", k=chosen.randint(0, 9)))
        expression = ".*".join(map(re.escape, pattern.split("*")))
        expected = re.fullmatch(expression, model, re.DOTALL) is not None
        assert matches(pattern, model) is expected, (pattern, model)


def test_no_name_takes_long() -> None:
    """Callers choose it, and it is compared before anybody knows that no model can have it."""
    begin = time.process_time()
    size = 1_000_000
    assert not matches("*a*b*c*d", "a" * size + "b" * size + "c" * size)
    assert not matches("*-a-*-b-*-c", "-a-" * size)
    assert time.process_time() - begin < 1
