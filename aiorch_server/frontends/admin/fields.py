"""Single fields of admin messages: times, shares and names, with errors that say which field is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from aiorch_server.errors import RequestError

#: Shares are kept in hundredths of a percent.
WHOLE_SHARE: Final = 10_000
#: A rollout that takes longer than a year is a mistake.
_LONGEST_S: Final = 366 * 24 * 3600.0
_SHOWN: Final = 80
#: What one field may hold; nothing that the admin API takes has more.
MAX_ITEMS: Final = 1000


class InvalidField(RequestError):
    """A field of the request is wrong; ``field`` is its path, such as ``plan.steps[1].percent``."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


@contextmanager
def within(prefix: str) -> Iterator[None]:
    """Puts ``prefix`` before the field of an InvalidField that is raised inside."""
    try:
        yield
    except InvalidField as error:
        raise InvalidField(f"{prefix}.{error.field}", error.problem) from None


def show(text: str) -> str:
    """``text`` in quotes for an error, cut where it is long."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def encode_time(time: datetime | None, message: Any) -> None:
    """Writes ``time`` into the Timestamp ``message``, which stays absent for None."""
    if time is not None:
        message.FromDatetime(time)


def decode_time(message: Timestamp, field: str) -> datetime:
    """The time in UTC; InvalidField where it is none between the years 1 and 9999."""
    try:
        time: datetime = message.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidField(field, f"is not a time: {error}") from None
    return time


def read_time(message: Any, field: str) -> datetime | None:
    """The time in the field of that name, None where it is absent."""
    return decode_time(getattr(message, field), field) if message.HasField(field) else None


def encode_seconds(seconds: float, message: Any) -> None:
    """Writes ``seconds`` into the Duration ``message``, which stays absent for 0."""
    if seconds:
        message.FromNanoseconds(round(seconds * 1e9))


def read_seconds(message: Any, field: str) -> float:
    """The duration in that field in seconds, 0 where it is absent; InvalidField if below 0 or over a year."""
    if not message.HasField(field):
        return 0.0
    duration: Duration = getattr(message, field)
    seconds: float = (duration.seconds * 10**9 + duration.nanos) / 10**9
    if not -1e9 < duration.nanos < 1e9 or not 0 <= seconds <= _LONGEST_S:
        raise InvalidField(field, f"is {seconds:g} s; expected 0 to {_LONGEST_S:g} s")
    return seconds


def encode_share(share: int) -> float:
    """Hundredths of a percent as percent."""
    return share / 100


def decode_share(percent: float, field: str) -> int:
    """Percent as hundredths of a percent; InvalidField outside 0 to 100 or finer than 0.01."""
    check_range(percent, field, 0, 100)
    share = round(percent * 100)
    if abs(percent * 100 - share) > 1e-6:
        raise InvalidField(field, f"is {percent:g}; expected steps of 0.01")
    return share


def check_range(value: float, field: str, low: float, high: float = math.inf) -> float:
    """``value``; InvalidField where it is not a number from ``low`` to ``high``."""
    if not low <= value <= high or math.isinf(value):
        most = f" to {high:g}" if high < math.inf else " or more"
        raise InvalidField(field, f"is {value:g}; expected {low:g}{most}")
    return value


def check_paths(paths: Iterable[str], known: Iterable[str], field: str) -> tuple[str, ...]:
    """The paths of a field mask, each once; InvalidField where one is not among those that are known."""
    chosen, allowed = tuple(dict.fromkeys(paths)), tuple(known)
    unknown = [path for path in chosen if path not in allowed]
    if unknown:
        names = ", ".join(show(path) for path in unknown[:5])
        raise InvalidField(field, f"names {names}; expected some of {', '.join(allowed)}")
    return chosen


def check_texts(message: Any, prefix: str = "") -> None:
    """InvalidField where a text of the message, or of one inside it, has a NUL, which databases do not hold.

    Also for a list or map of more than MAX_ITEMS: the first look at a request, in a time that is bounded.
    """
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        if field.is_repeated and len(value) > MAX_ITEMS:
            raise InvalidField(path, f"has {len(value)} items; expected at most {MAX_ITEMS}")
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        is_map = field.type == field.TYPE_MESSAGE and field.message_type.GetOptions().map_entry
        if is_map:
            parts: list[Any] = [*value.keys(), *(each for each in value.values() if isinstance(each, str))]
        else:
            parts = list(value) if field.is_repeated else [value]
        for part in parts:
            if not isinstance(part, str):
                check_texts(part, f"{path}.")
            elif "\0" in part:
                raise InvalidField(path, "has a NUL character")


def choose_paths(request: Any, given: Any, known: Sequence[str]) -> tuple[str, ...]:
    """The fields of ``given`` that ``request.update_mask`` names; those that are set where it names none."""
    if request.update_mask.paths:
        return check_paths(request.update_mask.paths, known, "update_mask")
    return tuple(field.name for field, _ in given.ListFields() if field.name in known)
