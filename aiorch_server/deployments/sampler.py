"""Measures the versions of one model on this server, step by step of a rollout, from the core's own counters."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from aiorch_server.deployments.samples import LONGEST_DISAGREEMENT, MOST_DISAGREEMENTS, StepSamples, Window
from aiorch_server.lifecycle.servable import Servable
from aiorch_server.registry.names import fit_text


@dataclass(slots=True)
class _Meter:
    """``base`` is what its counters said when the step began, ``last`` what they said when they were last read;
    ``carried`` is of servables that served in this step before the present one, such as before it was scaled.
    """

    source: Callable[[], Servable | None]
    base: Window
    last: Window
    carried: Window = field(default_factory=Window)
    compared: int = 0
    agreed: int = 0
    #: What had come back, and when that changed last or nothing was under way, on the sampler's clock.
    progress: int = 0
    moved_s: float = 0.0


class Sampler:
    """For the event loop's thread. ``step`` "" measures nothing; ``clock`` gives seconds that only ever grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.step = ""
        self._clock = clock
        self._meters: dict[int, _Meter] = {}
        self._disagreements: list[str] = []

    def begin(self, step: str, servables: Mapping[int, Servable], *, whole: Collection[int] = ()) -> None:
        """From now on ``servables`` are measured for ``step``; nothing happens while it is the same.

        Those in ``whole`` get no requests in this step: of them, everything since they were loaded counts.
        """
        if step == self.step:
            return
        self.step, self._disagreements = step, []
        self._meters = {}
        for version, servable in servables.items() if step else ():
            now = _read(servable)
            self._meters[version] = self._make(servable, Window() if version in whole else now, now)

    def note(self, version: int, difference: str) -> None:
        """An answer of ``version`` was compared with the stable version's; ``difference`` "" if they agree."""
        meter = self._meters.get(version)
        if meter is None:
            return
        meter.compared += 1
        meter.agreed += not difference
        if difference and len(self._disagreements) < MOST_DISAGREEMENTS:
            self._disagreements.append(fit_text(difference, LONGEST_DISAGREEMENT))

    def read(self, servables: Mapping[int, Servable]) -> StepSamples:
        """What was measured in this step so far; ``servables`` are those that serve now."""
        windows = {}
        for version, servable in servables.items() if self.step else ():
            if version not in self._meters:  # it was not loaded when the step began
                self._meters[version] = self._make(servable, Window(), Window())
        for version, meter in self._meters.items():
            windows[version] = self._read_meter(meter, servables.get(version))
        return StepSamples(self.step, windows, tuple(self._disagreements))

    def _read_meter(self, meter: _Meter, servable: Servable | None) -> Window:
        if servable is not None and meter.source() is not servable:  # its counters begin at 0
            meter.carried += meter.last.since(meter.base)
            meter.source, meter.base, meter.last = weakref.ref(servable), Window(), Window()
            meter.progress, meter.moved_s = 0, self._clock()
        stuck_s = 0
        if servable is not None:
            meter.last = _read(servable)
            stuck_s = self._find_stuck(meter, servable)
        found = meter.carried + meter.last.since(meter.base)
        return replace(found, compared=meter.compared, agreed=meter.agreed, stuck_s=stuck_s)

    def _make(self, servable: Servable, base: Window, last: Window) -> _Meter:
        progress = _count_progress(servable, last)
        return _Meter(weakref.ref(servable), base, last, progress=progress, moved_s=self._clock())

    def _find_stuck(self, meter: _Meter, servable: Servable) -> int:
        """For how many seconds nothing has come back of what is under way."""
        progress, now_s = _count_progress(servable, meter.last), self._clock()
        if progress != meter.progress or not servable.scheduler.in_flight:
            meter.progress, meter.moved_s = progress, now_s
        return int(now_s - meter.moved_s)


def _read(servable: Servable) -> Window:
    failures = servable.scheduler.counters().failures
    errors = failures.get("BACKEND", 0)
    durations = servable.scheduler.durations()
    return Window(
        sum(durations.values()) + errors,
        errors,
        durations,
        lost=failures.get("CANCELED", 0) + failures.get("REJECTED", 0),
        slowest_s=max(durations, default=0) / 1e9,
    )


def _count_progress(servable: Servable, found: Window) -> int:
    """Answers and errors of the model, and each answer of a stream."""
    if not servable.signature.is_decoupled:
        return found.requests
    return found.requests + sum(each.success.count for each in servable.instances.responses.read().values())
