"""Compares answers: runs a sampled request on the other version too, and tells the sampler whether they agree."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from aiorch_server.deployments.compare import compare
from aiorch_server.errors import AiorchError, CapacityError, NotFoundError, RequestCancelled
from aiorch_server.registry.records import Gates
from aiorch_server.routing import Replay, Sample

#: A copy that takes longer than this is given up, and not compared.
PATIENCE_S: Final = 10.0
#: Says nothing about a version: it had no room, was on its way out, or the caller went away.
_NEUTRAL: Final = (CapacityError, NotFoundError, RequestCancelled)


class Comparer:
    """An observer of samples of one model: ``note`` gets "" for answers that agree, else what differs.

    Whichever of the two versions answered, the other one gets a copy, whose answer goes to nobody. One that answers
    what the other refuses does not agree with it. What both refuse is left out, as is what is refused for want of room,
    or because a version is on its way out.
    """

    def __init__(self, stable: int, candidate: int, gates: Gates, note: Callable[[str], None]) -> None:
        self._stable = stable
        self._candidate = candidate
        self._gates = gates
        self._note = note

    async def observe(self, sample: Sample, replay: Replay) -> None:
        """See routing.Observer."""
        version = sample.servable.version
        if version not in (self._stable, self._candidate):
            return
        is_stable = version == self._stable
        if isinstance(sample.error, _NEUTRAL):
            return
        other = self._candidate if is_stable else self._stable
        which = f"request '{sample.request.id}'" if sample.request.id else "a request"
        deadline_ns = time.monotonic_ns() + int(PATIENCE_S * 1e9)
        try:
            copied = await replay(sample.request, other, deadline_ns=deadline_ns)
        except _NEUTRAL:
            return
        except AiorchError as error:
            if sample.answer is not None:
                self._note(f"{which}: version {other} failed: {error}")
            return
        if sample.answer is None:
            self._note(f"{which}: version {version} failed: {sample.error}")
            return
        before, after = (sample.answer, copied) if is_stable else (copied, sample.answer)
        gates = self._gates
        difference = compare(before, after, atol=gates.agreement_atol, rtol=gates.agreement_rtol)
        self._note(f"{which}: {difference}" if difference else "")
