"""What the headers of a request ask of the server: its timing, and the trace that it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Final

from aiorch_server.tracing.run import Run, current_run

#: A request with this header is answered with its phases; the compiled desk looks for the same name.
TIMING_HEADER: Final = "aiorch-timing"
#: By this a request goes where its key goes, where shares are sticky; the compiled desk looks for the same name.
ROUTE_KEY: Final = "aiorch-route-key"
_OFF: Final = ("", "0", "false", "off")
#: https://www.w3.org/TR/trace-context/; only versions that nobody knows yet may go on behind the flags.
_PARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_PARENT_CHARACTERS: Final = 55
_MAX_STATE_CHARACTERS: Final = 512


@dataclass(slots=True)
class Incoming:
    """One request at its door; ``run`` is set when it was watched.

    ``protocol`` is grpc or http, ``method`` the path of what was called, ``parent`` the caller's ``traceparent``, empty
    where there is none or it is malformed. ``choice`` is the version that was chosen for it already, and whether it is
    in the sample; whoever runs it takes that away.
    """

    protocol: str
    method: str
    wants_timing: bool = False
    parent: str = ""
    state: str = ""
    run: Run | None = None
    route_key: bytes = b""
    choice: tuple[int, bool] | None = None

    @property
    def is_sampled(self) -> bool | None:
        """What the caller has decided about tracing; None where there is no caller who traces."""
        return bool(int(self.parent[54], 16) & 1) if self.parent else None

    @property
    def trace(self) -> bytes | None:
        """Ids of the caller's trace and span, 16 and 8 bytes."""
        return bytes.fromhex(self.parent[3:35] + self.parent[36:52]) if self.parent else None

    def separate(self) -> Incoming:
        """One of its own for the task that runs now: of many requests that came with the same headers."""
        own = replace(self, run=None, choice=None)
        current_incoming.set(own)
        return own

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
            incoming.parent = value if _is_parent(value) else ""
        elif name == ROUTE_KEY:
            incoming.route_key = value.encode("latin-1", "replace")
        elif name == "tracestate" and len(incoming.state) + len(value) < _MAX_STATE_CHARACTERS:
            incoming.state = f"{incoming.state},{value}" if incoming.state else value
    token = current_incoming.set(incoming)
    try:
        yield incoming
    finally:
        current_incoming.reset(token)


def find_trace() -> bytes | None:
    """Ids of the trace and the span that the task which runs now is about, 16 and 8 bytes.

    The span is the server's where the request is traced here, else its caller's.
    """
    run, incoming = current_run.get(), current_incoming.get()
    return (None if run is None else run.trace) or (None if incoming is None else incoming.trace) or _given_trace.get()


@contextmanager
def speak_of(trace: bytes | None) -> Iterator[None]:
    """What is logged meanwhile is about that trace and span; for threads that have no request of their own."""
    token = _given_trace.set(trace)
    try:
        yield
    finally:
        _given_trace.reset(token)


def _is_parent(text: str) -> bool:
    if len(text) > _MAX_STATE_CHARACTERS or _PARENT.fullmatch(text) is None:
        return False
    return len(text) == _PARENT_CHARACTERS or not text.startswith("00")


_given_trace: ContextVar[bytes | None] = ContextVar("given_trace", default=None)
#: The request that the task which runs now is about.
current_incoming: ContextVar[Incoming | None] = ContextVar("current_incoming", default=None)
