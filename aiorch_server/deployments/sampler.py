"""Measures the versions of one model on this server, step by step of a rollout, from the core's own counters."""

from __future__ import annotations

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


class Sampler:
    """For the event loop's thread. ``step`` "" measures nothing."""

    def __init__(self) -> None:
        self.step = ""
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
            self._meters[version] = _Meter(weakref.ref(servable), Window() if version in whole else now, now)

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
                self._meters[version] = _Meter(weakref.ref(servable), Window(), Window())
        for version, meter in self._meters.items():
            windows[version] = self._read_meter(meter, servables.get(version))
        return StepSamples(self.step, windows, tuple(self._disagreements))

    def _read_meter(self, meter: _Meter, servable: Servable | None) -> Window:
        if servable is not None and meter.source() is not servable:  # its counters begin at 0
            meter.carried += meter.last.since(meter.base)
            meter.source, meter.base, meter.last = weakref.ref(servable), Window(), Window()
        if servable is not None:
            meter.last = _read(servable)
        found = meter.carried + meter.last.since(meter.base)
        return replace(found, compared=meter.compared, agreed=meter.agreed)


def _read(servable: Servable) -> Window:
    errors = servable.scheduler.counters().failures.get("BACKEND", 0)
    durations = servable.scheduler.durations()
    return Window(sum(durations.values()) + errors, errors, durations)
