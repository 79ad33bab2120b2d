"""Who runs beside whom, where tests run in two lanes (``tests/lanes.py``)."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def take_turn(*, alone: bool = False) -> Iterator[None]:
    """Runs beside what else takes turns; ``alone``: waits until nothing does, and lets nothing begin.

    Without lanes it does nothing: there is nobody else.
    """
    place = os.environ.get("TEST_TURNS")
    if place is None:
        yield
        return
    with Path(place, "turn").open("w") as turn, Path(place, "running").open("w") as running:
        # who waits for the others to end holds the turn: else those who begin meanwhile could come first for ever
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield
