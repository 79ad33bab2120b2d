"""What a model should keep to: a latency that a share of its answers must meet, and how far knobs may be moved for it.

Written as one line, the same in a model's parameters (``objective: "p99=50ms"``) and on the command line:
``p99=50ms, error_budget=0.02, instances=1..4, max_batch_size=16, max_delay=5ms, priority=1, cost=2``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from aiorch_server.config.problems import Problem, format_found, suggest

Value = TypeVar("Value")
#: The parameters of a model's configuration that say it, and how the knobs are moved.
OBJECTIVE, POLICY = "objective", "tuning"
#: ``auto`` moves knobs; ``off`` leaves all as written; the others are what ``auto`` is compared with.
POLICIES: Final = ("auto", "aimd", "linear", "off")

_UNITS: Final = {"us": 1.0, "ms": 1e3, "s": 1e6}
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(us|ms|s)")
_PERCENTILE: Final = re.compile(r"p([0-9]{1,2}(?:\.[0-9]+)?)")
_LARGEST_US: Final = 3600 * 1_000_000
_MOST: Final = 1024
_LONGEST: Final = 500
_LARGEST_PERCENTILE: Final = 99.999


@dataclass(frozen=True, slots=True)
class Objective:
    """A latency target and the bounds of each knob; 0 stands for what is not said.

    ``percentile`` of the answers take at most ``latency_us``, counted from when the request had come until its answer
    was written; ``error_budget`` is the share that may miss it, refusals included (0: what the percentile leaves).
    ``priority``: where the machine is short, models of a higher one are served first. ``cost`` is that of one
    instance, in units of the operator's choice.
    """

    latency_us: int = 0
    percentile: float = 99.0
    error_budget: float = 0.0
    min_instances: int = 1
    max_instances: int = 0
    max_batch_size: int = 0
    max_delay_us: int = 0
    priority: int = 0
    cost: float = 1.0

    @property
    def allowed_misses(self) -> float:
        """The share of requests that may be late or refused."""
        return self.error_budget or 1.0 - self.percentile / 100.0

    def __str__(self) -> str:
        """The line that ``parse_objective`` reads back."""
        plain = Objective()
        words = [f"p{self.percentile:g}={format_duration(self.latency_us)}"] if self.latency_us else []
        if self.error_budget:
            words.append(f"error_budget={self.error_budget:g}")
        if (self.min_instances, self.max_instances) != (plain.min_instances, plain.max_instances):
            words.append(f"instances={self.min_instances}..{self.max_instances or ''}")
        if self.max_batch_size:
            words.append(f"max_batch_size={self.max_batch_size}")
        if self.max_delay_us:
            words.append(f"max_delay={format_duration(self.max_delay_us)}")
        if self.priority:
            words.append(f"priority={self.priority}")
        if self.cost != plain.cost:
            words.append(f"cost={self.cost:g}")
        return ", ".join(words)


def format_duration(duration_us: float) -> str:
    """``50ms``; in the largest unit that leaves a whole number or the fewest digits."""
    for unit in ("s", "ms"):
        if duration_us >= _UNITS[unit]:
            return f"{duration_us / _UNITS[unit]:.12g}{unit}"
    return f"{duration_us:.12g}us"


def parse_duration_us(text: str) -> int:
    """``50ms``, ``1.5s`` or ``300us`` in microseconds, 1 us to an hour; ValueError says what would be right."""
    found = _DURATION.fullmatch(text.strip())
    duration_us = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not 1 <= duration_us <= _LARGEST_US:
        raise ValueError(f"found {format_found(text)}; a time such as 50ms, 1.5s or 300us is right, of at most an hour")
    return duration_us


def parse_objective(text: str) -> Objective:
    """The objective that a line says; ValueError names the first word that is wrong and what would be right."""
    if len(text) > _LONGEST:
        raise ValueError(f"found {len(text)} characters; an objective is one line of at most {_LONGEST}")
    objective, seen = Objective(), set[str]()
    for word in filter(None, re.split(r"[,\s]+", text.strip())):
        name, _, value = word.partition("=")
        is_target = _PERCENTILE.fullmatch(name)
        key = "latency" if is_target else name
        if key in seen:
            raise ValueError(f"found {format_found(name)} after another {key}; say it once")
        seen.add(key)
        if is_target:
            percentile = float(is_target[1])
            if not 1.0 <= percentile < 100.0:
                raise ValueError(f"found {format_found(name)}; a percentile from p1 to p99.999 is right")
            objective = replace(objective, percentile=percentile, latency_us=_read(word, value, parse_duration_us))
        elif name in _WORDS:
            objective = replace(objective, **_read(word, value, _WORDS[name]))
        else:
            raise ValueError(
                f"found {format_found(name)}{suggest(name, ['p99', *_WORDS])}; such as 'p99=50ms' is right"
            )
    if objective.max_instances and objective.max_instances < objective.min_instances:
        found = f"{objective.min_instances}..{objective.max_instances}"
        raise ValueError(f"instances: found {found}; the smaller first is right")
    return objective


def read_objective(parameters: Mapping[str, str]) -> Objective:
    """What the parameters of a checked configuration say; one without a target where they say nothing."""
    return parse_objective(parameters.get(OBJECTIVE, ""))


def read_fields(fields: Mapping[str, Any]) -> Objective:
    """The objective in the fields of tuning.proto, which were checked when they were set; 0 stands for not said."""
    plain = Objective()
    return Objective(
        latency_us=int(fields.get("latency_us", 0)),
        percentile=min(float(fields.get("percentile", 0)), _LARGEST_PERCENTILE) or plain.percentile,
        error_budget=float(fields.get("error_budget", 0)),
        min_instances=min(int(fields.get("min_instances", 0)), _MOST) or plain.min_instances,
        max_instances=min(int(fields.get("max_instances", 0)), _MOST),
        max_batch_size=int(fields.get("max_batch_size", 0)),
        priority=int(fields.get("priority", 0)),
        cost=float(fields.get("instance_cost", 0)) or plain.cost,
    )


def find_objective_problems(parameters: Mapping[str, str]) -> Iterator[Problem]:
    """Yields what is wrong with a model's objective and with its choice of a policy."""
    try:
        read_objective(parameters)
    except ValueError as error:
        yield Problem(("parameters", OBJECTIVE), str(error))
    policy = parameters.get(POLICY, POLICIES[0])
    if policy not in POLICIES:
        yield Problem(("parameters", POLICY), f"found {format_found(policy)}; one of {', '.join(POLICIES)} is right")


