"""The models that one request ran through, as a tree: steps of ensembles and calls hang below who caused them."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from aiorch_server.types import PhaseStamps

#: Models of one request that are remembered, and answers of one model; what comes beyond runs unseen.
MAX_RUNS: Final = 256
MAX_RESPONSES: Final = 100


class CacheHit(NamedTuple):
    """An answer that no model was asked for; ``is_shared``: it was waited for while an equal request ran."""

    started_ns: int
    ended_ns: int
    is_shared: bool


class Response(NamedTuple):
    """One of the answers of a decoupled model, when it came to the event loop."""

    at_ns: int
    is_error: bool


class Run:
    """One model version on behalf of a watched request; belongs to the event loop's thread.

    ``stamps`` are filled where it had a queue, ``is_queued`` says that this queue tells itself what was slow. ``span``
    is whatever traces the request, on the root only. ``responses`` holds the first of ``n_responses``.
    """

    __slots__ = (
        "_is_claimed",
        "cached",
        "children",
        "ended_ns",
        "error",
        "is_queued",
        "model",
        "n_responses",
        "responses",
        "root",
        "size",
        "span",
        "stamps",
        "started_ns",
        "version",
    )

    def __init__(self, model: str = "", version: int = 0, root: Run | None = None) -> None:
        self.model = model
        self.version = version
        self.root = root or self
        self.stamps = PhaseStamps()
        self.children: list[Run] = []
        self.started_ns = time.monotonic_ns()
        self.ended_ns = 0
        self.error: BaseException | None = None
        self.span: Any = None
        self.size = 1  # of the whole tree; on the root
        self.is_queued = False
        self.cached: CacheHit | None = None
        self.responses: list[Response] = []
        self.n_responses = 0
        self._is_claimed = False

    @property
    def trace(self) -> bytes | None:
        """Ids of the trace and of the request's span in it, 16 and 8 bytes; None where it is not traced here."""
        span = self.root.span
        return None if span is None else span.trace_id + span.span_id

    def begin(self, model: str, version: int) -> Run:
        """What that model does for it: this run itself the first time, then a child for each."""
        if not self._is_claimed:
            run = self
        else:
            run = Run(model, version, self.root)
            if self.root.size < MAX_RUNS:
                self.children.append(run)
                self.root.size += 1
        run._is_claimed = True
        run.model, run.version = model, version
        return run

    def note_response(self, *, is_error: bool) -> None:
        """One more answer of a decoupled model is there."""
        self.n_responses += 1
        if len(self.responses) < MAX_RESPONSES:
            self.responses.append(Response(time.monotonic_ns(), is_error))

    def phases_us(self) -> dict[str, float]:
        """How long each phase took in microseconds; of a model without a queue of its own, the sums of its steps."""
        phases = self.stamps.phases_us()
        if self.cached is not None:
            phases = {"cache_hit": (self.cached.ended_ns - self.cached.started_ns) / 1e3}
        elif not phases:
            for child in self.children:
                for phase, took_us in child.phases_us().items():
                    phases[phase] = phases.get(phase, 0.0) + took_us
        if "total" not in phases or self.stamps.settled_ns == 0:
            phases["total"] = ((self.ended_ns or time.monotonic_ns()) - self.started_ns) / 1e3
        return phases


#: What the task that runs now works for; None for what nobody watches.
current_run: ContextVar[Run | None] = ContextVar("current_run", default=None)
