"""What names and texts of the registry may be; RequestError says what is wrong and what would be right."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from aiorch_server.errors import NotFoundError, RequestError

LARGEST_NUMBER: Final = 2**63 - 1
LONGEST_TEXT: Final = 64 * 1024
_MAX_LABELS = 64
_MODEL = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254}", re.ASCII)
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,62}", re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_./-]{0,61}[A-Za-z0-9])?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_LONGEST_SHOWN = 80


def check_model_name(name: str) -> str:
    """Gives a model's name back if it may be one."""
    if not is_model_name(name):
        text = "should be 1 to 255 of the characters A-Z a-z 0-9 _ . -, the first of which is no dot"
        raise RequestError(f"found {show(name)} as a model's name; it {text}")
    return name


def is_model_name(name: str) -> bool:
    """Whether a model may have that name; there is no other in the tables."""
    return _MODEL.fullmatch(name) is not None


def check_alias(alias: str) -> str:
    """Gives an alias back if it may be one."""
    if not _ALIAS.fullmatch(alias):
        text = "should be at most 63 of the characters a-z 0-9 _ -, the first of which is a letter"
        raise RequestError(f"found {show(alias)} as an alias; it {text}")
    return alias


def check_number(number: int, what: str) -> int:
    """Gives a version or the like back if it is one."""
    if not 0 < number <= LARGEST_NUMBER:
        raise RequestError(f"found {number} as {what}; it should be 1 to {LARGEST_NUMBER}")
    return number


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """A copy of the labels if they are such."""
    if len(labels) > _MAX_LABELS:
        raise RequestError(f"found {len(labels)} labels; at most {_MAX_LABELS} are kept")
    for key, value in labels.items():
        if not _LABEL.fullmatch(key):
            text = "should be at most 63 of the characters A-Z a-z 0-9 _ . / -, with a letter or digit at both ends"
            raise RequestError(f"found {show(key)} as a label; it {text}")
        check_text(value, f"label {key}", 1024)
    return dict(labels)


def check_text(text: str, what: str, longest: int = LONGEST_TEXT) -> str:
    """Gives text of people back if databases can hold it."""
    if len(text) > longest:
        raise RequestError(f"{what} has {len(text)} characters; at most {longest} are kept")
    if "\0" in text or not _is_encodable(text):
        raise RequestError(f"{what} holds characters that cannot be kept: NUL or half of a surrogate pair")
    return text


def fit_text(text: str, longest: int = LONGEST_TEXT) -> str:
    """What somebody else wrote, such that databases can hold it, whatever it is: odd characters written out, cut."""
    fitting = text[: longest + 1].encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return fitting if len(fitting) <= longest else f"{fitting[: max(0, longest - 3)]}..."


def check_short(text: str, what: str, longest: int = 255, *, may_be_empty: bool = False) -> str:
    """Gives a name of people, servers and the like back: printable, without a space at either end."""
    if not may_be_empty and not text:
        raise RequestError(f"{what} must not be empty")
    if len(text) > longest or text != text.strip() or not text.isprintable() or not _is_encodable(text):
        raise RequestError(
            f"found {show(text)} as {what}; it should be at most {longest} printable characters, without a space at "
            "either end"
        )
    return text


def check_sha256(text: str, what: str) -> str:
    """Gives a digest back if it is one."""
    if not _SHA256.fullmatch(text):
        raise RequestError(f"found {show(text)} as {what}; it should be a SHA-256: 64 hexadecimal digits in lower case")
    return text


def show(text: str) -> str:
    """What somebody wrote, short and harmless."""
    return repr(text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "...")


def not_registered(model: str) -> NotFoundError:
    """The error for a model that the registry does not have, or that the caller may not see."""
    return NotFoundError(f"model {show(model)} is not registered")


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