def _read(word: str, value: str, parse: Callable[[str], Value]) -> Value:
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{word.partition('=')[0]}: {error}") from None


def _parse_whole(text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"-?[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise ValueError(f"found {format_found(text)}; a whole number from {least} to {most} is right")
    return int(text)


def _parse_number(text: str, least: float, most: float) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not least < float(text) <= most:
        raise ValueError(f"found {format_found(text)}; a number above {least:g}, at most {most:g}, is right")
    return float(text)


def _parse_instances(text: str) -> dict[str, int]:
    least, dots, most = text.partition("..")
    first = _parse_whole(least, 1, _MOST)
    if not dots:
        return {"min_instances": first, "max_instances": first}
    return {"min_instances": first, "max_instances": _parse_whole(most, 1, _MOST) if most else 0}


_WORDS: Final[Mapping[str, Callable[[str], dict[str, int] | dict[str, float]]]] = {
    "error_budget": lambda text: {"error_budget": _parse_number(text, 0.0, 1.0)},
    "instances": _parse_instances,
    "max_batch_size": lambda text: {"max_batch_size": _parse_whole(text, 1, 2**31 - 1)},
    "max_delay": lambda text: {"max_delay_us": parse_duration_us(text)},
    "priority": lambda text: {"priority": _parse_whole(text, -1000, 1000)},
    "cost": lambda text: {"cost": _parse_number(text, 0.0, 1e9)},
}
