"""What shall be traced: settings for all models and for single ones, as the trace extension reads and changes them.

Texts and defaults are Triton's (server/docs/protocol/extension_trace.md, server/src/tracer.cc).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from aiorch_server.errors import RequestError, UnsupportedRequest

_UINT32: Final = (0, 2**32 - 1)
#: -1 stands for any number of traces.
_COUNTS: Final = (-1, 2**31 - 1)


class TraceLevel(enum.Enum):
    """What a trace holds."""

    OFF = "OFF"
    TIMESTAMPS = "TIMESTAMPS"
    TENSORS = "TENSORS"


@dataclass(frozen=True, slots=True)
class TraceSetting:
    """How one model is traced.

    One request in ``rate`` is, until ``count`` traces have been made (-1: without end). ``levels`` empty means none.
    ``file`` and ``log_frequency`` (traces per numbered file, 0: all in one) are for ``mode`` "triton", which writes
    files; "opentelemetry" sends spans.
    """

    levels: frozenset[TraceLevel] = frozenset()
    rate: int = 1000
    count: int = -1
    log_frequency: int = 0
    file: str = ""
    mode: str = "triton"

    def to_strings(self) -> dict[str, list[str]]:
        """The setting with Triton's keys, each value as a list of words."""
        strings = {
            "trace_level": [level.value for level in TraceLevel if level in self.levels] or [TraceLevel.OFF.value],
            "trace_rate": [str(self.rate)],
            "trace_count": [str(self.count)],
            "trace_mode": [self.mode],
        }
        if self.mode == "triton":
            strings |= {"log_frequency": [str(self.log_frequency)], "trace_file": [self.file]}
        return strings


class TraceSettings:
    """The settings in force; belongs to the event loop's thread.

    A model takes from all models' setting what was not set for it, and that from ``default``. ``levels`` are those that
    this server can give; others are refused.
    """

    def __init__(
        self, default: TraceSetting | None = None, *, levels: frozenset[TraceLevel] = frozenset({TraceLevel.OFF})
    ) -> None:
        self._default = default or TraceSetting()
        self._levels = levels
        self._changes: dict[str, dict[str, Any]] = {}
        self._made: dict[str, int] = {}  # traces by whose count they go against: a model's, or "" for all
        self._on_change: Callable[[], None] = lambda: None

    @property
    def can_trace(self) -> bool:
        """Whether there is a level besides OFF."""
        return self._levels != {TraceLevel.OFF}

    def get(self, model: str = "") -> TraceSetting:
        """The setting of a model, or that of all models for an empty name."""
        general = self._changes.get("", {})
        return replace(self._default, **(general | self._changes.get(model, {})))

    def observe(self, on_change: Callable[[], None]) -> None:
        """``on_change`` is called after each change, and when a count is used up."""
        self._on_change = on_change

    def is_on(self, model: str) -> bool:
        """Whether requests to that model may be traced now."""
        setting = self.get(model)
        return bool(setting.levels) and not 0 <= setting.count <= self._made.get(self._find_counted(model), 0)

    def take(self, model: str) -> bool:
        """Counts a trace of that model; False where there shall be none any more."""
        if not self.is_on(model):
            return False
        counted = self._find_counted(model)
        self._made[counted] = self._made.get(counted, 0) + 1
        if not self.is_on(model):
            self._on_change()
        return True

    def _find_counted(self, model: str) -> str:
        return model if "count" in self._changes.get(model, {}) else ""

    def update(self, changes: Mapping[str, Sequence[str]], model: str = "") -> TraceSetting:
        """Sets what is named, takes back what comes without words, and gives what is then in force.

        RequestError or UnsupportedRequest, and nothing is changed.
        """
        changed = dict(self._changes.get(model, {}))
        for key, words in changes.items():
            if key in ("trace_file", "trace_mode"):
                what = "file location" if key == "trace_file" else "mode"
                raise UnsupportedRequest(f"trace {what} can not be updated through network protocol")
            if key not in _READERS:
                raise RequestError(f"unknown trace setting '{key[:100]}', expected one of {', '.join(_READERS)}")
            field, read = _READERS[key]
            if words:
                changed[field] = read(key, words)
            else:
                changed.pop(field, None)
        missing = changed.get("levels", frozenset()) - self._levels
        if missing:
            names = ", ".join(sorted(level.value for level in missing))
            known = " and ".join(level.value for level in TraceLevel if level in self._levels)
            hint = "" if self.can_trace else "; start it with --trace-endpoint"
            raise UnsupportedRequest(f"trace level {names} is not supported by this server, only {known}{hint}")
        if self._default.mode == "opentelemetry" and changed.get("log_frequency"):
            raise UnsupportedRequest("log_frequency is for trace files, this server sends spans (mode opentelemetry)")
        if "trace_count" in changes:
            self._made.pop(model, None)
        self._changes[model] = changed
        if not changed:
            del self._changes[model]
        self._on_change()
        return self.get(model)


def _read_levels(key: str, words: Sequence[str]) -> frozenset[TraceLevel]:
    known = {level.value: level for level in TraceLevel}
    for word in words:
        if word not in known:
            raise RequestError(f"unknown trace level '{word[:100]}', expected OFF, TIMESTAMPS or TENSORS")
    if "OFF" in words and len(words) > 1:
        raise RequestError("Expect only one trace level 'OFF' is specified")
    return frozenset(known[word] for word in words) - {TraceLevel.OFF}


def _number_within(lowest: int, highest: int) -> Callable[[str, Sequence[str]], int]:
    def read(key: str, words: Sequence[str]) -> int:
        if len(words) != 1:
            raise RequestError(f"expect only 1 value for '{key}'")
        word = words[0]
        digits = word.removeprefix("-")
        if not (digits.isascii() and digits.isdigit()) or len(word) > 100:
            raise RequestError(f"Unable to parse '{key}', got: {word[:100]}")
        number = int(word)
        if number < lowest == _COUNTS[0]:
            raise RequestError(f"Unable to parse '{key}'. Expecting value >= {lowest}, got:{word}")
        if not lowest <= number <= highest:
            raise RequestError(f"Unable to parse '{key}', value is out of range [ {lowest}, {highest} ], got: {word}")
        return number

    return read


_READERS: Final[Mapping[str, tuple[str, Callable[[str, Sequence[str]], Any]]]] = {
    "trace_level": ("levels", _read_levels),
    "trace_rate": ("rate", _number_within(*_UINT32)),
    "trace_count": ("count", _number_within(*_COUNTS)),
    "log_frequency": ("log_frequency", _number_within(*_UINT32)),
}
