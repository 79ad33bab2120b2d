"""Problems found in configurations: collected, given a path each, and told all at once."""

from __future__ import annotations

import difflib
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

Location = tuple[int | str, ...]
Model = TypeVar("Model", bound=BaseModel)
_LONGEST_FOUND = 80
#: Settings whose values are not told, nor those below them.
_SECRETS = frozenset({"password", "url", "sha256", "restricted_protocols", "restricted_apis"})
HIDDEN = "something that is not shown"
#: What keys, tokens and passwords look like, also where they were written for something else: their known beginnings,
#: a URL with a password, digits within a word, and long words of many kinds of characters.
_SECRET_LIKE = re.compile(
    r"aio_[A-Za-z0-9]|eyJ[\w-]{6}|-----BEGIN|\b(?:sk|ghp|gho|glpat|xox[a-z])[-_]|\bAKIA[A-Z0-9]{8}|\bBearer\s|://[^/\s]*:[^/\s]*@"
    r"|[A-Za-z]\d+[A-Za-z]+\d|[A-Za-z]\d+[A-Za-z]{1,3}\d*[A-Za-z]*\d|[A-Fa-f0-9]{32}|[$!#%&^~+=|]"
)
_LONG_WORD = re.compile(r"[A-Za-z0-9+/=_-]{20,}")
_MOST_TOLD = 50
#: Finding the words for a problem takes time, and nobody reads more.
_MOST_COLLECTED = 2 * _MOST_TOLD
_MOST_SUGGESTED = 30
_MOST_LONGER = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, and a text that says what was found and what would be right."""

    location: Location
    text: str

    @property
    def path(self) -> str:
        """The location as a reader writes it: ``input[0].dims``."""
        return format_path(self.location)

    def __str__(self) -> str:
        return f"{self.path}: {self.text}" if self.location else self.text


class Inconsistent(ValueError):
    """Raised inside validators to report several problems of one section, each with a path of its own."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, self.problems)))


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raises Inconsistent when there is any problem."""
    found = tuple(problems)
    if found:
        raise Inconsistent(found)


def format_path(location: Location) -> str:
    """``("input", 0, "dims")`` as ``input[0].dims``."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += f".{step}" if path else step
    return path


def format_found(value: object) -> str:
    """A short rendering of a value that was found; none of what may be a secret that was written in a wrong place."""
    if isinstance(value, Mapping):
        return "a mapping"
    if looks_secret(value):
        return HIDDEN
    text = repr(value)
    return text if len(text) <= _LONGEST_FOUND else text[: _LONGEST_FOUND - 3] + "..."


def looks_secret(value: object) -> bool:
    """Whether a value, or any part of it, may be a key, a token or a password."""
    if isinstance(value, Mapping):
        return any(looks_secret(each) for pair in value.items() for each in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(looks_secret, value))
    if isinstance(value, bytes | bytearray | memoryview):
        return True
    if not isinstance(value, str):
        return False
    if _SECRET_LIKE.search(value):
        return True
    return any(any(map(str.isdigit, word)) and any(map(str.isalpha, word)) for word in _LONG_WORD.findall(value))


def is_secret(location: Iterable[int | str]) -> bool:
    """Whether what is written at this place must not be shown."""
    return not _SECRETS.isdisjoint(location)


def format_problems(problems: Iterable[Problem]) -> str:
    """All problems in one line, for error texts; very many are cut off."""
    texts = list(dict.fromkeys(map(str, problems)))
    told = "; ".join(texts[:_MOST_TOLD])
    return told if len(texts) <= _MOST_TOLD else f"{told}; and more"


def suggest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or, where nothing is near, the known names unless they are many.

    Near is what is written almost alike, or has all words of ``name``: for "port" grpc_port, http_port, metrics_port.
    """
    names = sorted(known)
    # Case and underscores are what people mix up most: maxBatchSize, max-batch-size.
    near = difflib.get_close_matches(_fold(name), [_fold(each) for each in names], n=1, cutoff=0.7)
    if near:
        return f"; did you mean '{next(each for each in names if _fold(each) == near[0])}'?"
    words = set(_split_words(name))
    longer = [each for each in names if words <= set(_split_words(each))]
    shortest = min((len(_split_words(each)) for each in longer), default=0)
    longer = [f"'{each}'" for each in longer if len(_split_words(each)) == shortest]
    if 0 < len(longer) <= _MOST_LONGER:
        return f"; did you mean {' or '.join(longer)}?"
    return f"; known here: {', '.join(names)}" if 0 < len(names) <= _MOST_SUGGESTED else ""


def collect_problems(error: ValidationError, model: type[BaseModel]) -> Iterator[Problem]:
    """Yields the problems in pydantic's ``error`` about a ``model``, in our words; of very many only the first."""
    for detail in itertools.islice(error.errors(include_url=False), _MOST_COLLECTED):
        location: Location = detail["loc"]
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, Inconsistent):
            for problem in cause.problems:
                yield Problem((*location, *problem.location), problem.text)
        elif detail["type"] == "extra_forbidden":
            yield Problem(location, "unknown key" + suggest(str(location[-1]), _known_keys(model, location[:-1])))
        elif detail["type"] == "missing":
            yield Problem(location, "is missing and must be written")
        else:
            text = str(cause) if cause is not None else detail["msg"].removeprefix("Input ")
            # what stands where a section with a secret should be may hold it
            is_hidden = is_secret(location) or is_secret(_known_keys(model, location))
            found = "something else" if is_hidden else format_found(detail["input"])
            yield Problem(location, f"found {found}; {text}")


def validate_whole(model: type[Model], values: Mapping[str, Any]) -> tuple[Model | None, list[Problem]]:
    """The validated ``model``, or None with all problems.

    Rules between sections only run on sections that are right by themselves, so what is left when the wrong ones are
    taken out is checked once more: the owner sees all problems at once, not one layer after the other. Validators
    find the names of those taken out in ``context["unknown"]``.
    """
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        problems = list(collect_problems(error, model))
    wrong = {problem.location[0] for problem in problems if problem.location}
    try:
        rest = {key: value for key, value in values.items() if key not in wrong}
        model.model_validate(rest, context={"unknown": wrong})
    except ValidationError as error:
        known = set(problems)
        problems += [problem for problem in collect_problems(error, model) if problem not in known]
    return None, problems


def _fold(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _split_words(name: str) -> list[str]:
    return name.lower().replace("-", "_").replace(".", "_").split("_")


def _known_keys(model: type[BaseModel], location: Location) -> tuple[str, ...]:
    section: type[BaseModel] | None = model
    for step in location:
        if section is None:
            return ()
        if isinstance(step, str) and step in section.model_fields:
            section = _section_in(section.model_fields[step].annotation)
    return tuple(section.model_fields) if section is not None else ()


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's annotation holds: itself, an optional one, or the element of a list or map."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _section_in(each)) is not None), None)
