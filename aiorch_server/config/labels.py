"""Labels of versions, such as "stable" and "canary", in the parameters of a model's configuration.

Written as one parameter for each label, ``version_label.stable: "3"``; TensorFlow Serving's clients ask for versions by
them. A label may name a version that does not serve (yet): requests for it find nothing until it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from aiorch_server.config.problems import Problem, format_found

PREFIX: Final = "version_label."
_LARGEST_VERSION: Final = 10**18 - 1


def read_labels(parameters: Mapping[str, str]) -> dict[str, int]:
    """Versions by label, from ``parameters`` without problems."""
    return {name.removeprefix(PREFIX): int(text) for name, text in parameters.items() if name.startswith(PREFIX)}


def find_label_problems(parameters: Mapping[str, str]) -> Iterator[Problem]:
    """Yields a problem for each label that cannot be asked for, or names no version."""
    for name, text in parameters.items():
        if not name.startswith(PREFIX):
            continue
        label = name.removeprefix(PREFIX)
        if not label or "/" in label or ":" in label:
            found = f"found the label {format_found(label)}; it must not be empty nor hold '/' or ':'"
            yield Problem(("parameters", name), found)
        is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(_LARGEST_VERSION))
        if not is_number or int(text) == 0:
            yield Problem(("parameters", name), f"found {format_found(text)}; it must be a version, 1 or more")
