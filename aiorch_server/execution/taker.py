"""Whoever takes the answers of a decoupled model one by one, and how long it may let the model wait."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from aiorch_server.errors import StreamStalled

#: Longest wait for whoever takes answers inside of the server: it may need the very instance that waits for it.
_MAX_WAIT_INSIDE_S: Final = 300.0


class Taker:
    """One stream's; shared by all that wait for its room. ``left_s`` and ``lose`` may be called by any thread.

    ``patience_s`` is for its absence, math.inf for any length. ``on_lost`` is called once if it was away for too long.
    """

    def __init__(self, patience_s: float = math.inf, on_lost: Callable[[], None] = lambda: None) -> None:
        self.patience_s = patience_s
        self._on_lost = on_lost
        self._away_since_s: float | None = None
        self._is_lost = False

    @contextmanager
    def away(self) -> Iterator[None]:
        """While an answer is out of the server's hands, and nobody is there to take another."""
        self._away_since_s = time.monotonic()
        try:
            yield
        finally:
            self._away_since_s = None

    def left_s(self, since_s: float, inside_s: float | None = None) -> float:
        """How much longer to wait for room, after waiting since then (monotonic); 0 or less: no longer.

        ``inside_s`` is the longest wait while the taker is not away.
        """
        away_since_s = self._away_since_s
        if away_since_s is None:
            return since_s + (_MAX_WAIT_INSIDE_S if inside_s is None else inside_s) - time.monotonic()
        return max(since_s, away_since_s) + self.patience_s - time.monotonic()

    def lose(self) -> StreamStalled:
        """What ends the stream whose model has waited for too long."""
        if self._away_since_s is None:
            return StreamStalled(
                f"no answer of this stream was taken for {_MAX_WAIT_INSIDE_S:g} s by the models behind it, while its "
                "model waited to send more"
            )
        if not self._is_lost:
            self._is_lost = True
            self._on_lost()
        return StreamStalled(
            f"no answer of this stream was taken for {self.patience_s:g} s while its model waited to send more; take "
            "them sooner, or let the server wait longer (limits.stream_stall_secs)"
        )
