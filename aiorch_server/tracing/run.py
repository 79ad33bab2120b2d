"""The models that one request ran through, as a tree: steps of ensembles and calls hang below who caused them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from aiorch_server.types import PhaseStamps

#: Models of one request that are remembered; what comes beyond runs unseen.
MAX_RUNS: Final = 256


class Run:
    """One model version on behalf of a watched request; belongs to the event loop's thread.

    ``stamps`` are filled where it had a queue of its own. ``span`` is whatever traces the request, on the root only.
    """

    __slots__ = (
        "_is_claimed",
        "children",
        "ended_ns",
        "error",
        "model",
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
        self._is_claimed = False

    @property
    def trace_id(self) -> bytes | None:
        """Of the trace that the request belongs to, 16 bytes; None where there is none."""
        return getattr(self.root.span, "trace_id", None)

    @contextmanager
    def enter(self, model: str, version: int) -> Iterator[Run]:
        """What that model does from here on: this run itself the first time, then a child for each."""
        if not self._is_claimed:
            self._is_claimed = True
            run = self
        else:
            run = Run(model, version, self.root)
            if self.root.size < MAX_RUNS:
                self.children.append(run)
                self.root.size += 1
        run._is_claimed = True
        run.model, run.version = model, version
        token = current_run.set(run)
        try:
            yield run
        except BaseException as error:
            run.error = error
            raise
        finally:
            current_run.reset(token)
            run.ended_ns = time.monotonic_ns()

    def phases_us(self) -> dict[str, float]:
        """How long each phase took in microseconds; of a model without a queue of its own, the sums of its steps."""
        phases = self.stamps.phases_us()
        if not phases:
            for child in self.children:
                for phase, took_us in child.phases_us().items():
                    phases[phase] = phases.get(phase, 0.0) + took_us
        if self.stamps.settled_ns == 0:
            phases["total"] = ((self.ended_ns or time.monotonic_ns()) - self.started_ns) / 1e3
        return phases


#: What the task that runs now works for; None for what nobody watches.
current_run: ContextVar[Run | None] = ContextVar("current_run", default=None)
