"""What the headers of a request ask of the server: its timing, and the trace that it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from aiorch_server.tracing.run import Run

#: A request with this header is answered with its phases; the compiled desk looks for the same name.
TIMING_HEADER: Final = "aiorch-timing"
_OFF: Final = ("", "0", "false", "off")
#: https://www.w3.org/TR/trace-context/
_PARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]([0-9a-f])(-.*)?")
_MAX_STATE_CHARACTERS: Final = 512


@dataclass(slots=True)
class Incoming:
    """One request at its door; ``run`` is set when it was watched.

    ``protocol`` is grpc or http, ``method`` the path of what was called.
    """

    protocol: str
    method: str
    wants_timing: bool = False
    parent: str = ""
    state: str = ""
    run: Run | None = None

    @property
    def is_sampled(self) -> bool | None:
        """What the caller has decided about tracing; None where there is no caller who traces."""
        found = _PARENT.fullmatch(self.parent)
        return None if found is None else bool(int(found[2], 16) & 1)

    @property
    def trace_id(self) -> bytes | None:
        """Of the caller's trace, 16 bytes."""
        found = _PARENT.fullmatch(self.parent)
        return None if found is None else bytes.fromhex(found[1])

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        """The phases for gRPC, microseconds; empty where they were not asked for, or there are none."""
        if not self.wants_timing or self.run is None:
            return ()
        phases = ((f"aiorch-{phase.replace('_', '-')}-us", f"{us:.1f}") for phase, us in self.run.phases_us().items())
        return (*phases, *((f"aiorch-{name.replace('_', '-')}", value) for name, value in self._describe()))

    def server_timing(self) -> str:
        """The phases as HTTP's ``Server-Timing``, milliseconds; empty as ``trailing_metadata`` is."""
        if not self.wants_timing or self.run is None:
            return ""
        phases = (f"{phase};dur={us / 1e3:.4f}" for phase, us in self.run.phases_us().items())
        return ", ".join((*phases, *(f'{name};desc="{value}"' for name, value in self._describe())))

    def _describe(self) -> Iterator[tuple[str, str]]:
        assert self.run is not None
        if self.run.stamps.batch_rows:
            yield "batch_size", str(self.run.stamps.batch_rows)
        yield "model_version", str(self.run.version)


@contextmanager
def receive(headers: Iterable[tuple[str, str | bytes]], protocol: str, method: str) -> Iterator[Incoming]:
    """Makes what a door has received known to everything that its task does; names are in lower case."""
    incoming = Incoming(protocol, method)
    for name, value in headers:
        if not isinstance(value, str):
            continue
        if name == TIMING_HEADER:
            incoming.wants_timing = value.lower() not in _OFF
        elif name == "traceparent":
            incoming.parent = value if len(value) <= _MAX_STATE_CHARACTERS else ""
        elif name == "tracestate" and len(incoming.state) + len(value) < _MAX_STATE_CHARACTERS:
            incoming.state = f"{incoming.state},{value}" if incoming.state else value
    token = current_incoming.set(incoming)
    try:
        yield incoming
    finally:
        current_incoming.reset(token)


#: The request that the task which runs now is about.
current_incoming: ContextVar[Incoming | None] = ContextVar("current_incoming", default=None)
