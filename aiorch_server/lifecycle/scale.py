"""What loading a model version took of this process's memory, measured where nothing else was loaded meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from aiorch_server.lifecycle.memory import read_resident_bytes

#: Measurements that are remembered; more than any server has models.
_MAX_KNOWN: Final = 10_000


@dataclass(slots=True)
class Weighing:
    """One load: ``taken_bytes`` is known at its end, None if other loads were under way at any time."""

    began_bytes: int
    is_alone: bool
    taken_bytes: int | None = None


class Scale:
    """For the event loop's thread.

    The first load of a framework brings its libraries along, which stay: it is measured, but nothing follows from it.
    """

    def __init__(self) -> None:
        self._under_way: list[Weighing] = []
        self._known: dict[tuple[str, int], tuple[str, int]] = {}
        self._frameworks: set[str] = set()

    @contextlib.contextmanager
    def weighing(self) -> Iterator[Weighing]:
        """Around one load."""
        weighing = Weighing(read_resident_bytes(), is_alone=not self._under_way)
        for each in self._under_way:
            each.is_alone = False
        self._under_way.append(weighing)
        try:
            yield weighing
        finally:
            self._under_way.remove(weighing)
            if weighing.is_alone and weighing.began_bytes:
                weighing.taken_bytes = max(0, read_resident_bytes() - weighing.began_bytes)

    def judge(self, weighing: Weighing, framework: str) -> int | None:
        """What the model itself took, where that can be told."""
        is_first = framework not in self._frameworks
        self._frameworks.add(framework)
        return None if is_first else weighing.taken_bytes

    def remember(self, model: str, version: int, fingerprint: str, size: int) -> None:
        """The last measurement counts."""
        self._known.pop((model, version), None)
        self._known[model, version] = (fingerprint, size)
        if len(self._known) > _MAX_KNOWN:
            del self._known[next(iter(self._known))]

    def recall(self, model: str, version: int, fingerprint: str) -> int | None:
        """What those files took the last time."""
        known = self._known.get((model, version))
        return known[1] if known is not None and known[0] == fingerprint else None
