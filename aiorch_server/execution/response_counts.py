"""What decoupled models have answered: counts by an answer's place in its stream, and the time to the first one."""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import Final

from aiorch_server.types import Duration, PhaseHistogram, ResponseStatistics

#: Places in a stream that are counted on their own; later answers are counted with the last of them.
MAX_PLACES: Final = 256
#: Upper bounds of Triton's nv_inference_first_response_histogram_ms.
FIRST_RESPONSE_BOUNDS_MS: Final = (100, 500, 2000, 5000)


class _Sum:
    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count = self.ns = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def read(self) -> Duration:
        return Duration(self.count, self.ns)


class _Place:
    __slots__ = ("cancel", "compute_infer", "compute_output", "empty_response", "fail", "success")

    def __init__(self) -> None:
        self.compute_infer, self.compute_output, self.success = _Sum(), _Sum(), _Sum()
        self.fail, self.empty_response, self.cancel = _Sum(), _Sum(), _Sum()

    def read(self) -> ResponseStatistics:
        return ResponseStatistics(**{name: getattr(self, name).read() for name in self.__slots__})


class ResponseCounts:
    """Of one model version; thread-safe. An answer's time begins where the one before it was sent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: list[_Place] = []
        self._first = [0] * (len(FIRST_RESPONSE_BOUNDS_MS) + 1)
        self._first_ns = 0
        self._stalled = 0

    @property
    def stalled(self) -> int:
        """Streams that were ended because nobody took their answers."""
        return self._stalled

    def add_success(self, index: int, infer_ns: int, output_ns: int) -> None:
        """An answer was sent."""
        with self._lock:
            place = self._place(index)
            place.compute_infer.add(infer_ns)
            place.compute_output.add(output_ns)
            place.success.add(infer_ns + output_ns)

    def add_failure(self, index: int, ns: int) -> None:
        """An error was sent instead."""
        with self._lock:
            self._place(index).fail.add(ns)

    def add_empty(self, index: int, ns: int) -> None:
        """The stream ended without a last answer."""
        with self._lock:
            self._place(index).empty_response.add(ns)

    def add_cancelled(self, index: int, ns: int) -> None:
        """An answer was dropped because nobody waited for it."""
        with self._lock:
            self._place(index).cancel.add(ns)

    def add_stalled(self) -> None:
        """A stream was ended because nobody took its answers."""
        with self._lock:
            self._stalled += 1

    def add_first(self, ns: int) -> None:
        """The first answer of a request came so long after the request."""
        with self._lock:
            self._first[bisect_left(FIRST_RESPONSE_BOUNDS_MS, ns / 1e6)] += 1
            self._first_ns += ns

    def read(self) -> dict[str, ResponseStatistics]:
        """By place in the stream, counted from "0"."""
        with self._lock:
            return {str(index): place.read() for index, place in enumerate(self._places)}

    def read_first(self) -> PhaseHistogram:
        """Time to the first answer."""
        with self._lock:
            bounds = tuple(bound / 1e3 for bound in FIRST_RESPONSE_BOUNDS_MS)
            return PhaseHistogram(bounds, tuple(self._first), self._first_ns / 1e9)

    def _place(self, index: int) -> _Place:
        index = min(index, MAX_PLACES - 1)
        while len(self._places) <= index:
            self._places.append(_Place())
        return self._places[index]
